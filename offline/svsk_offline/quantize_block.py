# SPDX-License-Identifier: Apache-2.0
"""The linears of a decoder block: their inputs gathered, quantised, measured."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.cross_moment import PairedMoments
from svsk_offline.calibration.held_out import OutputErrors, measure_outputs
from svsk_offline.calibration.input_pairs import InputPairs, replaced_weights
from svsk_offline.calibration.room import UNLIMITED, Room
from svsk_offline.calibration.stages import gathered_in_turns, stages_of
from svsk_offline.planning.plan import Plan
from svsk_offline.quantizers.aimed_weight import Aim, stage_aims
from svsk_offline.quantizers.alternating import PreparedInput, last_one_kept
from svsk_offline.quantizers.quantize_linear import quantize_linear
from svsk_offline.recipe import AlternatingArgs, AlternatingRecipe, Recipe
from svsk_offline.storage.decoder_blocks import expert_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.storage.loaded_weight import loaded_weight
from svsk_offline.world import ALONE, World
from svsk_vllm.format import QuantizedLinear, dequantize

__all__ = ["BlockQuantizer"]

Prepare = Callable[[InputStatistics, AlternatingArgs, float], PreparedInput]

_Planned = Mapping[str, tuple[str, nn.Linear]]
"""Linears that have a scheme by their names below the block: whole name and module."""

_T = TypeVar("_T")


@dataclass
class _Fitted:
    """Linears of a block and what is known of their fits, by their names below the block."""

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def reported(
        self, errors: Mapping[str, OutputErrors]
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        reports = [
            errors[name].report(
                linear.spec, self.seconds[name], self.routed.get(name), self.shares.get(name)
            )
            for name, linear in self.linears.items()
        ]
        return list(self.linears.values()), reports


class BlockQuantizer:
    """Quantises block after block.

    Args:
        source: the dense model.
        recipe: how.
        plan: each linear's scheme and metric, and how much tokens count.
        runner: at the first block.
        scale_dtype: stored dtype of scales.
        scratch: folder for temporary files.
        room: what may be held at a time.
        world: the processes that quantise together, each at its own linears.
    """

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        plan: Plan,
        runner: BlockRunner,
        scale_dtype: torch.dtype,
        scratch: Path,
        room: Room = UNLIMITED,
        world: World = ALONE,
    ) -> None:
        self._world, self._room = world, room.statistics
        self._source, self._recipe, self._plan, self._runner = source, recipe, plan, runner
        self._scale_dtype = scale_dtype
        self._alternating = recipe if isinstance(recipe, AlternatingRecipe) else None
        self._aim = self._alternating.alternating.aim if self._alternating else 0.0
        self._pairs = (
            InputPairs(runner, memory_limit=room.hidden, scratch=scratch) if self._aim else None
        )

    def quantize(
        self, index: int, block: nn.Module
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        """The linears of a loaded block that have a scheme, and what was measured of each.

        The hidden states move on, but not in sequence: the next block's inputs then come from what
        is stored of this one.

        Raises:
            SvskError: a linear saw no token, or cannot be quantised.
        """
        if self._pairs is None:
            return self._at_once(index, block)
        return self._in_stages(self._pairs, index, block)

    def skip(self, index: int, block: nn.Module) -> None:
        """Pass by a loaded block, its weights dense, that an earlier run has quantised.

        The hidden states of the dense model move on; a run's own are not touched.
        """
        if self._pairs is not None:
            self._pairs.advance(index, block)

    def close(self) -> None:
        """Remove temporary files."""
        if self._pairs is not None:
            self._pairs.close()

    def _at_once(
        self, index: int, block: nn.Module
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        """All linears of a block fitted to what its dense weights give."""
        advance = not self._recipe.sequential
        planned = self._planned(index)
        fitted = _Fitted()
        # With nothing held out the same samples are measured below.
        self._fit_in_turns(index, block, planned, fitted, advance=advance and self._runner.apart)
        errors = measure_outputs(
            self._runner,
            index,
            block,
            fitted.linears,
            advance=advance,
            room=self._room,
            world=self._world,
        )
        return fitted.reported(errors)

    def _fit_in_turns(
        self, index: int, block: nn.Module, planned: _Planned, fitted: _Fitted, *, advance: bool
    ) -> None:
        """Quantise linears of a block for the inputs that the block's weights give them now.

        In the block's order, in turns that fit into memory.
        """
        experts = expert_modules(block)
        for statistics in gathered_in_turns(
            self._runner,
            index,
            block,
            [*planned],
            self._room,
            full=self._alternating is not None,
            first=self._sink_names(index),
            weights=self._token_weights(index),
            advance=advance,
        ):
            fitted.routed |= {
                name: one.tokens for name, one in statistics.items() if name in experts
            }
            of_turn = {name: planned[name] for name in planned if name in statistics}
            self._fit_all(of_turn, statistics, fitted)
        for name, (full, _) in planned.items():
            # To the end, whatever the turns were.
            linear = _known(fitted.linears, name, full)
            del fitted.linears[name]
            fitted.linears[name] = linear

    def _fit_all(
        self, planned: _Planned, statistics: dict[str, InputStatistics], fitted: _Fitted
    ) -> None:
        """Quantise linears of a block, each in the process that has its statistics added up.

        ``statistics``, of these linears, is emptied.
        """
        owners = self._added_up(planned, statistics)
        own: dict[str, tuple[QuantizedLinear, float]] = {}
        prepare = last_one_kept()
        for name, (full, module) in planned.items():
            started = time.perf_counter()
            if owners[name] == self._world.rank:
                weight = loaded_weight(self._source, full, module)
                linear = self._fit(full, weight, statistics[name], prepare)
                own[name] = linear, time.perf_counter() - started
            del statistics[name]  # the largest there is
        for name in planned:
            made = self._world.of(owners[name], partial(own.__getitem__, name))
            fitted.linears[name], fitted.seconds[name] = made

    def _added_up(
        self, planned: _Planned, statistics: Mapping[str, InputStatistics]
    ) -> dict[str, int]:
        """Add up the statistics of all processes where they are needed.

        Returns:
            Which process fits each linear; those of one input have one.

        Raises:
            SvskError: the processes saw other linears, or other inputs in common.
        """
        costs = {name: _cost(module) for name, (_, module) in planned.items()}
        groups = self._of_one_input(costs, statistics)
        chosen = self._world.owners([sum(costs[name] for name in names) for names in groups])
        for names, owner in zip(groups, chosen, strict=True):
            statistics[names[0]].add_up(self._world, owner)
        return {n: owner for names, owner in zip(groups, chosen, strict=True) for n in names}

    def _of_one_input(
        self, names: Iterable[str], statistics: Mapping[str, InputStatistics]
    ) -> list[list[str]]:
        """Linears of a block, those of one input together, as they are in all processes.

        Raises:
            SvskError: the processes saw other linears, or other inputs in common.
        """
        inputs: dict[int, list[str]] = {}
        for name in names:
            inputs.setdefault(id(statistics[name]), []).append(name)
        groups = list(inputs.values())
        if any(other != groups for other in self._world.everywhere(groups)):
            raise SvskError(
                f"{self._source.folder}: which linears a block runs, or which read one input,"
                " depends on the samples; such models are quantised by one process. Start svsk"
                " without torchrun."
            )
        return groups

    def _in_stages(
        self, pairs: InputPairs, index: int, block: nn.Module
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        """One input after another, each as the quantised linears before it give it."""
        planned = self._planned(index)
        fitted = _Fitted()
        replaced: dict[str, torch.Tensor] = {}
        aimed: dict[str, torch.Tensor] = {}
        found = (stage.among(planned) for stage in stages_of(self._runner, index, block))
        stages = [stage for stage in found if stage.names]
        pairs.advance(index, block, stages)
        first, weights = self._sink_names(index), self._token_weights(index)
        for stage in stages:
            of_stage = {name: planned[name] for name in stage.names}
            if stage.paired:
                stored = {
                    name: loaded_weight(self._source, full, module).float()
                    for name, (full, module) in of_stage.items()
                }
                gathered = pairs.gather(
                    index, block, stored, replaced, first=first, weights=weights
                )
                reached = self._fit_stage(of_stage, stored, gathered, fitted)
                fitted.shares |= {name: aim.share for name, aim in reached.items()}
                aimed |= {name: aim.weight for name, aim in reached.items()}
            else:
                with replaced_weights(block, replaced):
                    self._fit_in_turns(index, block, of_stage, fitted, advance=False)
                aimed |= {name: module.weight.detach() for name, (_, module) in of_stage.items()}
            for name, (_, module) in of_stage.items():
                made = dequantize(fitted.linears[name])
                replaced[name] = made.to(module.weight.device, module.weight.dtype)
        for name, (full, _) in planned.items():
            _known(fitted.linears, name, full)
        with replaced_weights(block, replaced):
            errors = measure_outputs(
                self._runner,
                index,
                block,
                fitted.linears,
                advance=False,
                aims=aimed,
                room=self._room,
                world=self._world,
            )
        return fitted.reported(errors)

    def _fit_stage(
        self,
        planned: _Planned,
        weights: dict[str, torch.Tensor],
        gathered: dict[str, tuple[InputStatistics, PairedMoments]],
        fitted: _Fitted,
    ) -> dict[str, Aim]:
        """Quantise the linears of a stage, and say what they were fitted to.

        They read one input, so where there are several processes each gets its moments, and fits
        some of the linears. ``weights``, theirs in float32, and ``gathered`` are emptied.
        """
        inputs = {name: statistics for name, (statistics, _) in gathered.items()}
        moments = {name: pair for name, (_, pair) in gathered.items()}
        gathered.clear()  # as large as the matrices of a fit
        for names in self._of_one_input(inputs, inputs):
            inputs[names[0]].add_up(self._world, None)
            moments[names[0]].add_up(self._world)
        chosen = self._world.owners([_cost(module) for _, module in planned.values()])
        owners = dict(zip(planned, chosen, strict=True))
        own = {name: planned[name] for name in planned if owners[name] == self._world.rank}
        moments = {name: moments[name] for name in own}
        of_own = {name: weights[name] for name in own}
        weights.clear()
        sinks = {name: self._sink_weight(full) for name, (full, _) in own.items()}
        with _named(planned[next(iter(planned))][0]):
            found = stage_aims(of_own, inputs, moments, sinks, most=self._aim)
        made: dict[str, tuple[QuantizedLinear, float, Aim]] = {}
        prepare = last_one_kept()
        for name, (full, _) in own.items():
            started = time.perf_counter()
            aim = found.pop(name)
            linear = self._fit(full, aim.weight, inputs.pop(name), prepare)
            if self._world.size > 1:  # the number of a device is another one's elsewhere
                aim = replace(aim, weight=aim.weight.cpu())
            made[name] = linear, time.perf_counter() - started, aim
        inputs.clear()
        reached = {}
        for name, (_, module) in planned.items():
            fitted.linears[name], fitted.seconds[name], aim = self._world.of(
                owners[name], partial(made.pop, name)
            )
            reached[name] = replace(aim, weight=aim.weight.to(module.weight.device))
        return reached

    def _fit(
        self, full: str, weight: torch.Tensor, statistics: InputStatistics, prepare: Prepare
    ) -> QuantizedLinear:
        metric = self._plan.rows.get(full)
        with _named(full):
            return quantize_linear(
                full,
                weight,
                statistics,
                self._recipe,
                self._plan.schemes[full],
                self._scale_dtype,
                None if metric is None else metric.to(weight.device),
                prepare,
            )

    def _planned(self, index: int) -> _Planned:
        return {
            name: (full, module)
            for name, full, module in self._source.linears(index)
            if full in self._plan.schemes
        }

    def _sink_names(self, index: int) -> frozenset[str]:
        """Linears below a block whose first tokens count more."""
        return frozenset(
            name for name, full, _ in self._source.linears(index) if self._sink_weight(full)
        )

    def _sink_weight(self, full: str) -> float:
        return self._alternating.sink_weight(full) if self._alternating else 0.0

    def _token_weights(self, index: int) -> Mapping[str, torch.Tensor] | None:
        return self._plan.token_weights(
            {name: full for name, full, _ in self._source.linears(index)}
        )


def _cost(module: nn.Linear) -> int:
    """Of error feedback in a linear, and about that of decomposing a Hessian."""
    return module.out_features * module.in_features**2


def _known(given: Mapping[str, _T], name: str, full: str) -> _T:
    """What there is of a linear that the calibration text reached."""
    if name not in given:
        raise SvskError(
            f"{full}: saw no calibration token, so it cannot be quantised. Add it to --ignore."
        )
    return given[name]


@contextmanager
def _named(full: str) -> Iterator[None]:
    """Errors say of which linear they are."""
    try:
        yield
    except SvskError as error:
        raise error if full in str(error) else SvskError(f"{full}: {error}") from error
