# SPDX-License-Identifier: Apache-2.0
"""Writing a GGUF file tensor by tensor, with memory for the largest one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch

from svsk_offline.storage.atomic import write_file

__all__ = ["Describe", "GgufTensor", "dense_bytes", "dense_type", "write_gguf"]

Describe = Callable[[Any], None]
"""Adds metadata to a ``gguf.GGUFWriter``."""

_DENSE_TYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write.

    Attributes:
        name: GGUF's.
        type: name of its GGUF type.
        shape: with the row length last, as torch has it.
        read: gives its bytes, of any shape and dtype.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray[Any, Any]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape as an array of bytes."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def dense_type(tensor: torch.Tensor) -> str:
    """Type that stores a dense tensor exactly; llama.cpp wants vectors in float32."""
    return "F32" if tensor.ndim == 1 else _DENSE_TYPES.get(tensor.dtype, "F32")


def dense_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Bytes of a dense tensor in its :func:`dense_type`."""
    if dense_type(tensor) == "F32":
        tensor = tensor.float()
    bytes_of: np.ndarray[Any, Any] = tensor.contiguous().view(torch.uint8).numpy()
    return bytes_of


def write_gguf(
    path: Path, architecture: str, describe: Describe, tensors: Sequence[GgufTensor]
) -> None:
    """Write a GGUF file, complete or not at all.

    Args:
        path: the file.
        architecture: GGUF's name of it.
        describe: adds the metadata.
        tensors: read one after the other.

    Raises:
        OSError: it cannot be written.
        SvskError: a tensor cannot be read or converted.
    """

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            describe(writer)
            for tensor in tensors:
                shape = tensor.byte_shape
                kind = gguf.GGMLQuantizationType[tensor.type]
                size = int(np.prod(shape, dtype=np.int64))
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
                writer.write_tensor_data(data)
        finally:
            writer.close()

    write_file(path, write)
