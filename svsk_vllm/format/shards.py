# SPDX-License-Identifier: Apache-2.0
"""Lazy reading of a Hugging Face folder's safetensors, sharded or not."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.spec import TensorSpec

__all__ = ["INDEX_NAME", "SINGLE_NAME", "ShardedReader", "read_json", "read_weight_map"]

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SvskFormatError: the file is missing, is not JSON, or does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SvskFormatError(f"{path}: no such file. Is {path.parent} a Hugging Face model folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SvskFormatError(f"{path}: not valid JSON ({error}). Copy or write the file again.") from error
    if not isinstance(value, dict):
        raise SvskFormatError(f"{path}: holds a {type(value).__name__}, expected a JSON object.")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Shard file name by tensor name, from a ``model.safetensors.index.json``.

    Raises:
        SvskFormatError: the file is damaged, or a shard is not a file beside the index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SvskFormatError(f'{index}: no "weight_map" object. Copy or write the file again.')
    for name, shard in weight_map.items():
        # A path would let a downloaded index reach files outside its folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise SvskFormatError(
                f"{index}: {name} is in {shard!r}, expected the name of a .safetensors file beside it."
            )
    return weight_map


class ShardedReader:
    """Tensors of a model folder by name, each read when asked for.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Raises:
        SvskFormatError: neither is there, the index is damaged, or a shard cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        index = folder / INDEX_NAME
        if index.exists():
            self._shard_of = read_weight_map(index)
        elif (folder / SINGLE_NAME).exists():
            self._shard_of = dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        else:
            raise SvskFormatError(
                f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}. Only safetensors are read: convert other weights "
                "with save_pretrained() of transformers."
            )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the index."""
        return list(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def shard_of(self, name: str) -> str:
        """File name of the shard that holds ``name``."""
        try:
            return self._shard_of[name]
        except KeyError:
            raise SvskFormatError(f"{self.folder}: no tensor {name}.") from None

    def describe(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading its data."""
        view = self._slice(name)
        dtype = _DTYPES.get(view.get_dtype())
        if dtype is None:
            raise SvskFormatError(f"{self.folder / self.shard_of(name)}: {name} has dtype {view.get_dtype()}.")
        return TensorSpec(dtype, tuple(view.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU."""
        shard = self.shard_of(name)
        try:
            tensor: torch.Tensor = self._open(shard).get_tensor(name)
        except SafetensorError as error:
            raise SvskFormatError(f"{self.folder / shard}: cannot read {name}: {error}.") from error
        return tensor

    def _slice(self, name: str) -> Any:
        shard = self.shard_of(name)
        try:
            return self._open(shard).get_slice(name)
        except SafetensorError as error:
            raise SvskFormatError(f"{self.folder / shard}: cannot read {name}: {error}.") from error

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            path = self.folder / shard
            try:
                self._handles[shard] = safe_open(path, framework="pt", device="cpu")
            except (FileNotFoundError, SafetensorError, OSError) as error:
                raise SvskFormatError(f"{path}: cannot be opened ({error}). Copy or write the shard again.") from error
        return self._handles[shard]
