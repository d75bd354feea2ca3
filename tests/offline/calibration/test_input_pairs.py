# SPDX-License-Identifier: Apache-2.0
"""The inputs of both models side by side, and what a weight aims at."""

from pathlib import Path

import pytest
import torch
from torch import nn

from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.cross_moment import CrossMoment
from svsk_offline.calibration.input_pairs import InputPairs, replaced_weights
from svsk_offline.calibration.stages import Stage
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.pipeline import quantize
from svsk_offline.quantizers.aimed_weight import Aim, aims
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import Checkpoint
from tests.offline.test_architectures import logits_of, sample_tokens
from tests.support.tiny_models import EXPERT_FAMILIES, write_dense

CPU = torch.device("cpu")


@pytest.fixture
def plain_recipe() -> Recipe:
    """Error feedback on a handful of short samples; no sidecar, so that there is an error."""
    return load_recipe("fast").override(
        {
            "tables": {"head": "dense", "embedding": "dense"},
            "calibration": {"samples": 24, "seq_len": 32},
            "sidecar": {"rank": 0},
        }
    )


def runner_of(source: ModelSource, *, held_out: int = 1) -> BlockRunner:
    texts = CalibrationSet(sample_tokens(6, 32), "test", "0")
    return BlockRunner(source, texts, CPU, torch.float32, held_out=held_out)


def loaded(source: ModelSource, index: int) -> nn.Module:
    name, blocks = source.blocks
    source.load(blocks[index], f"{name}.{index}.", torch.float32, CPU)
    return blocks[index]


