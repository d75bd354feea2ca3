# SPDX-License-Identifier: Apache-2.0
"""``svsk tune`` on a tiny model.

What is held out, what is chosen and written, what a killed run leaves.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import svsk_eval.tune.tune as tune_module
import svsk_offline.planning.measurements as measurements_module
from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.tune.held_out import split_calibration
from svsk_eval.tune.search import SEARCHED, Step
from svsk_eval.tune.trials import is_better
from svsk_eval.tune.tune import TuneProgress, TuneResult, tune
from svsk_offline.calibration import CalibrationSet, load_calibration
from svsk_offline.calibration.text import token_fingerprint
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from tests.offline.folders import folder_bytes
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_dense

SMALL = {
    "calibration": {"samples": 24, "seq_len": 32},
    "sidecar": {"rank": 4, "tile_m": 0, "tile_n": 0},
}


def drawn(*rows: int) -> CalibrationSet:
    tokens = torch.tensor(rows).unsqueeze(1).expand(len(rows), 8).contiguous()
    return CalibrationSet(tokens, "text", "")


@pytest.mark.parametrize(("count", "held_out"), [(20, 4), (7, 6), (33, 2), (5, 3)])
def test_the_split_shares_nothing_and_covers_the_text(count: int, held_out: int) -> None:
    training, held = (
        part.tokens[:, 0].tolist() for part in split_calibration(drawn(*range(count)), held_out)
    )
    assert len(held) == held_out
    assert sorted(training + held) == list(range(count))
    assert training == sorted(training)
    gaps = [b - a for a, b in zip([-1, *held], [*held, count], strict=True)]
    assert max(gaps) <= math.ceil(count / held_out) + 1


def test_a_repeated_piece_is_not_held_out() -> None:
    training, held = split_calibration(drawn(1, 2, 1, 3, 4, 2, 5), 2)
    assert set(held.tokens[:, 0].tolist()) <= {3, 4, 5}
    assert len(training.tokens) == 5
    assert training.fingerprint == token_fingerprint(training.tokens) != held.fingerprint
    with pytest.raises(EvalError, match="3 of 7 pieces occur once, too few to hold out 4"):
        split_calibration(drawn(1, 2, 1, 3, 4, 2, 5), 4)
    with pytest.raises(EvalError, match="calibrate with others"):
        split_calibration(drawn(1, 2), 2)


# The whole, on a tiny model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search two parameters, so that it converges within a few trials."""
    chosen = [parameter for parameter in SEARCHED if parameter.key in ("damping", "row_power")]
    ladders = {"damping": (0.01, 0.1), "row_power": (0.0, 0.5)}
    short = tuple(replace(parameter, ladder=ladders[parameter.key]) for parameter in chosen)
    monkeypatch.setattr("svsk_eval.tune.search.SEARCHED", short)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recipe]]:
    """Recipes given to ``quantize``."""
    calls: list[Recipe] = []

    def counted(model: Path, out: Path, recipe: Recipe, **options: Any) -> Any:
        calls.append(recipe)
        return quantize(model, out, recipe, **options)

    monkeypatch.setattr(tune_module, "quantize", counted)
    return calls


def small(**sections: dict[str, Any]) -> Recipe:
    return load_recipe("fast").override(SMALL).override(sections)


def run_tune(dense: Path, out: Path, recipe: Recipe | None = None, **options: Any) -> TuneResult:
    return tune(dense, out, recipe or small(), **{"held_out": 4, **options})


@pytest.mark.usefixtures("few_values")
def test_the_result_is_never_worse_than_the_default(
    dense: Path, tmp_path: Path, quantized: list[Recipe]
) -> None:
    out = tmp_path / "tuned.yaml"
    steps: list[Step] = []
    result = run_tune(dense, out, progress=TuneProgress(step=steps.append))
    assert result.converged
    assert len(quantized) == len(result.trials) == len(steps) >= 3
    assert result.chosen.score is not None
    assert result.default.score is not None
    assert quantized[0].digest == result.default.recipe.digest == small().digest
    assert result.chosen.score.kl <= result.default.score.kl
    changed = result.chosen.recipe.digest != result.default.recipe.digest
    assert is_better(result.chosen.score, result.default.score) == changed
    # The recipe file is the chosen recipe.
    written = load_recipe(str(out))
    assert written == result.recipe
    assert written.digest == result.chosen.recipe.digest
    assert (written.name, written.calibration.samples, written.calibration.seq_len) == (
        "tuned",
        24,
        32,
    )
    for found in (result.chosen.score, result.default.score):
        assert f"{found.kl:.5f} ± {found.kl_se:.5f}" in written.description
        assert f"{found.kl:.5f}" in out.read_text().splitlines()[0]
    # Nothing is left but the state and what was measured.
    left = {path.name for path in (tmp_path / "tuned.yaml.tune").iterdir()}
    assert left == {"svsk-tune.json", "measured"}


