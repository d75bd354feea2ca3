# SPDX-License-Identifier: Apache-2.0
"""Compare models that ``svsk eval --chat --json`` scored on the same answers, prompt by prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from svsk_eval.chat.scores import ChatScores
from svsk_eval.errors import EvalError, first_problem
from svsk_eval.text.compare import Comparison, paired

__all__ = ["compare_chat_files", "has_chat", "has_text"]

_FIGURES: Final = ("nll", "kl", "delta_nll", "top1", "end_kl", "end_probability", "early_end")


class _ChatFile(BaseModel):
    """What is read of a file of ``svsk eval --chat --json``."""

    model_config = ConfigDict(frozen=True)
    model: str
    chat: ChatScores


def has_chat(path: str | Path) -> bool:
    """Whether a file says that it holds scores of answers; one that cannot be read does not."""
    return "chat" in _content(path)


def has_text(path: str | Path) -> bool:
    """Whether a file says that it holds scores of a text; one that cannot be read does not."""
    return "per_chunk" in _content(path)


def compare_chat_files(paths: Sequence[str | Path]) -> list[Comparison]:
    """Compare files with the first of them, by the prompts that have a figure.

    Args:
        paths: the baseline, and at least one other.

    Returns:
        One comparison for each file but the first, in their order.

    Raises:
        EvalError: fewer than two files; a file is missing or damaged; or one was scored on other
            answers than the baseline.
    """
    if len(paths) < 2:
        raise EvalError(
            f"Got {len(paths)} file(s) to compare: expected a baseline and at least one other."
        )
    baseline = _load(paths[0]).chat
    return [_compare(paths[0], baseline, path, _load(path)) for path in paths[1:]]


def _compare(
    first: str | Path, baseline: ChatScores, path: str | Path, file: _ChatFile
) -> Comparison:
    if baseline.answers_fingerprint != file.chat.answers_fingerprint:
        raise EvalError(
            f"{first} and {path} were scored on different answers. Score both with the same"
            " --reference, --chat, --prompts and --answer-tokens, and one file of --answers."
        )
    ours, theirs = baseline.series, file.chat.series
    there = {name: ~np.isnan(ours[name]) for name in (*_FIGURES, "ref_nll")}
    for name, known in there.items():
        if not np.array_equal(known, ~np.isnan(theirs[name])):
            raise EvalError(
                f"{first} and {path} have {name} of different prompts: one of them was changed."
                " Score it again: svsk eval MODEL --reference REF --chat PROMPTS --json FILE."
            )
    gaps = np.abs(ours["ref_nll"] - theirs["ref_nll"])[there["ref_nll"]]
    metrics = {
        name: paired(ours[name][there[name]], theirs[name][there[name]])
        for name in _FIGURES
        if there[name].any()
    }
    return Comparison(str(path), file.model, float(gaps.max()) if len(gaps) else None, metrics)


def _load(path: str | Path) -> _ChatFile:
    try:
        return _ChatFile.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read it ({error.strerror}). Name a file of `svsk eval --chat --json`."
        ) from error
    except ValidationError as error:
        raise EvalError(
            f"{path}: not a file of `svsk eval --chat --json`: {first_problem(error)}. Score it"
            " again with this version."
        ) from error


def _content(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
