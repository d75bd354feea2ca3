# SPDX-License-Identifier: Apache-2.0
"""Exports that are Hugging Face folders: written shard by shard, complete or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.preflight import check_output
from svsk_offline.storage.atomic import PartialFolder, write_index, write_json, write_tensors
from svsk_offline.storage.side_files import copy_side_files
from svsk_vllm.format import Checkpoint, SvskFormatError, validate_checkpoint
from svsk_vllm.format.checkpoint import split_suffix
from svsk_vllm.format.model_config import undeclared
from svsk_vllm.format.shards import SINGLE_NAME

__all__ = ["Convert", "Progress", "Say", "open_sound", "write_folder"]

Convert: TypeAlias = Callable[[Checkpoint, str], dict[str, torch.Tensor]]
"""Tensors to store for a quantised module, from the checkpoint and the module's name."""
Progress: TypeAlias = Callable[[int, int], None]
Say: TypeAlias = Callable[[str], None]


def open_sound(checkpoint: str | Path) -> Checkpoint:
    """Open a checkpoint that is whole.

    Raises:
        SvskFormatError: the checkpoint is damaged.
    """
    if problems := validate_checkpoint(checkpoint, serving=False):
        raise SvskFormatError(
            f"{problems[0]} `svsk validate {checkpoint}` lists {len(problems)} problem(s) in all."
        )
    return Checkpoint(checkpoint)


def write_folder(
    checkpoint: str | Path,
    out: str | Path,
    convert: Convert,
    config: Callable[[Checkpoint], dict[str, Any]],
    *,
    overwrite: bool,
    suffix: str,
    progress: Progress,
    say: Say,
) -> Path:
    """Write a model folder with the checkpoint's shards, its linears as ``convert`` says.

    Args:
        checkpoint: SVSK folder.
        out: folder to write.
        convert: tensors of each quantised module.
        config: ``quantization_config`` of the folder, none if empty. Called before anything is
            written, to refuse what the format cannot hold.
        overwrite: replace ``out``.
        suffix: end of the name of the folder that is worked in.
        progress: called with finished and total shards.
        say: told of files that are left out.

    Raises:
        SvskFormatError: the checkpoint is damaged.
        SvskError: ``out`` exists.
    """
    check_output(Path(out), overwrite=overwrite, dense=True, source=checkpoint)
    source = open_sound(checkpoint)
    quantization = config(source)
    folder = PartialFolder(Path(out), source.folder, overwrite=overwrite, suffix=suffix)
    with folder.locked():
        if folder.path.exists() and any(path != folder.result for path in folder.path.iterdir()):
            raise SvskError(
                f"{folder.path} holds something else than an"
                " unfinished run. Move it, or name another OUT."
            )
        folder.discard()
        partial = folder.create()
        _write_shards(source, partial, convert, progress)
        declared = {"quantization_config": quantization} if quantization else {}
        write_json(partial / "config.json", undeclared(source.hf_config) | declared)
        copy_side_files(source.folder, partial, say, code=True)
        return folder.commit()


def _write_shards(source: Checkpoint, partial: Path, convert: Convert, progress: Progress) -> None:
    shards: dict[str, list[str]] = {}
    for name in source.tensors.names:
        shards.setdefault(source.tensors.shard_of(name), []).append(name)
    converted: set[str] = set()  # a linear's tensors may be in several shards
    for done, (shard, names) in enumerate(shards.items(), 1):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            parts = split_suffix(name)
            if parts is None:
                tensors[name] = source.read_dense(name)
            elif parts[0] not in converted:
                tensors |= convert(source, parts[0])
                converted.add(parts[0])
        write_tensors(partial / shard, tensors)
        progress(done, len(shards))
    if set(shards) != {SINGLE_NAME}:
        write_index(partial, shards)
