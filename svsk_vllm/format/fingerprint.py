# SPDX-License-Identifier: Apache-2.0
"""Which run wrote a shard.

Shards of two runs in one folder fit by name and shape, and are a model of neither.
"""

from pathlib import Path
from typing import Any, Final

from svsk_vllm.format.checkpoint import Checkpoint
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import open_safetensors

__all__ = ["FINGERPRINT_KEY", "fingerprint_problems", "shard_fingerprint"]

FINGERPRINT_KEY: Final = "svsk_fingerprint"
"""In the metadata of every shard, and among the keys of ``producer`` in config.json."""
_SHOWN: Final = 12


def shard_fingerprint(path: Path) -> str | None:
    """Fingerprint of the run that wrote a safetensors file; None if it bears none.

    Raises:
        SvskFormatError: the file cannot be opened.
    """
    with open_safetensors(path) as handle:
        metadata: dict[str, str] = handle.metadata() or {}
    return metadata.get(FINGERPRINT_KEY)


def fingerprint_problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a folder whose shards, or whose config and shards, are of different runs.

    At most one line.

    A config.json that names no run goes with shards of any one run. Shards that cannot be opened
    are left out.
    """
    found: dict[str | None, list[str]] = {}
    for shard in sorted({checkpoint.tensors.shard_of(name) for name in checkpoint.tensors.names}):
        try:
            found.setdefault(shard_fingerprint(checkpoint.folder / shard), []).append(shard)
        except SvskFormatError:
            continue
    declared = checkpoint.config.producer.get(FINGERPRINT_KEY)
    if len(found) > 1:
        runs = "; ".join(f"{_shown(run)} has {_few(shards)}" for run, shards in found.items())
        what = f"shards of {len(found)} runs: {runs}"
    elif (
        declared is not None and found and declared not in [*found]
    ):  # JSON may hold anything there
        what = f"config.json of {_shown(declared)}, shards of {_shown(next(iter(found)))}"
    else:
        return []
    return [
        f"{checkpoint.folder}: {what}. Copy or download the whole folder again, or quantise again."
    ]


def _shown(run: Any) -> str:
    return "a run without fingerprint" if run is None else f"run {str(run)[:_SHOWN]!r}"


def _few(shards: list[str]) -> str:
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
