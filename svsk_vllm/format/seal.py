# SPDX-License-Identifier: Apache-2.0
"""Whether config.json still gives each weight the scheme that it was written with.

A codebook or a tile size that somebody edits changes no shape: the weights would be read as other
numbers.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from svsk_vllm.format.checkpoint import Checkpoint
from svsk_vllm.format.config import ConfigGroup

__all__ = ["SCHEMES_KEY", "scheme_problems", "schemes_metadata"]

SCHEMES_KEY: Final = "svsk_schemes"
"""In the metadata of a shard: SHA-256 of the schemes of all quantised linears of the checkpoint."""


def schemes_metadata(schemes: Mapping[str, ConfigGroup]) -> dict[str, str]:
    """Metadata of a shard of a checkpoint with these schemes by module name."""
    return {SCHEMES_KEY: _digest(schemes)}


def scheme_problems(checkpoint: Checkpoint) -> list[str]:
    """Shards written under other schemes than config.json's; older ones do not say."""
    schemes = {name: spec.scheme for name, spec in checkpoint.linears.items()}
    digest = _digest(schemes)
    return [
        f"{checkpoint.folder / shard}: its weights were written with other codebooks, group sizes"
        " or tiles than config.json gives. Put back the config.json that was written with them."
        for shard in checkpoint.tensors.shards
        if checkpoint.tensors.metadata(shard).get(SCHEMES_KEY, digest) != digest
    ]


def _digest(schemes: Mapping[str, ConfigGroup]) -> str:
    rows: list[Any] = []
    for name, scheme in sorted(schemes.items()):
        # Defaults are left out: a later version's key, left at its default, means the same weights.
        sidecar = (
            scheme.sidecar.model_dump(mode="json", exclude_defaults=True)
            if scheme.sidecar.rank
            else {}
        )
        rows.append([name, scheme.weights.model_dump(mode="json", exclude_defaults=True), sidecar])
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
