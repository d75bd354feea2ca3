# SPDX-License-Identifier: Apache-2.0
"""Reading an SVSK checkpoint folder."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from svsk_vllm.format.config import ONE_LEVEL
from svsk_vllm.format.contents import parse_quantization_config, shape_and_scheme
from svsk_vllm.format.quantized_linear import QuantizedLinear
from svsk_vllm.format.shards import ShardedReader, read_json
from svsk_vllm.format.spec import SCALE_DTYPES, LinearSpec
from svsk_vllm.format.suffixes import (
    SUFFIXES,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
    split_suffix,
)

__all__ = ["Checkpoint", "parse_quantization_config", "split_suffix", "stored_suffixes"]


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
        n, k, scheme = shape_and_scheme(self.config, module, packed.shape)
        two_level = scheme.weights.scale_bits != ONE_LEVEL
        scale = f"{module}.{WEIGHT_ROW_SCALE if two_level else WEIGHT_SCALE}"
        dtype = self.tensors.describe(scale).dtype if scale in self.tensors else None
        if dtype not in SCALE_DTYPES:
            dtype = self.model_dtype if self.model_dtype in SCALE_DTYPES else torch.bfloat16
        return LinearSpec(module, n, k, scheme, dtype)


def stored_suffixes(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Suffixes that are stored for each quantised module."""
    stored: dict[str, set[str]] = {}
    for name in checkpoint.tensors.names:
        parts = split_suffix(name)
        if parts:
            stored.setdefault(parts[0], set()).add(parts[1])
    return stored
