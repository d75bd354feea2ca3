# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own quantisation, called in its shared library as its program llama-quantize does."""

import ctypes
from pathlib import Path
from typing import Final

import torch

from peers.common import PeerError

__all__ = ["FILE_TYPES", "LlamaCpp"]

FILE_TYPES: Final = {"F32": 0, "Q4_K_M": 15, "IQ4_NL": 25, "IQ4_XS": 30}
"""Numbers of ``enum llama_ftype``."""

_Q8_0: Final = 7
_TYPE_COUNT_FROM: Final = 40  # GGML_TYPE_COUNT grows with releases; a default of it means "not set"
_BUFFER: Final = 8 << 30


class _ImatrixData(ctypes.Structure):
    """``struct llama_model_imatrix_data`` of release 0.5.0."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class _Params(ctypes.Structure):
    """``struct llama_model_quantize_params`` of release 0.5.0."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_ImatrixData)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class LlamaCpp:
    """The libraries of a release of llama.cpp.

    Args:
        folder: holds ``libggml*.so`` and ``libllama*.so``.

    Raises:
        PeerError: the folder does not hold them, or they are of a release with other structures.
    """

    def __init__(self, folder: Path) -> None:
        self._ggml = self._load(folder, "libggml-base*.so")
        self._ggml = self._load(folder, "libggml.*so")
        self._llama = self._load(folder, "libllama.*so")
        self._ggml.ggml_backend_load_all_from_path.argtypes = (ctypes.c_char_p,)
        self._ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self._llama.llama_version.restype = ctypes.c_char_p
        self._llama.llama_model_quantize_default_params.restype = _Params
        self._llama.llama_model_quantize.argtypes = (
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.POINTER(_Params),
        )
        self._llama.llama_model_quantize.restype = ctypes.c_uint32
        default = self._llama.llama_model_quantize_default_params()
        # A structure of another layout would give other values at the fields' places.
        if (
            (default.ftype, default.max_buf_size, default.quantize_output_tensor)
            != (_Q8_0, _BUFFER, True)
            or not default.output_tensor_type == default.token_embedding_type >= _TYPE_COUNT_FROM
            or any(
                (
                    default.nthread,
                    default.allow_requantize,
                    default.pure,
                    default.imatrix,
                    default.prune_layers,
                )
            )
        ):
            raise PeerError(
                f"{folder}: llama.cpp {self.version} has other parameters than 0.5.0; see _Params."
            )

    @property
    def version(self) -> str:
        """Release of llama.cpp."""
        return str(self._llama.llama_version().decode())

    def quantize(
        self, source: Path, target: Path, file_type: str, imatrix: dict[str, torch.Tensor] | None
    ) -> None:
        """Quantise a GGUF file as ``llama-quantize SOURCE TARGET FILE_TYPE`` does.

        Args:
            source: a float32 GGUF file.
            target: file to write.
            file_type: one of :data:`FILE_TYPES`.
            imatrix: GGUF name of a weight -> mean square of each of its inputs, float32 [K].

        Raises:
            PeerError: llama.cpp failed; it says why on standard error.
        """
        params = self._llama.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[file_type]
        values = {name: row.float().contiguous() for name, row in (imatrix or {}).items()}
        if values:
            entries = (_ImatrixData * (len(values) + 1))()  # one without a name ends the list
            for entry, (name, row) in zip(entries, values.items(), strict=False):
                entry.name, entry.size = name.encode(), row.numel()
                entry.data = ctypes.cast(row.data_ptr(), ctypes.POINTER(ctypes.c_float))
            params.imatrix = entries
        status = self._llama.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        if status:
            raise PeerError(
                f"{source}: llama.cpp could not quantise it to {file_type}, status {status};"
                " see above."
            )

    @staticmethod
    def _load(folder: Path, pattern: str) -> ctypes.CDLL:
        files = sorted(folder.glob(pattern))
        if len(files) != 1:
            names = [path.name for path in files]
            raise PeerError(
                f"{folder}: {names} match {pattern}, expected one library. Remake the environment."
            )
        return ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)
