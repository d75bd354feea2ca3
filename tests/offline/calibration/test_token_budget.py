# SPDX-License-Identifier: Apache-2.0
"""How many samples a run takes, and what is said of too few."""

from pathlib import Path
from typing import Any

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline import pipeline
from svsk_offline.calibration import token_budget
from svsk_offline.calibration.token_budget import sample_count
from svsk_offline.pipeline import Progress, load_texts, quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import Checkpoint

WIDEST = 384  # inputs of the tiny models' down_proj


@pytest.fixture
def source(tiny_llama: Path) -> ModelSource:
    return ModelSource(tiny_llama)


def recipe(name: str = "fast", **calibration: Any) -> Recipe:
    return load_recipe(name).override({"calibration": {"seq_len": 32, **calibration}})


@pytest.mark.parametrize(
    ("least", "count", "line"),
    [
        (1000, 500, "500 samples of 32 tokens = 16,000 tokens, 41.7 per input"),
        (300, 192, "192 samples of 32 tokens = 6,144 tokens, 16.0 per input"),
        (386, 193, "193 samples of 32 tokens = 6,176 tokens, 16.1 per input"),
    ],
)
def test_enough_for_the_widest_layer(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, least: int, count: int, line: str
) -> None:
    monkeypatch.setattr(token_budget, "_LEAST_WIDTH", least)
    told: list[str] = []
    assert sample_count(source, recipe(), told.append, "text.txt") == count
    assert told == [f"Calibration: text.txt, {line} of the widest layer (K = {WIDEST})"]


@pytest.mark.usefixtures("few_tokens")
def test_a_recipe_that_asks_for_more(source: ModelSource) -> None:
    told: list[str] = []
    assert sample_count(source, recipe(tokens_per_input=32), told.append, "text") == 384
    assert "32.0 per input" in told[0]


def test_what_is_ignored_does_not_count(source: ModelSource) -> None:
    told: list[str] = []
    ignoring = recipe(samples=8).override({"ignore": (r"re:.*\.down_proj$",)})
    assert sample_count(source, ignoring, told.append, "text") == 8
    assert "2.0 per input of the widest layer (K = 128)" in told[0]
    with pytest.raises(SvskError, match="llama: every linear layer is on the ignore list; nothing"):
        sample_count(source, recipe().override({"ignore": ("re:.*",)}), told.append, "text")


def test_the_users_number_is_warned_about_and_refused(source: ModelSource) -> None:
    told: list[str] = []
    assert sample_count(source, recipe(samples=48), told.append, "text") == 48
    assert len(told) == 1
    assert sample_count(source, recipe(samples=47), told.append, "text") == 47
    assert told[2].startswith("Warning: 47 samples of 32 tokens = 1,504 tokens: 3.9 tokens per")
    assert told[2].endswith("192 samples are recommended: leave --samples out.")
    assert sample_count(source, recipe(samples=24), told.append, "text") == 24
    with pytest.raises(
        SvskError,
        match=r"23 samples of 32 tokens = 736 .*\.down_proj.* Expected 24 samples or more",
    ):
        sample_count(source, recipe(samples=23), told.append, "text")
    # The original method has no Hessian to be spoilt.
    assert sample_count(source, recipe("published", samples=1), told.append, "text") == 1


def test_a_run_is_refused_before_it_draws_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_calibration", None)  # calling it would be a TypeError
    with pytest.raises(SvskError, match=r"Expected 24 samples or more; 192 are recommended"):
        quantize(tiny_llama, tmp_path / "out", recipe(samples=4))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_tokens")
def test_a_text_that_holds_less_than_is_wanted(source: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("qz" * 600)
    told: list[str] = []
    drawn = load_texts(source, str(path), recipe(), False, told.append)
    assert drawn.tokens.shape == (37, 32)
    assert told[1] == (
        "Warning: the calibration text holds 37 samples of 32 tokens, 192 are wanted. These 1,184"
        " tokens are used, 3.1 per input of the widest layer. More text gives a better checkpoint."
    )
    path.write_text("qz" * 300)
    with pytest.raises(
        SvskError, match=r"^The calibration text holds 18 samples .* Expected 24 samples or more"
    ):
        load_texts(source, str(path), recipe(), False, told.append)
    # A number of the user's is not lowered.
    with pytest.raises(SvskError, match="18 pieces of 32; 24 samples are asked for"):
        load_texts(source, str(path), recipe(samples=24), False, told.append)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A least width that tiny models' widest layers are above of."""
    monkeypatch.setattr(token_budget, "_LEAST_WIDTH", 4)


@pytest.mark.usefixtures("few_tokens")
def test_a_run_with_a_number_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """The recipe stays the shipped one, the checkpoint says how many samples it took."""
    told: list[str] = []
    chosen = recipe().override({"sidecar": {"rank": 0}})
    quantize(tiny_llama, tmp_path / "out", chosen, progress=Progress(message=told.append))
    assert any("192 samples of 32 tokens = 6,144 tokens, 16.0 per input" in line for line in told)
    producer = Checkpoint(tmp_path / "out").config.producer
    assert producer["recipe_hash"] == chosen.digest
    assert "samples" not in producer["recipe_values"]["calibration"]
    assert producer["calibration"]["samples"] == 192
    assert producer["calibration"]["source"] == "default"
