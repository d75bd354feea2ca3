# SPDX-License-Identifier: Apache-2.0
"""Which run wrote a shard: those of two runs may fit by name and shape, and are no model."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from svsk_vllm.format.checkpoint import Checkpoint
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.shards import ShardedReader

__all__ = ["FINGERPRINT_KEY", "fingerprint_problems", "shard_fingerprint"]

FINGERPRINT_KEY: Final = "svsk_fingerprint"
"""In the metadata of every shard, and among the keys of ``producer`` in config.json."""
_SHOWN: Final = 12


def shard_fingerprint(path: Path) -> str | None:
    """Fingerprint of the run that wrote a safetensors file; None if it bears none.

    Raises:
        SvskFormatError: the file cannot be opened.
    """
    reader = ShardedReader(path.parent, shards=[path.name])
    return reader.metadata(path.name).get(FINGERPRINT_KEY)


def fingerprint_problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a folder whose shards, or whose config and shards, are of different runs.

    At most one line.

    A config.json that names no run goes with shards of any one run. Shards that cannot be opened
    are left out.
    """
    runs: dict[str | None, list[str]] = {}
    for shard in checkpoint.tensors.shards:
        with suppress(SvskFormatError):  # reported with the shards
            run = checkpoint.tensors.metadata(shard).get(FINGERPRINT_KEY)
            runs.setdefault(run, []).append(shard)
    declared = checkpoint.config.producer.get(FINGERPRINT_KEY)
    if len(runs) > 1:
        each = "; ".join(f"{_shown(run)} has {_few(shards)}" for run, shards in runs.items())
        what = f"shards of {len(runs)} runs: {each}"
    elif declared is not None and runs and declared not in [*runs]:  # JSON may hold a list there
        what = f"config.json of {_shown(declared)}, shards of {_shown(next(iter(runs)))}"
    else:
        return []
    return [
        f"{checkpoint.folder}: {what}. Copy or download the whole folder again, or quantise again."
    ]


def _shown(run: Any) -> str:
    return "a run without fingerprint" if run is None else f"run {str(run)[:_SHOWN]!r}"


def _few(shards: list[str]) -> str:
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
