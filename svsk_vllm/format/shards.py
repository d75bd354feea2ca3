# SPDX-License-Identifier: Apache-2.0
"""Lazy reading of a Hugging Face folder's safetensors, sharded or not."""

from typing import Final

import torch

from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import read_json
from svsk_vllm.format.shard_headers import (
    INDEX_NAME,
    SINGLE_NAME,
    ShardHeaders,
    read_weight_map,
    require_printable,
)
from svsk_vllm.format.spec import TensorSpec

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "STORED_DTYPES",
    "ShardedReader",
    "read_json",
    "read_weight_map",
    "require_printable",
]

_MAX_DIMENSION: Final = 2**40
"""Of a tensor. One without elements may claim any size beside its 0."""

STORED_DTYPES: Final = {
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


class ShardedReader(ShardHeaders):
    """Tensors of a model folder by name, each read when asked for; see :class:`ShardHeaders`."""

    _framework = "pt"

    def describe(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading its data.

        Raises:
            SvskFormatError: there is none, or torch has no such tensor.
        """
        path = self.folder / self.shard_of(name)
        code, shape = self.stored(name)
        dtype = STORED_DTYPES.get(code)
        if dtype is None or max(shape, default=0) > _MAX_DIMENSION:
            raise SvskFormatError(
                f"{path}: {name} has dtype {code} and shape {list(shape)}, which cannot be read."
                " Copy or download the file again."
            )
        return TensorSpec(dtype, shape)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU."""
        with self._errors(name):
            tensor: torch.Tensor = self._open(self.shard_of(name)).get_tensor(name)
        return tensor
