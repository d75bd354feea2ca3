# SPDX-License-Identifier: Apache-2.0
"""From an SVSK checkpoint back to a dense Hugging Face folder of ``W_hat``."""

from pathlib import Path

import torch

from svsk_offline.export.folder import Progress, Say, write_folder
from svsk_vllm.format import Checkpoint, restored_weight

__all__ = ["restore"]


def restore(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    say: Say = lambda text: None,
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
    return write_folder(
        checkpoint,
        out,
        _restored,
        lambda source: {},
        overwrite=overwrite,
        suffix="restoring",
        progress=progress,
        say=say,
    )


def _restored(source: Checkpoint, module: str) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": restored_weight(source.read_linear(module))}
