# SPDX-License-Identifier: Apache-2.0
"""An unfinished run in the place of the one that is asked for: which values differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from svsk_kernels.errors import SvskError
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import read_json

__all__ = ["STATE_NAME", "check_unfinished", "differences", "refuse_other_run"]

STATE_NAME: Final = "svsk-state.json"
"""In the working folder of a run: what it is, before anything else is written there."""

_SHOWN: Final = 60
_FOLLOWS: Final = ("fingerprint", "hash", "config_groups", "ignore", "parts", "held_out")
"""Parts of a run's description that differ because others do."""
_PREFIXES: Final = ("config.producer.recipe_values.", "config.producer.", "config.")
_PROCESSES: Final = "config.producer.processes"
_NAMES: Final = {
    "model": "the model's config.json or the names of its tensors",
    "files": "sizes or times of the model's files",
}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Which values of two runs differ, as ``samples: 64 there, 16 here``.

    Args:
        there: what the unfinished run is.
        here: what is asked for.

    Returns:
        At least one line where the two differ. What differs only because something else does is
        left out, unless there is nothing else.
    """
    ours, theirs = _flat(here), _flat(there)
    for values in (ours, theirs):
        values.setdefault(_PROCESSES, 1)
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    causes = [key for key in keys if not any(word in key for word in _FOLLOWS)]
    if any(".recipe_values." in key for key in causes):  # a text's length is the recipe's
        causes = [
            key
            for key in causes
            if ".producer.calibration." not in key or key.endswith(".calibration.source")
        ]
    if not causes:
        texts = [key for key in keys if "calibration" in key]
        causes = texts[:1] or keys
    return [_line(key, theirs.get(key), ours.get(key)) for key in causes]


def refuse_other_run(partial: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a run in the place of another.

    Raises:
        SvskError: always; it says what differs.
    """
    raise SvskError(
        f"{partial} holds an unfinished run of another model, recipe, calibration, device or"
        f" number of processes: {'; '.join(differences(there, here))}. Ask for what it is to go on"
        " with it, or pass --overwrite to drop it and begin anew."
    )


def check_unfinished(out: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse, before anything heavy is imported, a run in the place of one of another recipe.

    Everything else that tells two runs apart is seen when the model and its text are open.

    Args:
        out: the folder that is to be written.
        recipe: values of the recipe that is asked for.

    Raises:
        SvskError: an unfinished run was asked for with other values.
    """
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    try:
        state = read_json(partial / STATE_NAME)
    except SvskFormatError:
        return  # none, or none of ours: looked at later
    asked = state.get("asked")
    here = json.loads(json.dumps(dict(recipe)))
    if isinstance(asked, dict) and asked != here:
        prefix = _PREFIXES[0].rstrip(".")
        refuse_other_run(partial, {prefix: asked}, {prefix: here})


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by their path."""
    if not isinstance(value, Mapping):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{path}.{key}" if path else str(key))
    return flat


def _line(key: str, there: Any, here: Any) -> str:
    name = _NAMES.get(key, key)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if key in _NAMES or "fingerprint" in key:
        return f"{name.replace('.fingerprint', ' text')} differ"
    return f"{name}: {_value(there)} there, {_value(here)} here"


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
