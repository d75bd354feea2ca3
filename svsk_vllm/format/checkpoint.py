# SPDX-License-Identifier: Apache-2.0
"""Reading an SVSK checkpoint folder."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from svsk_vllm.format.config import SvskCheckpointConfig
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.quantized_linear import QuantizedLinear
from svsk_vllm.format.shards import ShardedReader, read_json
from svsk_vllm.format.spec import (
    SCALE_DTYPES,
    SUFFIXES,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
    LinearSpec,
)

__all__ = ["Checkpoint", "parse_quantization_config", "split_suffix", "stored_suffixes"]


def split_suffix(name: str) -> tuple[str, str] | None:
    """``(module, suffix)`` of a quantised linear's tensor name, None for any other."""
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if module and suffix in SUFFIXES else None


class Checkpoint:
    """An SVSK checkpoint on disk; tensors are read when asked for.

    Args:
        folder: a Hugging Face folder whose config.json has a ``quantization_config`` of method
            ``svsk``.

    Raises:
        SvskFormatError: the folder is not an SVSK checkpoint this package can read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.hf_config: dict[str, Any] = read_json(self.folder / "config.json")
        self.config = parse_quantization_config(self.folder, self.hf_config)
        self.tensors = ShardedReader(self.folder)

    @staticmethod
    def is_svsk(folder: Path | str) -> bool:
        """Whether the config.json in ``folder`` declares the quantisation method ``svsk``."""
        path = Path(folder) / "config.json"
        if not path.exists():
            return False
        declared = read_json(path).get("quantization_config")
        return isinstance(declared, dict) and declared.get("quant_method") == "svsk"

    @property
    def model_dtype(self) -> torch.dtype | None:
        """The dtype config.json declares, None when it declares none."""
        name = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) else None

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        """Specification of every quantised linear by module name, in the order of the index.

        Raises:
            SvskFormatError: a stored linear has no scheme in the config, or a shape no scheme can
                have.
        """
        specs = {}
        for name in self.tensors.names:
            parts = split_suffix(name)
            if parts and parts[1] == WEIGHT_PACKED:
                specs[parts[0]] = self.linear_spec(parts[0])
        return specs

    @property
    def dense_names(self) -> list[str]:
        """Names of the tensors that are stored as they were."""
        return [name for name in self.tensors.names if split_suffix(name) is None]

    def read_linear(self, module: str) -> QuantizedLinear:
        """Read and unpack one quantised linear."""
        spec = self.linears[module]
        return QuantizedLinear.from_tensors(
            spec,
            {
                name: self.tensors.read(name)
                for suffix in SUFFIXES
                if (name := f"{module}.{suffix}") in self.tensors
            },
        )

    def iter_linears(self) -> Iterator[tuple[str, QuantizedLinear]]:
        """Read the quantised linears one after the other."""
        for module in self.linears:
            yield module, self.read_linear(module)

    def read_dense(self, name: str) -> torch.Tensor:
        """Read a tensor that is stored as it was."""
        return self.tensors.read(name)

    def linear_spec(self, module: str) -> LinearSpec:
        """Specification of one quantised linear, from its stored shape and the config.

        Where no usable scale is stored, the scale dtype is the one it should have: the model's.
        """
        packed = self.tensors.describe(f"{module}.{WEIGHT_PACKED}")
        if len(packed.shape) != 2 or 0 in packed.shape:
            raise SvskFormatError(
                f"{module}.{WEIGHT_PACKED}: shape {list(packed.shape)},"
                " expected a matrix of one row or more."
            )
        scheme = self.config.scheme_for(module)
        if scheme is None:
            why = (
                "is on the ignore list"
                if self.config.is_ignored(module)
                else "matches no config group"
            )
            raise SvskFormatError(
                f"{module}: stored quantised, but {why} in config.json. Correct the config."
            )
        n, k = scheme.weights.shape_of(packed.shape)
        group = scheme.weights.group_size
        if k % group:
            raise SvskFormatError(
                f"{module}.{WEIGHT_PACKED}: shape {list(packed.shape)} holds K = {k} input"
                f" features, not a multiple of the group size {group} that config.json gives it."
                " Correct the config, or quantise the model again."
            )
        two_level = scheme.weights.scale_bits != ONE_LEVEL
        scale = f"{module}.{WEIGHT_ROW_SCALE if two_level else WEIGHT_SCALE}"
        dtype = self.tensors.describe(scale).dtype if scale in self.tensors else None
        if dtype not in SCALE_DTYPES:
            dtype = self.model_dtype if self.model_dtype in SCALE_DTYPES else torch.bfloat16
        return LinearSpec(module, n, k, scheme, dtype)


def parse_quantization_config(folder: Path, hf_config: dict[str, Any]) -> SvskCheckpointConfig:
    """The checked ``quantization_config`` of a loaded config.json.

    Raises:
        SvskFormatError: it is missing, belongs to another method, or is invalid.
    """
    source = f"{folder / 'config.json'}: quantization_config"
    raw = hf_config.get("quantization_config")
    if not isinstance(raw, dict):
        raise SvskFormatError(
            f"{source}: missing. This is not a quantised checkpoint; run `svsk quantize` first."
        )
    if raw.get("quant_method") != "svsk":
        raise SvskFormatError(
            f"{source}: quant_method {raw.get('quant_method')!r}, expected 'svsk'."
        )
    return SvskCheckpointConfig.from_dict(raw, source)


def stored_suffixes(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Suffixes that are stored for each quantised module."""
    stored: dict[str, set[str]] = {}
    for name in checkpoint.tensors.names:
        parts = split_suffix(name)
        if parts:
            stored.setdefault(parts[0], set()).add(parts[1])
    return stored
