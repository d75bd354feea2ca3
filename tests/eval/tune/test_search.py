# SPDX-License-Identifier: Apache-2.0
"""The search of ``svsk tune`` by itself, on invented scores and an invented clock."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.errors import EvalError
from svsk_eval.tune.search import SEARCHED, Search, Step
from svsk_eval.tune.trials import Score, State, Trial, differences, is_better, pareto_front
from svsk_kernels.errors import SvskError
from svsk_offline.recipe import Recipe, load_recipe

BEST = load_recipe("fast").override({"alternating": {"rounds": 6, "polish": 1}})


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Scores recipes by a formula; every trial takes ``seconds``."""

    def __init__(
        self, kl: Callable[[Recipe], float], bpw: Callable[[Recipe], float], seconds: float
    ) -> None:
        self.kl, self.bpw, self.seconds, self.clock, self.tried = (
            kl,
            bpw,
            seconds,
            Clock(),
            list[Recipe](),
        )

    def run(self, recipe: Recipe) -> Score:
        self.tried.append(recipe)
        self.clock.now += self.seconds
        value = self.kl(recipe)
        if math.isnan(value):
            raise SvskError("cannot be quantised")
        return Score(self.bpw(recipe), (value, value + 0.5, value), 0.1, 0.9, self.seconds)


@pytest.fixture
def bench() -> Bench:
    """Least KL at damping 0.1, rounds 12 and ridge 1e-5; everything else is without effect."""

    def kl(recipe: Recipe) -> float:
        raw = recipe.model_dump()
        away = (
            abs(math.log10(raw["alternating"]["damping"]) + 1),
            abs(raw["alternating"]["rounds"] - 12) / 6,
        )
        return 1 + sum(away) + abs(math.log10(raw["alternating"]["ridge"]) + 5)

    return Bench(kl, lambda recipe: 4.5, 10.0)


def search(
    bench: Bench, path: Path, *, default: Recipe = BEST, budget: float = 1e9, **events: Any
) -> Search:
    state = State(path, {})
    if path.exists():
        state.restore(json.loads(path.read_text()))
    return Search(default, bench.run, state, budget, bench.clock, **events)


def score(*chunks: float, bits: float = 4.5) -> Score:
    return Score(bits, chunks, 0.0, 1.0, 1.0)


def best_of(found: Search) -> dict[str, Any]:
    assert found.best is not None
    return differences(found.best.recipe, found.default)


def test_the_search_walks_to_the_best_and_stops(bench: Bench, tmp_path: Path) -> None:
    steps: list[Step] = []
    found = search(bench, tmp_path / "state.json", on_step=steps.append)
    assert found.execute()
    assert best_of(found) == {
        "alternating.damping": 0.1,
        "alternating.rounds": 12,
        "alternating.ridge": 1e-5,
    }
    assert bench.tried[0] == BEST
    digests = [recipe.digest for recipe in bench.tried]
    assert len(set(digests)) == len(digests), "no recipe is tried twice"
    assert [step.number for step in steps] == list(range(1, len(digests) + 1))
    assert [step.verdict for step in steps].count("better") == 4
    assert steps[0].verdict == "first"
    assert steps[-1].spent == 10 * len(digests)
    # Every trial differs in one value from the best before it.
    best = BEST
    for step in steps[1:]:
        assert len(differences(step.trial.recipe, best)) == 1
        best = step.trial.recipe if step.verdict == "better" else best


def test_the_budget_is_kept_and_the_first_trial_always_runs(bench: Bench, tmp_path: Path) -> None:
    for budget, trials in ((1, 1), (19, 1), (20, 2), (55, 5)):
        bench.tried.clear()
        found = search(bench, tmp_path / f"{budget}.json", budget=budget)
        assert not found.execute()
        assert len(bench.tried) == trials


def test_the_median_decides_what_fits(bench: Bench, tmp_path: Path) -> None:
    lengths = iter([1.0, 1.0, 10.0, 30.0])

    def run(recipe: Recipe) -> Score:
        bench.seconds = next(lengths)
        return Bench.run(bench, recipe)

    # After 1, 1 and 10 seconds the median is 1, so that the fourth starts (the mean would forbid
    # it); it overruns.
    found = Search(BEST, run, State(tmp_path / "state.json", {}), 13.5, bench.clock)
    assert not found.execute()
    assert len(bench.tried) == 4


