# SPDX-License-Identifier: Apache-2.0
"""Stages of a block, the inputs of both models side by side, and what a weight aims at."""

from pathlib import Path

import pytest
import torch
from torch import nn

from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.cross_moment import CrossMoment
from svsk_offline.calibration.input_pairs import InputPairs, Stage, replaced_weights
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.pipeline import quantize
from svsk_offline.quantizers.aimed_weight import aimed_weight
from svsk_offline.quantizers.hessian import ColumnOrder
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


@pytest.mark.parametrize("sink", [0.0, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_aimed_weight_is_the_least_squares_fit_to_the_dense_outputs(
    sink: float, weighted: bool
) -> None:
    """By solving for it from the tokens themselves, in float64."""
    draw = torch.Generator().manual_seed(0)
    samples, tokens, k, n = 5, 40, 12, 7
    dense = torch.randn(samples, tokens, k, generator=draw)
    given = dense + 0.3 * torch.randn(samples, tokens, k, generator=draw) + 0.1 * dense.roll(1, 2)
    weight = torch.randn(n, k, generator=draw)
    counts = torch.rand(samples, tokens, generator=draw) if weighted else None
    statistics = InputStatistics(k, CPU, full=True, first=True)
    cross = CrossMoment(k, CPU, first=True)
    for part in (slice(0, 2), slice(2, 5)):
        own = None if counts is None else counts[part]
        statistics.add(given[part], own)
        cross.add(dense[part], given[part], own)
    order = ColumnOrder.of(statistics.hessian + sink * statistics.first_hessian)
    aimed = aimed_weight(weight, cross, order, 1.0, sink)

    rows = torch.ones(samples, tokens) if counts is None else counts.clone()
    rows /= rows.sum()
    rows[:, 0] += sink / samples
    root = rows.double().flatten().sqrt()[:, None]
    fit = torch.linalg.lstsq(
        root * given.double().flatten(0, 1), root * (dense.flatten(0, 1) @ weight.T).double()
    )
    assert torch.allclose(aimed, fit.solution.T.float(), atol=2e-4)
    half = aimed_weight(weight, cross, order, 0.5, sink)
    assert torch.allclose(half, (aimed + weight) / 2, atol=1e-6)


def test_where_both_models_read_the_same_a_weight_aims_at_itself() -> None:
    inputs = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))
    statistics, cross = InputStatistics(8, CPU, full=True), CrossMoment(8, CPU)
    statistics.add(inputs)
    cross.add(inputs, inputs)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    order = ColumnOrder.of(statistics.hessian, 0.01)
    assert torch.equal(aimed_weight(weight, cross, order, 1.0), weight)


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down"]]),
        ("qwen2", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down"]]),
    ],
)
def test_linears_of_one_input_are_one_stage(
    tmp_path: Path, family: str, stages: list[list[str]]
) -> None:
    source = ModelSource(write_dense(tmp_path / "dense", family, dtype=torch.float32))
    pairs = InputPairs(runner_of(source))
    found = pairs.stages(0, loaded(source, 0))
    assert [stage.paired for stage in found] == [True] * 4
    for stage, wanted in zip(found, stages, strict=True):
        assert len(stage.names) == len(wanted)
        assert all(end in name for name, end in zip(stage.names, wanted, strict=True))


def test_experts_of_a_layer_are_two_stages(tmp_path: Path) -> None:
    """Gate and up of all experts, those that the first batch does not reach too; then down."""
    dense = write_dense(tmp_path / "dense", EXPERT_FAMILIES["qwen3_moe"], dtype=torch.float32)
    source = ModelSource(dense)
    pairs = InputPairs(runner_of(source))
    found = [stage for stage in pairs.stages(0, loaded(source, 0)) if not stage.paired]
    ends = [{name.rpartition(".")[2] for name in stage.names} for stage in found]
    assert ends == [{"gate_proj", "up_proj"}, {"down_proj"}]
    experts = source.model.config.num_experts
    assert [len(stage.names) for stage in found] == [2 * experts, experts]


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
    statistics, cross = pairs.gather(0, block, stage, other)["self_attn.o_proj"]
    assert value.data_ptr() == kept.data_ptr()
    assert cross is not None

    inputs: list[torch.Tensor] = []
    hook = block.get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda module, given: inputs.append(given[0].flatten(0, 1))
    )
    fitted = runner.hidden[: len(runner.hidden) - runner.held_out]
    for weights in ({}, other):
        with replaced_weights(block, weights), torch.no_grad():
            for sample in fitted:
                runner.forward(0, block, sample[None])
    hook.remove()
    half = len(inputs) // 2
    dense, given = torch.cat(inputs[:half]), torch.cat(inputs[half:])
    assert torch.allclose(statistics.hessian, given.T @ given / len(given), atol=1e-5)
    wanted = out.data.float() @ ((dense - given).T @ given / len(given))
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(cross.product(out.data.float()), wanted, atol=1e-6)


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
