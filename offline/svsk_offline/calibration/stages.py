# SPDX-License-Identifier: Apache-2.0
"""Which linears of a block read one input, in the order in which they run."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.calibration.expert_tokens import ExpertPools
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.turns import each_turn, experts_of_turns, turns
from svsk_offline.storage.decoder_blocks import expert_modules, linear_modules

__all__ = ["Stage", "gathered_in_turns", "stages_of"]


@dataclass(frozen=True)
class Stage:
    """Linears of a block that are quantised together.

    Attributes:
        names: below the block.
        paired: they read one tensor, the same in both models but for errors. Not so experts: the
            two models may route a token to different ones.
    """

    names: tuple[str, ...]
    paired: bool

    def among(self, names: Collection[str]) -> "Stage":
        """The stage of those of its linears that are named."""
        return replace(self, names=tuple(name for name in self.names if name in names))

    def inputs(self) -> list[tuple[str, ...]]:
        """Its linears, those of one input together: all of them, or of each expert."""
        if self.paired:
            return [self.names]
        experts: dict[str, list[str]] = {}
        for name in self.names:
            experts.setdefault(name.rpartition(".")[0], []).append(name)
        return [tuple(names) for names in experts.values()]


@torch.no_grad()
def stages_of(runner: BlockRunner, index: int, block: nn.Module) -> list[Stage]:
    """The linears of a loaded block, in the order in which a batch runs them.

    Experts of one layer whose names end alike are in one stage, and their gate and up, which read
    the same tokens; linears that the batch does not run are in none.

    Args:
        runner: at the block.
        index: number of the block.
        block: the loaded block.
    """
    experts = expert_modules(block)
    kinds = {name: _kind(name) if name in experts else name for name, _ in linear_modules(block)}
    stage_of: dict[str, str] = {}  # by kind, in the order in which they run: the stage's first
    last: dict[str, Any] = {"tensor": None, "stage": ""}

    def hook(kind: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if kind not in stage_of:
                stage_of[kind] = last["stage"] if inputs[0] is last["tensor"] else kind
            last.update(tensor=inputs[0], stage=stage_of[kind])

        return before

    hooks = [
        module.register_forward_pre_hook(hook(kinds[name]))
        for name, module in linear_modules(block)
    ]
    try:
        first = next(iter(runner.batches()))
        runner.forward(index, block, runner.hidden[first])
    finally:
        for one in hooks:
            one.remove()
    stages: dict[str, list[str]] = {stage: [] for stage in stage_of.values()}
    for name, kind in kinds.items():
        if kind in stage_of:
            stages[stage_of[kind]].append(name)
    return [
        Stage(tuple(names), not any(name in experts for name in names)) for names in stages.values()
    ]


def gathered_in_turns(
    runner: BlockRunner,
    index: int,
    block: nn.Module,
    names: Collection[str],
    room: int | None,
    *,
    full: bool,
    first: Collection[str] = (),
    weights: Mapping[str, torch.Tensor] | None = None,
    advance: bool = True,
) -> Iterator[dict[str, InputStatistics]]:
    """What :meth:`BlockRunner.collect` gives, in turns that fit into memory, to the same bits.

    Args:
        runner: at the block.
        index: number of the block.
        block: the loaded block.
        names: of the linears below the block whose inputs are gathered.
        room: bytes of second moments at a time; None for no limit. A turn's are to be dropped
            before the next is taken.
        full: as for ``collect``, like those that follow.
        first: likewise.
        weights: likewise.
        advance: likewise, in the last turn.
    """
    experts = expert_modules(block)

    def size(read: Sequence[str]) -> int:
        features: int = block.get_parameter(f"{read[0]}.weight").shape[1]
        # Of two weightings of one input both are gathered.
        kinds = 1 if weights is None else len({id(weights[name]) for name in read})
        both = 2 if any(name in first and name not in experts for name in read) else 1
        return 4 * kinds * both * (features**2 if full else features)

    def collect(
        some: list[str], pools: ExpertPools | None, onward: bool
    ) -> dict[str, InputStatistics]:
        return runner.collect(
            index,
            block,
            full=full,
            first=first,
            weights=weights,
            advance=onward,
            names=some,
            pools=pools,
        )

    groups = [list(names)]
    if room is not None:
        read = [
            tuple(name for name in one if name in names)
            for stage in stages_of(runner, index, block)
            for one in stage.inputs()
        ]
        known = {name for one in read for name in one}
        read += [(name,) for name in names if name not in known]
        groups = turns(((one, size(one)) for one in read if one), room)
    nothing = ExpertPools()  # fills up nothing
    pools = experts_of_turns(block, groups, lambda group: collect(group, nothing, False))
    for group in each_turn(groups, room):
        yield collect(group, pools, advance and group is groups[-1])


def _kind(name: str) -> str:
    """What the names of like linears of different experts have in common: all but the number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