def test_a_trial_scores_what_its_checkpoint_gives_on_the_held_out_pieces(
    dense: Path, tmp_path: Path
) -> None:
    from svsk_eval.text.models import load_model
    from svsk_eval.text.scoring import compare_models

    result = run_tune(dense, tmp_path / "tuned.yaml", budget_minutes=1e-9)
    assert not result.converged
    source = ModelSource(dense)
    training, held = split_calibration(load_calibration("default", source.tokenizer, 28, 32, 0), 4)
    rows = {tuple(row) for row in training.tokens.tolist()}
    assert not any(tuple(row) in rows for row in held.tokens.tolist())
    made = quantize(dense, tmp_path / "out", small(), calibration=training)
    scores = compare_models(load_model(tmp_path / "out"), load_model(dense), held.tokens)
    assert result.chosen.score is not None
    assert result.chosen.score.bits_per_weight == made.bits_per_weight
    assert result.chosen.score.chunk_kl == scores.per_chunk.kl
    assert result.chosen.score.kl == pytest.approx(scores.kl_mean)
    assert result.chosen.score.kl_se == pytest.approx(scores.kl_mean_se)
    assert (result.chosen.score.top1, result.chosen.score.delta_nll) == (
        scores.top1,
        scores.delta_nll,
    )


@pytest.mark.usefixtures("few_values")
def test_a_killed_run_goes_on(
    dense: Path, tmp_path: Path, quantized: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tune(dense, tmp_path / "whole.yaml")
    expected = [recipe.digest for recipe in quantized]
    quantized.clear()
    load = tune_module.load_model

    def killed(path: Path, *options: Any, **named: Any) -> Any:
        if len(quantized) == 2 and path != dense:
            raise KeyboardInterrupt
        return load(path, *options, **named)

    monkeypatch.setattr(tune_module, "load_model", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tune(dense, tmp_path / "again.yaml")
    monkeypatch.setattr(tune_module, "load_model", load)
    assert not (tmp_path / "again.yaml").exists()
    leftover = (
        tmp_path / "again.yaml.tune" / "svsk-tune-trial.partial"
    )  # as a kill that Python does not see leaves it
    leftover.mkdir()
    (leftover / "block-00000.safetensors").write_bytes(b"half")
    result = run_tune(dense, tmp_path / "again.yaml")
    assert not leftover.exists()
    # The second trial was under way, so it is the only one that is repeated.
    assert [recipe.digest for recipe in quantized] == [*expected[:2], *expected[1:]]
    assert result.recipe.digest == whole.recipe.digest
    assert result.chosen.score is not None
    assert whole.chosen.score is not None
    assert result.chosen.score.chunk_kl == whole.chosen.score.chunk_kl
    # A third run has nothing to do, and loads no model.
    monkeypatch.setattr(tune_module, "load_model", None)
    third = run_tune(dense, tmp_path / "again.yaml", overwrite=True)
    assert third.recipe == result.recipe
    assert third.trials == result.trials


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per sweep of gradients."""
    calls: list[int] = []
    sweep = measurements_module.sweep_gradients

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        sweep(*arguments, **options)

    monkeypatch.setattr(measurements_module, "sweep_gradients", counted)
    return calls


def test_trials_measure_once_and_give_what_they_give_alone(
    dense: Path, tmp_path: Path, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that was killed in its second trial does not measure again when it goes on."""
    ladders: dict[str, tuple[Any, ...]] = {"rounds": (1, 2), "damping": (0.01, 0.1)}
    short = tuple(replace(p, ladder=ladders[p.key]) for p in SEARCHED if p.key in ladders)
    monkeypatch.setattr("svsk_eval.tune.search.SEARCHED", short)
    made: list[tuple[Recipe, dict[str, bytes], CalibrationSet]] = []

    def watched(model: Path, out: Path, recipe: Recipe, **options: Any) -> Any:
        if len(made) == 1 and not killed:
            killed.append(recipe)
            raise KeyboardInterrupt
        result = quantize(model, out, recipe, **options)
        made.append((recipe, folder_bytes(out), options["calibration"]))
        return result

    killed: list[Recipe] = []
    monkeypatch.setattr(tune_module, "quantize", watched)
    recipe = small(gradients={"row_power": 1.0}, allocation={"target_bpw": 5.5, "ranks": (0, 2, 4)})
    with pytest.raises(KeyboardInterrupt):
        run_tune(dense, tmp_path / "tuned.yaml", recipe)
    result = run_tune(dense, tmp_path / "tuned.yaml", recipe)
    assert result.converged
    dampings = {made_by.model_dump()["alternating"]["damping"] for made_by, *_ in made}
    assert len(made) >= 3
    assert len(sweeps) == len(dampings) == 2
    for number, (chosen, files, texts) in enumerate(made):
        alone = tmp_path / str(number)
        quantize(dense, alone, chosen, calibration=texts)
        assert folder_bytes(alone) == files


def test_the_target_is_kept(dense: Path, tmp_path: Path) -> None:
    recipe = small(
        allocation={"target_bpw": 5.5, "ranks": (0, 2, 4)},
        sidecar={"rank": 4},
    )
    result = run_tune(dense, tmp_path / "tuned.yaml", recipe, budget_minutes=1e-9)
    assert result.chosen.score is not None
    assert result.chosen.score.bits_per_weight <= 5.5
    assert load_recipe(str(result.out)).target_bpw == 5.5


def test_another_search_is_refused(dense: Path, tmp_path: Path, quantized: list[Recipe]) -> None:
    out, state = tmp_path / "tuned.yaml", tmp_path / "tuned.yaml.tune" / "svsk-tune.json"
    options: dict[str, Any] = {"budget_minutes": 1e-9}
    run_tune(dense, out, **options)
    out.unlink()
    other = write_dense(tmp_path / "other", "qwen2")
    for another, named in (
        ({"model": other}, "another model, files"),
        ({"held_out": 5}, "another calibration"),
        ({"dtype": "float16"}, "another dtype"),
        ({"recipe": small(alternating={"rounds": 2})}, "another recipe"),
        ({"recipe": small(calibration={"seed": 1})}, "another calibration, recipe"),
    ):
        arguments = {"model": dense, "recipe": small(), "held_out": 4, **another}
        model, recipe = arguments.pop("model"), arguments.pop("recipe")
        with pytest.raises(
            EvalError, match=f"of another search, with {named}. Delete it.* --overwrite"
        ):
            tune(model, out, recipe, **arguments, **options)
    assert len(quantized) == 1
    edit_json(
        state, lambda raw: next(iter(raw["trials"].values()))["recipe"]["sink"].update(weight=3.0)
    )
    with pytest.raises(
        EvalError,
        match=r"damaged, or of another version .a recipe that is not the one of its digest",
    ):
        run_tune(dense, out, **options)
    state.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        run_tune(dense, out, **options)
    assert len(quantized) == 1
    result = run_tune(dense, out, **options, overwrite=True)
    assert (len(quantized), len(result.trials)) == (2, 1)


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.mark.usefixtures("few_values")
def test_the_command(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"
    small_options = [
        "--recipe",
        "fast",
        "--tile-m",
        0,
        "--tile-n",
        0,
        "--samples",
        24,
        "--seq-len",
        32,
    ]
    arguments = ["tune", dense, out, *small_options, "--held-out", 4, "--codebook", "quad8"]
    result = svsk(*arguments)
    assert result.exit_code == 0, result.output
    for shown in (
        "trial   1  default: ",
        "trial   2  gradients.row_power 0.5: ",
        "to beat",
        "KL ± se",
        "→",
        "wrote ",
    ):
        assert shown in result.output
    assert re.search(
        r"\d trials in 0\.\d min; a sweep over all parameters brought nothing more", result.output
    )
    assert load_recipe(str(out)).weights.codebook == "quad8"
    assert (
        svsk(*arguments).output
        == f"error: {out} exists. Choose another file, or pass --overwrite to replace it.\n"
    )
    again = svsk(*arguments, "--overwrite")
    assert again.exit_code == 0
    assert "Known from earlier runs: " in again.output
    assert "trial   1" not in again.output


def test_errors_come_before_any_work(dense: Path, tmp_path: Path, quantized: list[Recipe]) -> None:
    out = tmp_path / "tuned.yaml"
    (tmp_path / "file").write_text("a few words")
    (tmp_path / "notes.yaml").write_text("a few words")
    for arguments, message in (
        ([tmp_path / "tuned.json"], "expected a name ending in .yaml"),
        ([tmp_path / "no" / "tuned.yaml"], "its folder does not exist"),
        ([out, "--held-out", 1], "--held-out is 1, expected 2 or more"),
        ([out, "--budget-minutes", 0], "--budget-minutes is 0.0, expected more than 0"),
        ([tmp_path / "notes.yaml", "--overwrite"], "holds something that is not a recipe, so"),
        (
            [out, "--work-dir", tmp_path / "file"],
            "--work-dir FILE: is a file, expected a folder to write",
        ),
        ([out, "--work-dir", dense], "overlaps the model"),
        ([out, "--target-bpw", 3], "allocation.target_bpw: expected more than 4"),
        (
            [out, "--target-bpw", 4.5, "--recipe", "published"],
            "allocation: goes with method alternating only",
        ),
        (
            [out, "--dtype", "float32"],
            "--dtype float32: expected one of these: auto, bfloat16",
        ),
        ([out, "--calibration", tmp_path / "no.txt"], "no such file"),
        ([out, "--calibration", tmp_path / "file", "--samples", 2], "18 samples are asked for"),
    ):
        result = svsk("tune", dense, *arguments)
        assert result.exit_code == 1, arguments
        assert message.replace("FILE", str(tmp_path / "file")) in result.output
        assert result.output.count("error:") == 1
    assert quantized == []
    assert not out.exists()
    assert svsk("tune", tmp_path / "no", out).exit_code == 1