def paired_tokens(
    draw: torch.Generator, samples: int, k: int, *, turned: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's inputs in the dense and in the quantised model, float32 [samples, 40, k].

    Channels of the second carry ``turned`` times what the channel two before lacks.
    """
    dense = torch.randn(samples, 40, k, generator=draw)
    noise = 0.2 * torch.randn(samples, 40, k, generator=draw)
    return dense, 0.9 * dense + noise + 0.2 * turned * dense.roll(2, -1)


def aim_of(
    weight: torch.Tensor,
    fitted: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    counts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    *,
    sink: float = 0.0,
    most: float = 1.0,
) -> Aim:
    k = weight.shape[1]
    other = weight[:1] + 1
    second, moments = [], []
    for (dense, given), count in zip((fitted, held_out), counts, strict=True):
        second.append(InputStatistics(k, CPU, full=True, first=True))
        whole = CrossMoment({"other": other, "one": weight}, first=True)
        moments.append(moments[0].empty() if moments else whole)
        for part in (slice(0, 2), slice(2, None)):
            own = None if count is None else count[part]
            second[-1].add(given[part], own)
            moments[-1].add(dense[part], given[part], own)
    missing, unseen = ({"one": moment.product("one", sink)} for moment in moments)
    found = aims({"one": weight}, missing, unseen, *second, most=most, sink_weight=sink)
    return found["one"]


@pytest.mark.parametrize("sink", [0.0, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [7, 4])
def test_an_aim_has_the_least_error_on_tokens_that_are_held_out(
    sink: float, weighted: bool, n: int
) -> None:
    """Over ridge regressions solved from the tokens themselves, in float64, and all shares.

    Of 4 outputs, and one of another linear, the moments are of outputs, not of inputs.
    """
    draw = torch.Generator().manual_seed(0)
    k = 12
    texts = [paired_tokens(draw, samples, k) for samples in (5, 3)]
    weight = torch.randn(n, k, generator=draw)
    counts = [
        torch.rand(len(dense), 40, generator=draw) if weighted else None for dense, _ in texts
    ]
    aim = aim_of(weight, *texts, (counts[0], counts[1]), sink=sink)

    rooted = []
    for (dense, given), count in zip(texts, counts, strict=True):
        rows = torch.ones(len(dense), 40) if count is None else count.clone()
        rows /= rows.sum()
        rows[:, 0] += sink / len(dense)
        root = rows.double().flatten().sqrt()[:, None]
        rooted.append((root * dense.flatten(0, 1).double(), root * given.flatten(0, 1).double()))
    (dense, given), (unseen_dense, unseen) = rooted
    plain = texts[0][1].double() * (
        1 if counts[0] is None else counts[0].double().sqrt()[..., None]
    )
    mean = plain.square().sum() / (200 if counts[0] is None else counts[0].sum()) / k
    errors = {}
    for damping in (0.01, 0.1, 1.0):
        damped = given.T @ given + damping * mean * torch.eye(k)
        whole = torch.linalg.solve(damped, given.T @ (dense - given)).T
        for share in torch.linspace(0, 1, 101).tolist():
            fitted = weight.double() + share * weight.double() @ whole
            missed = (unseen_dense @ weight.T.double() - unseen @ fitted.T).square().sum()
            errors[damping, share] = float(missed)
    best = min(errors, key=lambda key: errors[key])
    assert best[1] > 0
    assert aim.share == pytest.approx(best[1], abs=0.006)
    reached = (unseen_dense @ weight.T.double() - unseen @ aim.weight.T.double()).square().sum()
    assert float(reached) <= errors[best] * (1 + 1e-5)
    assert float(reached) < 0.9 * errors[best[0], 0.0]


def test_what_does_not_hold_on_other_tokens_is_not_taken() -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 12, generator=draw)
    fitted = paired_tokens(draw, 5, 12)
    aim = aim_of(weight, fitted, (fitted[1], fitted[0]))
    assert aim.share == 0
    assert torch.equal(aim.weight, weight)


def test_no_more_than_the_largest_share_is_taken() -> None:
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(7, 12, generator=draw)
    fitted = paired_tokens(draw, 5, 12)
    whole = aim_of(weight, fitted, fitted)
    assert whole.share > 0.9
    assert aim_of(weight, fitted, fitted, most=0.25).share == 0.25


def test_where_both_models_read_the_same_a_weight_aims_at_itself() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 20, 8, generator=draw)
    weight = torch.randn(4, 8, generator=draw)
    aim = aim_of(weight, (inputs, inputs), (inputs, inputs))
    assert aim.share == 0
    assert torch.equal(aim.weight, weight)


def test_inputs_are_those_behind_the_weights_that_were_replaced(
    tmp_path: Path, tiny_llama: Path
) -> None:
    source = ModelSource(tiny_llama)
    runner = runner_of(source)
    block = loaded(source, 0)
    draw = torch.Generator().manual_seed(3)
    value, out = (block.get_parameter(f"self_attn.{name}.weight") for name in ("v_proj", "o_proj"))
    kept = value.data
    other = {"self_attn.v_proj": kept + 0.1 * torch.randn(kept.shape, generator=draw)}
    pairs = InputPairs(runner)
    stage = Stage(("self_attn.o_proj",), paired=True)
    pairs.advance(0, block, [stage])
    linears = {"self_attn.o_proj": out.data.float()}
    statistics, pair = pairs.gather(0, block, linears, other)["self_attn.o_proj"]
    assert value.data_ptr() == kept.data_ptr()

    inputs: list[torch.Tensor] = []
    hook = block.get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda module, given: inputs.append(given[0].flatten(0, 1))
    )
    for weights in ({}, other):
        with replaced_weights(block, weights), torch.no_grad():
            for sample in runner.hidden:
                runner.forward(0, block, sample[None])
    hook.remove()
    half = len(inputs) // 2
    fitted = half - runner.held_out
    for part, second, cross in (
        (slice(0, fitted), statistics, pair.fitted),
        (slice(fitted, half), pair.second, pair.held_out),
    ):
        dense, given = torch.cat(inputs[:half][part]), torch.cat(inputs[half:][part])
        assert torch.allclose(second.hessian, given.T @ given / len(given), atol=1e-5)
        wanted = out.data.float() @ ((dense - given).T @ given / len(given))
        assert wanted.abs().max() > 1e-4
        assert torch.allclose(cross.product("self_attn.o_proj"), wanted, atol=1e-6)


def test_the_model_ends_nearer_to_the_dense_one(
    tmp_path: Path, tiny_llama: Path, plain_recipe: Recipe
) -> None:
    texts = CalibrationSet(sample_tokens(32, 64), "test", "0")
    wanted = logits_of(tiny_llama)
    missed = []
    for aim in (0.0, 1.0):
        recipe = plain_recipe.override({"alternating": {"aim": aim}})
        out = tmp_path / str(aim)
        quantize(tiny_llama, out, recipe, calibration=texts)
        missed.append(float((logits_of(out) - wanted).square().mean()))
    assert missed[1] < 0.98 * missed[0]


def test_every_expert_is_quantised_in_stages(tmp_path: Path, plain_recipe: Recipe) -> None:
    dense = write_dense(tmp_path / "dense", EXPERT_FAMILIES["qwen3_moe"])
    linears = []
    for aim in (0.0, 1.0):
        recipe = plain_recipe.override({"alternating": {"aim": aim}})
        result = quantize(dense, tmp_path / str(aim), recipe)
        linears.append([layer.name for layer in result.layers])
        routed = [one.routed_tokens for one in result.layers if ".experts." in one.name]
        assert all(count is not None for count in routed)
    assert set(linears[0]) == set(linears[1])
    checkpoint = Checkpoint(tmp_path / "1.0")
    assert set(checkpoint.linears) == set(linears[1])
