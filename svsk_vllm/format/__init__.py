# SPDX-License-Identifier: Apache-2.0
"""The SVSK checkpoint format, version 1 (docs/format.md).

Schema, geometry, packing, reading and checking. A name's file is imported when the name is first
asked for: recipes and configs are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svsk_kernels.codebook import code_values, codebook_levels
    from svsk_kernels.codes import CODE_MAX, CODE_MIN, CODEBOOKS, Codebook
    from svsk_kernels.tile_grid import TileGrid, ceil_div
    from svsk_vllm.format.checkpoint import Checkpoint
    from svsk_vllm.format.config import (
        ConfigGroup,
        EmbeddingArgs,
        SidecarArgs,
        SvskCheckpointConfig,
        WeightArgs,
    )
    from svsk_vllm.format.errors import SvskError, SvskFormatError
    from svsk_vllm.format.packing import pack_codes, pack_factors, unpack_codes, unpack_factors
    from svsk_vllm.format.quantized_linear import QuantizedLinear, dequantize, restored_weight
    from svsk_vllm.format.shards import ShardedReader
    from svsk_vllm.format.spec import LinearSpec, TensorSpec
    from svsk_vllm.format.suffixes import SUFFIXES
    from svsk_vllm.format.validate import validate_checkpoint

__all__ = [
    "CODEBOOKS",
    "CODE_MAX",
    "CODE_MIN",
    "SUFFIXES",
    "Checkpoint",
    "Codebook",
    "ConfigGroup",
    "EmbeddingArgs",
    "LinearSpec",
    "QuantizedLinear",
    "ShardedReader",
    "SidecarArgs",
    "SvskCheckpointConfig",
    "SvskError",
    "SvskFormatError",
    "TensorSpec",
    "TileGrid",
    "WeightArgs",
    "ceil_div",
    "code_values",
    "codebook_levels",
    "dequantize",
    "pack_codes",
    "pack_factors",
    "restored_weight",
    "unpack_codes",
    "unpack_factors",
    "validate_checkpoint",
]

_FILES = {
    "svsk_kernels.codebook": "code_values codebook_levels",
    "svsk_kernels.codes": "CODE_MAX CODE_MIN CODEBOOKS Codebook",
    "svsk_kernels.tile_grid": "TileGrid ceil_div",
    "svsk_vllm.format.checkpoint": "Checkpoint",
    "svsk_vllm.format.config": (
        "ConfigGroup EmbeddingArgs SidecarArgs SvskCheckpointConfig WeightArgs"
    ),
    "svsk_vllm.format.errors": "SvskError SvskFormatError",
    "svsk_vllm.format.packing": "pack_codes pack_factors unpack_codes unpack_factors",
    "svsk_vllm.format.quantized_linear": "QuantizedLinear dequantize restored_weight",
    "svsk_vllm.format.shards": "ShardedReader",
    "svsk_vllm.format.spec": "LinearSpec TensorSpec",
    "svsk_vllm.format.suffixes": "SUFFIXES",
    "svsk_vllm.format.validate": "validate_checkpoint",
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import the file of a name when it is first asked for."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_FILE_OF[name]), name)
    return value
