# SPDX-License-Identifier: Apache-2.0
"""Which linears of a block read one input, and gathering them in turns, to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.room import Room
from svsk_offline.calibration.stages import gathered_in_turns, stages_of
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.calibration.turns import turns
from svsk_offline.calibration.way_back import Observed
from svsk_offline.storage.dense_model import ModelSource
from tests.offline.test_architectures import sample_tokens
from tests.support.sweeps import sweep
from tests.support.tiny_models import EXPERT_FAMILIES, write_dense

CPU = torch.device("cpu")


def runner_of(source: ModelSource, *, held_out: int = 1) -> BlockRunner:
    texts = CalibrationSet(sample_tokens(6, 32), "test", "0")
    return BlockRunner(source, texts, CPU, torch.float32, held_out=held_out)


def loaded(source: ModelSource, index: int) -> nn.Module:
    name, blocks = source.blocks
    source.load(blocks[index], f"{name}.{index}.", torch.float32, CPU)
    return blocks[index]


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
    runner = runner_of(source)
    found = stages_of(runner, 0, loaded(source, 0))
    assert [stage.paired for stage in found] == [True] * 4
    for stage, wanted in zip(found, stages, strict=True):
        assert len(stage.names) == len(wanted)
        assert all(end in name for name, end in zip(stage.names, wanted, strict=True))


def test_experts_of_a_layer_are_two_stages(tmp_path: Path) -> None:
    """Gate and up of all experts, those that the first batch does not reach too; then down."""
    dense = write_dense(tmp_path / "dense", EXPERT_FAMILIES["qwen3_moe"], dtype=torch.float32)
    source = ModelSource(dense)
    runner = runner_of(source)
    found = [stage for stage in stages_of(runner, 0, loaded(source, 0)) if not stage.paired]
    ends = [{name.rpartition(".")[2] for name in stage.names} for stage in found]
    assert ends == [{"gate_proj", "up_proj"}, {"down_proj"}]
    experts = source.model.config.num_experts
    assert [len(stage.names) for stage in found] == [2 * experts, experts]


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([3, 3, 3], 6, [["a0", "b0", "a1", "b1"], ["a2", "b2"]]),
        ([3, 3, 3], 9, [["a0", "b0", "a1", "b1", "a2", "b2"]]),
        ([9, 1, 1, 9], 4, [["a0", "b0"], ["a1", "b1", "a2", "b2"], ["a3", "b3"]]),
        ([1, 1], 0, [["a0", "b0"], ["a1", "b1"]]),
        ([], 5, [[]]),
    ],
)
def test_turns_keep_the_order_and_what_belongs_together(
    sizes: list[int], room: int, expected: list[list[str]]
) -> None:
    parts = (((f"a{number}", f"b{number}"), size) for number, size in enumerate(sizes))
    assert turns(parts, room) == expected


def same(one: InputStatistics, other: InputStatistics) -> None:
    assert one.tokens == other.tokens
    assert torch.equal(one.hessian, other.hessian)


def source_of(family: str, folder: Path) -> ModelSource:
    """A model; of a mixture, one whose experts are thin, and some of them idle."""
    described: Any = EXPERT_FAMILIES.get(family, family)
    return ModelSource(write_dense(folder, described, dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_turns_give_the_bits_of_one_pass(tmp_path: Path, family: str, weighted: bool) -> None:
    source = source_of(family, tmp_path / "dense")
    index = len(source.blocks[1]) - 1
    names = [name for name, _, _ in source.linears(index)]
    weights = None
    if weighted:  # two weightings among linears of one input
        draw = torch.Generator().manual_seed(5)
        kinds = [torch.rand(6, 32, generator=draw) + 0.1 for _ in range(2)]
        weights = {name: kinds[number % 2] for number, name in enumerate(names)}
    asked: dict[str, Any] = {"full": True, "first": names[:1], "weights": weights}
    runners = [runner_of(source) for _ in range(2)]
    for runner in runners:
        for before in range(index):
            runner.advance(before, loaded(source, before))
    block = loaded(source, index)
    whole = runners[0].collect(index, block, names=names, **asked)
    seen: list[list[str]] = []
    for statistics in gathered_in_turns(runners[1], index, block, names, 1, **asked):
        seen.append([*statistics])
        for name, one in statistics.items():
            same(one, whole[name])
            if name == names[0]:
                assert torch.equal(one.first_hessian, whole[name].first_hessian)
    assert len(seen) > 3
    assert sorted(name for turn in seen for name in turn) == sorted(names)
    fitted = slice(0, 5)  # the outputs of the last turn, as those of one pass
    assert torch.equal(runners[0].hidden[fitted], runners[1].hidden[fitted])


def test_a_turn_holds_no_more_than_its_room(tmp_path: Path) -> None:
    """Linears of one input count once, and an input whose first tokens are kept apart twice."""
    source = source_of("llama", tmp_path / "dense")
    runner = runner_of(source)
    block = loaded(source, 0)
    names = [name for name, _, _ in source.linears(0)]
    wide = max(block.get_parameter(f"{name}.weight").shape[1] for name in names)
    for room, first in ((4 * wide**2, []), (8 * wide**2, names)):
        asked: dict[str, Any] = {"full": True, "first": first, "advance": False}
        found = list(gathered_in_turns(runner, 0, block, names, room, **asked))
        assert 1 < len(found) < len(names)
        for statistics in found:
            kept = {id(one): one for one in statistics.values()}.values()
            assert sum(4 * one.hessian.numel() * (2 if first else 1) for one in kept) <= room


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_sweep_in_turns_gives_the_same_bits(tmp_path: Path, family: str) -> None:
    source = source_of(family, tmp_path / "dense")
    texts = CalibrationSet(sample_tokens(6, 32), "test", "0")

    def swept(room: Room) -> tuple[dict[str, tuple[Any, ...]], list[torch.Tensor], int]:
        found: dict[str, tuple[Any, ...]] = {}
        gradients: list[torch.Tensor] = []
        visits = 0

        def visit(index: int, block: nn.Module, observed: Observed) -> None:
            nonlocal visits
            visits += 1
            for name in observed.names:
                given = observed.gradients[name]
                found[f"{index}.{name}"] = (
                    given.rows.clone(),
                    given.tokens.clone(),
                    *(one and one.hessian.clone() for one in (given.fitted, given.held_out)),
                    observed.fitted[name].hessian.clone(),
                    name in observed.held_out and observed.held_out[name].hessian.clone(),
                )

        sweep(
            source,
            texts,
            visit,
            held_out=2,
            room=room,
            scratch=tmp_path,
            passed=lambda index, gradient: gradients.append(gradient.clone()),
        )
        return found, gradients, visits

    whole, expected, visits = swept(Room(1 << 30, None))
    apart, gradients, more = swept(Room(0, 1))
    assert visits == len(source.blocks[1])
    assert more == len(whole), "each linear has a turn of its own"
    assert apart.keys() == whole.keys()
    for name, values in whole.items():
        for one, other in zip(values, apart[name], strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), name
            else:
                assert one is other, name
    assert len(gradients) == len(expected)
    assert all(map(torch.equal, gradients, expected))
