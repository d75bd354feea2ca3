# SPDX-License-Identifier: Apache-2.0
"""What all rows of a sweep depend on, kept in its folder: another sweep is refused there.

Budgets, peers and tasks are no part of it: more of them may be asked for later.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from svsk_eval.errors import EvalError
from svsk_eval.sweep.request import SweepRequest
from svsk_offline.calibration import CalibrationSet
from svsk_offline.pipeline import resolve_device
from svsk_offline.storage.atomic import write_json
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format.shards import read_json
from svsk_vllm.version import __version__

__all__ = ["claim_folder", "sweep_settings"]

_NAME: Final = "settings.json"
_HASH: Final = 16  # characters: they are shown


def sweep_settings(
    request: SweepRequest, source: ModelSource, texts: CalibrationSet
) -> dict[str, Any]:
    """All that every row depends on, as JSON, without places of files."""
    text = request.text.read_bytes()
    return {
        "model": source.content_sample[:_HASH],
        "calibration": {**texts.describe(), "fingerprint": texts.fingerprint[:_HASH]},
        "seed": request.recipe.calibration.seed,
        "recipe": {"name": request.recipe.name, "hash": request.recipe.digest[:_HASH]},
        "tables": request.tables,
        "text": {"name": request.text.name, "sha256": hashlib.sha256(text).hexdigest()[:_HASH]},
        "chunks": request.chunks,
        "seq_len": request.seq_len,
        "device": resolve_device(request.device).type,
        "versions": {
            "svsk": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a sweep, or go on in one that has the same settings.

    Raises:
        EvalError: it holds something else, or a sweep with other settings, which are named.
        SvskFormatError: its settings are damaged.
    """
    path = out / _NAME
    if not path.exists():
        if any(item.name != ".lock" for item in out.iterdir()):
            raise EvalError(f"{out}: exists and holds no sweep. Choose another folder.")
        write_json(path, settings)
        return
    before, now = _flat(read_json(path)), _flat(settings)
    changed = [
        f"{key} was {before.get(key, 'absent')} and is {now.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise EvalError(
            f"{out}: holds a sweep with other settings: {'; '.join(changed)}. Give the settings it"
            " has, or choose another folder."
        )


def _flat(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Values of nested mappings, by their keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
    return flat
