# SPDX-License-Identifier: Apache-2.0
"""Samples that nothing is fitted to: which they are, and the errors measured on them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, CalibrationSet
from svsk_offline.calibration.held_out import held_out_last
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.layer_report import REPORT_NAME
from svsk_vllm.format import Checkpoint
from svsk_vllm.format.files import read_json


def samples(count: int, tokens: int = 32) -> CalibrationSet:
    generator = torch.Generator().manual_seed(count)
    return CalibrationSet(torch.randint(0, 200, (count, tokens), generator=generator), "random", "")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, []), (2, [1]), (7, [6]), (8, [7]), (15, [7]), (24, [7, 15, 23])],
)
def test_every_eighth_sample_is_held_out(count: int, expected: list[int]) -> None:
    texts = samples(count)
    split, held = held_out_last(texts)
    rest = [index for index in range(count) if index not in expected]
    assert held == len(expected)
    assert torch.equal(split.tokens, texts.tokens[rest + expected])


def test_batches_do_not_mix_the_kinds(tiny_llama: Path) -> None:
    runner = BlockRunner(
        ModelSource(tiny_llama),
        samples(11),
        torch.device("cpu"),
        torch.float32,
        batch_tokens=96,
        held_out=4,
    )
    fitted, held = (list(runner.batches(which)) for which in ("fitted", "held out"))
    assert fitted == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert held == [slice(7, 10), slice(10, 11)]
    assert list(runner.batches()) == fitted + held


def test_what_is_held_out_is_not_fitted(tmp_path: Path, tiny_llama: Path) -> None:
    """Other held-out samples change the reports and not a bit of what is stored.

    Without an aim: they decide how much of it is taken.
    """
    recipe = load_recipe("best").override(
        {
            "sidecar": {"rank": 4},
            "allocation": {"target_bpw": 6.0, "ranks": (0, 4)},
            "alternating": {"aim": 0.0},
        }
    )
    texts = samples(9)
    tokens = texts.tokens.clone()
    tokens[7] = samples(1).tokens[0]
    results = [
        quantize(tiny_llama, tmp_path / name, recipe, calibration=given)
        for name, given in (("a", texts), ("b", dataclasses.replace(texts, tokens=tokens)))
    ]
    stored = [
        {name: linear.to_tensors() for name, linear in Checkpoint(tmp_path / folder).iter_linears()}
        for folder in ("a", "b")
    ]
    assert stored[0].keys() == stored[1].keys()
    for name, tensors in stored[0].items():
        assert tensors.keys() == stored[1][name].keys()
        assert all(torch.equal(tensor, stored[1][name][key]) for key, tensor in tensors.items())
    errors = [[layer.error for layer in result.layers] for result in results]
    assert errors[0] != errors[1]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("published", {"calibration": {"sequential": False}}),
        ("published", {"calibration": {"sequential": True}}),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_single_sample_is_fitted_and_said_to_be(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_recipe: Recipe,
    count: int,
    recipe: str,
    changes: Mapping[str, Any],
) -> None:
    base = tiny_recipe if recipe == "published" else load_recipe(recipe)
    result = quantize(
        tiny_llama, tmp_path / "out", base.override(changes), calibration=samples(count)
    )
    assert {layer.held_out_tokens for layer in result.layers} == {0 if count == 1 else 32}
    assert all(0 < layer.error < layer.base_error < 0.1 for layer in result.layers)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("that were fitted" in card) == (count == 1)


def test_aims_are_decided_on_samples_that_are_held_out(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = load_recipe("fast").override({"alternating": {"aim": 1.0}})
    wanted = "decided on samples that are held out, but there is 1 calibration sample"
    with pytest.raises(SvskError, match=wanted):
        quantize(tiny_llama, tmp_path / "one", recipe, calibration=samples(1))
    result = quantize(tiny_llama, tmp_path / "two", recipe, calibration=samples(2))
    assert {layer.held_out_tokens for layer in result.layers} == {32}
    shares = [layer.aim_share for layer in result.layers]
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    stored = read_json(tmp_path / "two" / REPORT_NAME)["matrices"]
    assert [stored[layer.name]["aim_share"] for layer in result.layers] == shares
