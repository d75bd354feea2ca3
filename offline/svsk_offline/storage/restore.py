# SPDX-License-Identifier: Apache-2.0
"""From an SVSK checkpoint back to a dense Hugging Face folder of ``W_hat``."""

from collections.abc import Callable
from pathlib import Path

from svsk_kernels.errors import SvskError
from svsk_offline.preflight import check_output
from svsk_offline.storage.atomic import PartialFolder, write_index, write_json, write_tensors
from svsk_offline.storage.side_files import copy_side_files
from svsk_vllm.format import Checkpoint, SvskFormatError, restored_weight, validate_checkpoint
from svsk_vllm.format.checkpoint import split_suffix
from svsk_vllm.format.config import undeclared
from svsk_vllm.format.shards import SINGLE_NAME

__all__ = ["restore"]


def restore(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the dense model a checkpoint stands for, rounded to its dtype, shard by shard.

    Args:
        checkpoint: SVSK folder.
        out: folder to write.
        overwrite: replace ``out``.
        progress: called with finished and total shards.
        say: told of files that are left out.

    Raises:
        SvskFormatError: the checkpoint is damaged.
        SvskError: ``out`` exists.
    """
    check_output(Path(out), overwrite=overwrite, dense=True, source=checkpoint)
    if problems := validate_checkpoint(checkpoint, serving=False):
        raise SvskFormatError(
            f"{problems[0]} `svsk validate {checkpoint}` lists {len(problems)} problem(s) in all."
        )
    source = Checkpoint(checkpoint)
    folder = PartialFolder(Path(out), source.folder, overwrite=overwrite, suffix="restoring")
    with folder.locked():
        if folder.path.exists() and any(path != folder.result for path in folder.path.iterdir()):
            raise SvskError(
                f"{folder.path} holds something else than an"
                " unfinished run. Move it, or name another OUT."
            )
        folder.discard()
        _write_dense(source, folder.create(), progress, say)
        return folder.commit()


def _write_dense(
    source: Checkpoint,
    partial: Path,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> None:
    shards: dict[str, list[str]] = {}
    for name in source.tensors.names:
        shards.setdefault(source.tensors.shard_of(name), []).append(name)
    restored: set[str] = set()  # a linear's tensors may be in several shards
    for done, (shard, names) in enumerate(shards.items(), 1):
        tensors = {}
        for name in names:
            parts = split_suffix(name)
            if parts is None:
                tensors[name] = source.read_dense(name)
            elif parts[0] not in restored:
                tensors[f"{parts[0]}.weight"] = restored_weight(source.read_linear(parts[0]))
                restored.add(parts[0])
        write_tensors(partial / shard, tensors)
        progress(done, len(shards))
    if set(shards) != {SINGLE_NAME}:
        write_index(partial, shards)
    write_json(partial / "config.json", undeclared(source.hf_config))
    copy_side_files(source.folder, partial, say, code=True)
