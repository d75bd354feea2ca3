# SPDX-License-Identifier: Apache-2.0
"""The search of ``svsk tune``.

Which recipe to try next, which one is the best so far, when to stop.

Coordinate search on ladders of values. From the best recipe so far one parameter at a time goes one
step up its ladder, further while that helps, then the same downwards; the search has converged when
a sweep over all parameters brings nothing.

A challenger replaces the best so far only if its mean KL is lower by at least one standard error of
the paired difference: with d_c the difference of the two mean KLs over held-out piece c, of C
pieces,

    mean(d) < 0    and    mean(d) <= -s(d) / sqrt(C)

Differences below that are noise of the pieces drawn, and of many trials one always looks good by
chance. So the best's KL only ever falls, from that of the default recipe, which is the first trial.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from svsk_eval.errors import EvalError
from svsk_eval.tune.trials import Score, State, Trial, is_better, paired_kl
from svsk_kernels.errors import SvskError
from svsk_offline.recipe import Recipe

__all__ = ["SEARCHED", "Parameter", "Search", "Step"]

Verdict = Literal["first", "better", "noise", "worse", "over", "failed"]
"""What became of a trial.

The first that counts, a new best, lower by less than the noise, not lower, larger than the target,
without a score.
"""

_ROUNDING: Final = 1e-9
"""Bits per weight by which a trial may exceed its target."""


@dataclass(frozen=True)
class Parameter:
    """A value of a recipe that is searched.

    Attributes:
        section: of the recipe.
        key: in the section.
        ladder: values in order of size; a recipe's own value that is missing is put in its place.
    """

    section: str
    key: str
    ladder: tuple[Any, ...]

    def applies(self, recipe: Recipe) -> bool:
        """Whether the recipe has it, and it changes anything there."""
        name = f"{self.section}.{self.key}"
        if getattr(recipe, self.section, None) is None or name in recipe.idle:
            return False
        gradients = getattr(recipe, "gradients", None)
        # Directions are of the gradients as they are (GradientArgs).
        if name == "gradients.row_power" and gradients and gradients.directions:
            return False
        if name == "gradients.directions" and gradients and gradients.row_power != 1:
            return False
        # A bit budget chooses the group size; the recipe's is only where errors are measured.
        return name != "weights.group_size" or getattr(recipe, "allocation", None) is None

    def neighbour(self, recipe: Recipe, direction: int) -> Any:
        """The next value up (1) or down (-1) from a recipe's; None at the end of the ladder."""
        current = getattr(getattr(recipe, self.section), self.key)
        ladder = self.ladder if current in self.ladder else tuple(sorted((*self.ladder, current)))
        place = ladder.index(current) + direction
        return ladder[place] if 0 <= place < len(ladder) else None


