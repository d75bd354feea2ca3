# SPDX-License-Identifier: Apache-2.0
"""What tells one dense model from another without reading its weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from svsk_offline.storage.tensor_readers import TensorReader

__all__ = ["content_digest", "folder_identity"]

_SAMPLE: Final = 1024
"""Values of each tensor that tell its content from another's."""


def folder_identity(
    folder: Path, config: Mapping[str, Any], tensors: TensorReader, *, code: bool
) -> dict[str, Any]:
    """A folder as it lies there: config.json, names of tensors, sizes and times of files.

    Args:
        folder: the model's.
        config: its config.json.
        tensors: its weights as they are stored.
        code: its own Python files are run, and belong to it.

    Returns:
        JSON values.
    """
    shards = [[name, tensors.shard_of(name)] for name in tensors.names]
    patterns = ("*.safetensors", "*.py") if code else ("*.safetensors",)
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    files = ((path.name, path.stat()) for path in paths)
    return {
        "model": hashlib.sha256(json.dumps([config, shards], sort_keys=True).encode()).hexdigest(),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }


def content_digest(config: Mapping[str, Any], tensors: TensorReader, fold: str = "") -> str:
    """SHA-256 of config.json and of a piece from the middle of every tensor.

    Args:
        config: config.json.
        tensors: the weights as they are stored.
        fold: digest of what they are multiplied by, empty for nothing.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + fold.encode())
    for name in sorted(tensors.names):
        # Mapped: only the pages of the piece are read.
        values = tensors.read(name).flatten()
        middle = len(values) // 2
        piece = values[middle : middle + _SAMPLE].clone().view(torch.uint8)
        digest.update(f"{name} {len(values)} {values.dtype} ".encode() + piece.numpy().tobytes())
    return digest.hexdigest()
