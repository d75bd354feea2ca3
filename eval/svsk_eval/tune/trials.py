# SPDX-License-Identifier: Apache-2.0
"""What ``svsk tune`` knows of the recipes it tried.

Their scores, how two compare, and the file that keeps them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import TypeAdapter
from scipy import stats

from svsk_eval.errors import EvalError
from svsk_kernels.errors import one_line
from svsk_offline.recipe import Recipe
from svsk_offline.storage.atomic import write_json

__all__ = ["Score", "State", "Trial", "differences", "is_better", "paired_kl", "pareto_front"]


@dataclass(frozen=True)
class Score:
    """What one trial gave.

    Attributes:
        bits_per_weight: stored bits of all quantised linears over their weights.
        chunk_kl: mean KL(reference || model) over the tokens of each held-out piece, nats per
            token, [C], C >= 2.
        delta_nll: mean NLL less the reference's on the held-out pieces, nats per token.
        top1: share of tokens whose most likely successor is the reference's, 0 to 1.
        seconds: of quantising and scoring.
    """

    bits_per_weight: float
    chunk_kl: tuple[float, ...]
    delta_nll: float
    top1: float
    seconds: float

    @property
    def kl(self) -> float:
        """Mean KL over the held-out pieces, nats per token."""
        return float(np.mean(self.chunk_kl))

    @property
    def kl_se(self) -> float:
        """Standard error of :attr:`kl` over the pieces."""
        return float(stats.sem(self.chunk_kl))


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried; without a score, ``error`` says why it has none."""

    recipe: Recipe
    score: Score | None
    error: str | None = None


_TRIALS: Final = TypeAdapter(dict[str, Trial])


@dataclass
class State:
    """What is known of a search, in a JSON file so that a killed one goes on where it was.

    Attributes:
        path: the file.
        identity: what the trials depend on besides their recipes; JSON values.
        trials: by digest of their recipe, in the order they were run.
        seconds: spent by all runs so far.
    """

    path: Path
    identity: Mapping[str, Any]
    trials: dict[str, Trial] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self) -> None:
        """Write the file atomically."""
        trials = _TRIALS.dump_python(self.trials, mode="json")
        write_json(
            self.path, {"identity": self.identity, "seconds": self.seconds, "trials": trials}
        )

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Take over the trials of a file whose identity is this one's.

        Raises:
            EvalError: the file is damaged.
        """
        try:
            trials = _TRIALS.validate_python(raw["trials"])
            seconds = float(raw["seconds"])
            if any(digest != trial.recipe.digest for digest, trial in trials.items()):
                raise ValueError("a recipe that is not the one of its digest")
        except (KeyError, TypeError, ValueError) as error:
            raise EvalError(
                f"{self.path}: damaged, or of another version ({one_line(error)})."
                " Delete it, or pass --overwrite to start again."
            ) from error
        self.trials, self.seconds = trials, seconds


def paired_kl(score: Score, other: Score) -> tuple[float, float]:
    """Mean KL of a score less that of another on the same pieces, and its paired standard error."""
    values = np.array(score.chunk_kl) - np.array(other.chunk_kl)
    return float(values.mean()), float(stats.sem(values))


def is_better(challenger: Score, best: Score) -> bool:
    """Whether the challenger's KL is lower by one paired standard error or more."""
    difference, error = paired_kl(challenger, best)
    return difference < 0 and difference <= -error


def differences(recipe: Recipe, default: Recipe) -> dict[str, Any]:
    """The values in which a recipe differs from the default, by ``section.key``.

    Name and description left out.
    """
    ours, theirs = (
        item.model_dump(mode="json", exclude={"name", "description", "ignore"})
        for item in (recipe, default)
    )
    return {
        f"{section}.{key}": value
        for section, values in ours.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if (theirs[section] or {}).get(key) != value
    }


def pareto_front(scores: Sequence[Score]) -> list[bool]:
    """Which scores no other one beats.

    None has a lower KL at no more bits per weight, or the same at fewer.
    """
    points = [(score.bits_per_weight, score.kl) for score in scores]
    return [
        not any(b <= bits and k <= kl and (b, k) != (bits, kl) for b, k in points)
        for bits, kl in points
    ]