SEARCHED: Final = (
    Parameter("alternating", "aim", (0.0, 0.5, 1.0)),
    Parameter("gradients", "token_power", (0.0, 0.25, 0.5, 0.75, 1.0)),
    Parameter("gradients", "row_power", (0.0, 0.25, 0.5, 0.75, 1.0)),
    Parameter("gradients", "directions", (0, 64, 256, 1024)),
    Parameter("gradients", "shared", (False, True)),
    Parameter("calibration", "sequential", (False, True)),
    Parameter("sink", "weight", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)),
    Parameter("alternating", "damping", (0.001, 0.003, 0.01, 0.03, 0.1)),
    Parameter("alternating", "rounds", (1, 3, 6, 12)),
    Parameter("alternating", "polish", (0, 1, 2, 4)),
    Parameter("alternating", "ridge", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
    Parameter("published", "ridge", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
    Parameter("allocation", "factor_bits", ((4,), (4, 8), (8,))),
    Parameter("weights", "group_size", (32, 64)),
    Parameter("published", "alpha", (0.25, 0.5, 0.75, 1.0)),
)
"""In the order of the search.

What is expected to matter most comes first, for budgets that allow a few trials: half of the
correction has gained on both models measured, and needs nothing measured anew, as the gradients'
parameters do.
"""


@dataclass(frozen=True)
class Step:
    """A trial that was just run.

    Attributes:
        number: how many have been, those of earlier runs included.
        trial: the trial.
        verdict: what became of it.
        difference: its mean KL less that of the best before, nats per token; None if either has
            none.
        se: standard error of the difference, paired over the held-out pieces.
        spent: seconds of all runs so far.
    """

    number: int
    trial: Trial
    verdict: Verdict
    difference: float | None
    se: float | None
    spent: float


class _BudgetSpentError(Exception):
    """No further trial fits."""


@dataclass
class Search:
    """One search, see the module.

    Args:
        default: where to start.
        run: quantises by a recipe and scores what comes out. SvskError, SvskFormatError and
            EvalError make the trial a failed one, unless it is the first; other exceptions end the
            search.
        state: what is known already; kept up to date on disk.
        budget: seconds of all runs together.
        clock: seconds from any origin.
        on_start: called before a trial with its number and recipe.
        on_step: called after it.
    """

    default: Recipe
    run: Callable[[Recipe], Score]
    state: State
    budget: float
    clock: Callable[[], float]
    on_start: Callable[[int, Recipe], None] = lambda number, recipe: None
    on_step: Callable[[Step], None] = lambda step: None
    best: Trial | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._refused: set[tuple[str, str, Any]] = set()
        self._earlier, self._started = self.state.seconds, self.clock()

    @property
    def refused(self) -> int:
        """How many different values the recipe's own rules refused."""
        return len(self._refused)

    def execute(self) -> bool:
        """Search until it has converged (True) or the budget is spent (False).

        :attr:`best` is the result.

        Raises:
            EvalError: no trial is within the target.
            SvskError, SvskFormatError, EvalError: the first trial failed.
        """
        try:
            self._consider(self.default)
            while self._sweep():
                pass
            converged = True
        except _BudgetSpentError:
            converged = False
        if self.best is None:
            target = self.default.target_bpw
            least = min(
                trial.score.bits_per_weight for trial in self.state.trials.values() if trial.score
            )
            raise EvalError(
                f"No trial is within {target} bits per weight; the"
                f" smallest has {least:.4f}. Raise --target-bpw."
            )
        return converged

    def _sweep(self) -> bool:
        """Try every parameter once; whether the best changed."""
        found = False
        for parameter in SEARCHED:
            for direction in (1, -1):
                while self._move(parameter, direction):
                    found = True
        return found

    def _move(self, parameter: Parameter, direction: int) -> bool:
        """Try one step of one parameter; whether it made a new best."""
        centre = self.best.recipe if self.best else self.default
        value = parameter.neighbour(centre, direction) if parameter.applies(centre) else None
        if value is None:
            return False
        try:
            recipe = centre.override({parameter.section: {parameter.key: value}})
        except SvskError:
            self._refused.add((parameter.section, parameter.key, value))
            return False
        return self._consider(recipe)

    def _consider(self, recipe: Recipe) -> bool:
        """Score a recipe, unless that is known, and let it replace the best if it is better."""
        best, known = self.best, self.state.trials.get(recipe.digest)
        trial = known or self._try(recipe)
        verdict = self._judge(trial)
        if verdict in ("first", "better"):
            self.best = trial
        if known is None:
            difference = error = None
            if trial.score and best and best.score:
                difference, error = paired_kl(trial.score, best.score)
            self.on_step(
                Step(len(self.state.trials), trial, verdict, difference, error, self.state.seconds)
            )
        return verdict in ("first", "better")

    def _try(self, recipe: Recipe) -> Trial:
        """Run a trial and write it down."""
        trials = self.state.trials
        durations = [trial.score.seconds for trial in trials.values() if trial.score]
        if durations and self._spent() + statistics.median(durations) > self.budget:
            raise _BudgetSpentError
        self.on_start(len(trials) + 1, recipe)
        try:
            trial = Trial(recipe, self.run(recipe))
        except SvskError as error:
            if not durations:
                raise
            trial = Trial(recipe, None, str(error))
        trials[recipe.digest] = trial
        self.state.seconds = self._spent()
        self.state.save()
        return trial

    def _spent(self) -> float:
        return self._earlier + self.clock() - self._started

    def _judge(self, trial: Trial) -> Verdict:
        if trial.score is None:
            return "failed"
        target = self.default.target_bpw
        if target is not None and trial.score.bits_per_weight > target + _ROUNDING:
            return "over"
        if self.best is None or self.best.score is None:
            return "first"
        if is_better(trial.score, self.best.score):
            return "better"
        return "noise" if trial.score.kl < self.best.score.kl else "worse"
