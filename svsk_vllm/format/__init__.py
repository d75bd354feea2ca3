# SPDX-License-Identifier: Apache-2.0
"""The SVSK checkpoint format, version 1 (docs/format.md).

Schema, geometry, packing, reading and checking.
"""

from svsk_kernels.codebook import (
    CODE_MAX,
    CODE_MIN,
    CODEBOOKS,
    Codebook,
    code_values,
    codebook_levels,
)
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
from svsk_vllm.format.spec import SUFFIXES, LinearSpec, TensorSpec
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