def test_minutes_of_earlier_runs_count_unless_the_budget_grows(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    assert not search(bench, path, budget=40).execute()
    assert len(bench.tried) == 4
    assert not search(bench, path, budget=40).execute()
    assert len(bench.tried) == 4
    assert not search(bench, path, budget=70).execute()
    assert len(bench.tried) == 7
    assert search(bench, path).execute()
    bench_again = Bench(bench.kl, bench.bpw, 10.0)
    assert search(bench_again, tmp_path / "other.json").execute()
    assert bench.tried == bench_again.tried


def test_a_search_killed_anywhere_ends_as_if_it_had_not_been(bench: Bench, tmp_path: Path) -> None:
    whole = search(bench, tmp_path / "whole.json")
    whole.execute()
    tried = list(bench.tried)
    bench.tried.clear()

    def killed(recipe: Recipe) -> Score:
        if len(bench.tried) % 3 == 2 and recipe not in interrupted:
            interrupted.append(recipe)
            raise KeyboardInterrupt
        return bench.run(recipe)

    interrupted: list[Recipe] = []
    while True:
        state = State(tmp_path / "killed.json", {})
        if state.path.exists():
            state.restore(json.loads(state.path.read_text()))
        found = Search(BEST, killed, state, 1e9, bench.clock)
        try:
            assert found.execute()
            break
        except KeyboardInterrupt:
            pass
    assert len(interrupted) > 3
    assert bench.tried == tried
    assert best_of(found) == best_of(whole)
    assert found.refused == whole.refused


def test_a_difference_must_be_a_standard_error_or_more() -> None:
    base = score(1.0, 2.0, 3.0, 4.0)
    spread = 0.1 * math.sqrt(3)  # of -spread, +spread, -spread, +spread the standard error is 0.1
    for mean, better in ((-0.1001, True), (-0.0999, False)):
        values = (b + mean + (-1) ** i * spread for i, b in enumerate(base.chunk_kl))
        assert is_better(score(*values), base) == better
    assert is_better(score(0.9, 1.9, 2.9, 3.9), base)
    assert is_better(score(0.5, 1.9, 2.9, 3.95), base)  # -0.1875 ± 0.105
    assert not is_better(score(0.5, 2.1, 3.05, 4.0), base)  # -0.0875 ± 0.140
    assert not is_better(base, base)
    assert not is_better(score(1.1, 2.1, 3.1, 4.1), base)
    # What one would call equal from the two standard errors, pairing tells apart.
    assert base.kl_se > 0.6


def test_a_lower_kl_within_the_noise_is_not_chosen(tmp_path: Path) -> None:
    def run(recipe: Recipe) -> Score:
        lower = recipe.sink.weight == 1.0
        return score(0.5, 1.05) if lower else score(*((1.0, 1.0) if recipe == BEST else (1.1, 1.1)))

    steps: list[Step] = []
    found = Search(
        BEST, run, State(tmp_path / "state.json", {}), 1e9, Clock(), on_step=steps.append
    )
    assert found.execute()
    assert best_of(found) == {}
    (lower,) = [step for step in steps if step.trial.score and step.trial.score.kl < 1.0]
    assert lower.verdict == "noise"
    assert lower.difference == pytest.approx(-0.225)
    assert lower.se == pytest.approx(0.275)


def test_trials_above_the_target_are_not_chosen(bench: Bench, tmp_path: Path) -> None:
    default = BEST.override({"allocation": {"target_bpw": 4.5}})
    bench.bpw = lambda recipe: (
        4.6 if recipe.model_dump()["alternating"]["rounds"] == 12 else 4.5 + 5e-10
    )
    steps: list[Step] = []
    found = search(bench, tmp_path / "state.json", default=default, on_step=steps.append)
    assert found.execute()
    assert best_of(found) == {"alternating.damping": 0.1, "alternating.ridge": 1e-5}
    assert {step.verdict for step in steps} == {"first", "better", "over", "worse"}
    # Where the default itself is too large, the first that is not takes its place.
    bench.bpw = lambda recipe: 4.5 if recipe.model_dump()["alternating"]["rounds"] == 3 else 4.6
    found = search(bench, tmp_path / "other.json", default=default)
    assert found.execute()
    assert best_of(found) == {
        "alternating.rounds": 3,
        "alternating.damping": 0.1,
        "alternating.ridge": 1e-5,
    }
    bench.bpw = lambda recipe: 4.6
    with pytest.raises(EvalError, match=r"within 4\.5 bits per weight; the smallest has 4\.6000"):
        search(bench, tmp_path / "none.json", default=default).execute()


def test_what_is_searched_depends_on_the_recipe(bench: Bench, tmp_path: Path) -> None:
    def keys(default: Recipe) -> tuple[set[str], int]:
        flat = Bench(lambda recipe: 1.0, lambda recipe: 4.5, 1.0)
        found = search(flat, tmp_path / f"{default.digest}.json", default=default)
        found.execute()
        return {key for recipe in flat.tried for key in differences(recipe, default)}, found.refused

    every = {f"{parameter.section}.{parameter.key}" for parameter in SEARCHED}
    plain, refused = keys(BEST)
    # Directions want a row_power of 1, which a recipe without gradients does not have.
    other = {"published.alpha", "published.ridge", "gradients.directions"}
    assert plain == every - other - {"allocation.factor_bits", "gradients.shared"}
    assert refused == 0
    target, _ = keys(BEST.override({"allocation": {"target_bpw": 4.5}}))
    assert target == plain - {"weights.group_size"} | {"allocation.factor_bits"}
    tokens, _ = keys(BEST.override({"gradients": {"token_power": 0.5}}))
    assert tokens == plain | {"gradients.shared"}
    base, _ = keys(BEST.override({"sidecar": {"rank": 0}}))
    assert base == plain - {"gradients.row_power", "alternating.rounds", "alternating.ridge"}
    rows, _ = keys(BEST.override({"gradients": {"row_power": 1}}))
    assert rows == plain | {"gradients.directions"}
    directions, _ = keys(BEST.override({"gradients": {"row_power": 1, "directions": 256}}))
    assert directions == rows - {"gradients.row_power"}
    published, refused = keys(load_recipe("published"))
    assert published == other - {"gradients.directions"} | {
        "calibration.sequential",
        "weights.group_size",
    }
    assert refused == 0
    odd = {"target_bpw": 4.5, "factor_bits": (8,), "ranks": (0, 3)}
    _, refused = keys(BEST.override({"allocation": odd}))
    assert refused == 1, "4-bit factors want even ranks"


def test_a_value_beside_the_ladder_has_its_neighbours() -> None:
    damping = next(parameter for parameter in SEARCHED if parameter.key == "damping")
    recipe = BEST.override({"alternating": {"damping": 0.02}})
    assert (damping.neighbour(recipe, -1), damping.neighbour(recipe, 1)) == (0.01, 0.03)
    assert damping.neighbour(BEST.override({"alternating": {"damping": 0.5}}), 1) is None


def test_failed_trials_are_noted_and_passed_over(bench: Bench, tmp_path: Path) -> None:
    formula = bench.kl
    bench.kl = lambda recipe: math.nan if recipe.sink.weight == 1.0 else formula(recipe)
    path = tmp_path / "state.json"
    assert search(bench, path).execute()
    tried = len(bench.tried)
    found = search(bench, path)
    assert found.execute()
    assert len(bench.tried) == tried, "neither are failed ones repeated"
    errors = [trial.error for trial in found.state.trials.values() if trial.score is None]
    assert errors == ["cannot be quantised"] * len(errors) != []
    bench.kl = lambda recipe: math.nan
    with pytest.raises(SvskError, match="cannot be quantised"):
        search(bench, tmp_path / "first.json").execute()
    assert not (tmp_path / "first.json").exists()


def test_the_front() -> None:
    scores = [
        score(1.0, 1.0, bits=5.0),
        score(2.0, 2.0, bits=4.5),
        score(2.0, 2.0, bits=4.6),
        score(1.5, 1.5, bits=5.0),
    ]
    assert pareto_front(scores) == [True, True, False, False]
    assert pareto_front([scores[0], replace(scores[0], top1=0.5)]) == [True, True]


def test_trials_survive_their_file(tmp_path: Path) -> None:
    recipe = BEST.override({"allocation": {"target_bpw": 4.5, "factor_bits": (4, 8)}})
    trial = Trial(recipe, Score(4.123456789012345, (0.1, 1 / 3), 0.2, 0.9, 3.0))
    for kept in (trial, Trial(recipe, None, "why")):
        state = State(tmp_path / "state.json", {}, {recipe.digest: kept}, 1.5)
        state.save()
        read = State(state.path, {})
        read.restore(json.loads(state.path.read_bytes()))
        assert read == state
