# SPDX-License-Identifier: Apache-2.0
"""The linears of a decoder block: their inputs gathered, quantised, measured."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from svsk_offline.quantizers.aimed_weight import Aim, aims
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
        world: the processes that quantise together, each at its own linears. Not with an aim.
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
        fitted = _Fitted()
        planned = self._planned(index)
        experts = expert_modules(block)
        for statistics in gathered_in_turns(
            self._runner,
            index,
            block,
            [name for name, _, _ in planned],
            self._room,
            full=self._alternating is not None,
            first=self._sink_names(index),
            weights=self._token_weights(index),
            # With nothing held out the same samples are measured below.
            advance=advance and self._runner.apart,
        ):
            fitted.routed |= {
                name: one.tokens for name, one in statistics.items() if name in experts
            }
            self._fit_all([one for one in planned if one[0] in statistics], statistics, fitted)
        for name, full, _ in planned:
            _known(fitted.linears, name, full)
        # In the block's order, whatever the turns were.
        fitted.linears = {name: fitted.linears[name] for name, _, _ in planned}
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

    def _fit_all(
        self,
        planned: Sequence[tuple[str, str, nn.Linear]],
        statistics: dict[str, InputStatistics],
        fitted: _Fitted,
    ) -> None:
        """Quantise linears of a block, each in the process that has its statistics added up.

        ``statistics``, of these linears, is emptied.
        """
        owners = self._added_up(planned, statistics)
        own: dict[str, tuple[QuantizedLinear, float]] = {}
        prepare = last_one_kept()
        for name, full, module in planned:
            started = time.perf_counter()
            if owners[name] == self._world.rank:
                weight = loaded_weight(self._source, full, module)
                linear = self._fit(full, weight, statistics[name], prepare)
                own[name] = linear, time.perf_counter() - started
            del statistics[name]  # the largest there is
        for name, _, _ in planned:
            made = self._world.of(owners[name], partial(own.__getitem__, name))
            fitted.linears[name], fitted.seconds[name] = made

    def _added_up(
        self,
        planned: Sequence[tuple[str, str, nn.Linear]],
        statistics: Mapping[str, InputStatistics],
    ) -> dict[str, int]:
        """Add up the statistics of all processes where they are needed.

        Returns:
            Which process fits each linear; those of one input have one.

        Raises:
            SvskError: the processes saw other linears, or other inputs in common.
        """
        inputs: dict[int, list[str]] = {}
        costs: dict[int, int] = {}
        for name, _, module in planned:
            if name in statistics:
                key = id(statistics[name])
                inputs.setdefault(key, []).append(name)
                # Of error feedback, and about that of decomposing a Hessian.
                cost = module.out_features * module.in_features**2
                costs[key] = costs.get(key, 0) + cost
        groups = list(inputs.values())
        if any(other != groups for other in self._world.everywhere(groups)):
            raise SvskError(
                f"{self._source.folder}: which linears a block runs, or which read one input,"
                " depends on the samples; such models are quantised by one process. Start svsk"
                " without torchrun."
            )
        chosen = self._world.owners([*costs.values()])
        for names, owner in zip(groups, chosen, strict=True):
            statistics[names[0]].add_up(self._world, owner)
        return {n: owner for names, owner in zip(groups, chosen, strict=True) for n in names}

    def _in_stages(
        self, pairs: InputPairs, index: int, block: nn.Module
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        """One input after another, each as the quantised linears before it give it."""
        planned = {name: (full, module) for name, full, module in self._planned(index)}
        fitted = _Fitted()
        replaced: dict[str, torch.Tensor] = {}
        aimed: dict[str, torch.Tensor] = {}
        found = (stage.among(planned) for stage in stages_of(self._runner, index, block))
        stages = [stage for stage in found if stage.names]
        pairs.advance(index, block, stages)
        first, weights = self._sink_names(index), self._token_weights(index)
        for stage in stages:
            gathered = pairs.gather(index, block, stage, replaced, first=first, weights=weights)
            inputs: dict[str, InputStatistics] = {}
            moments: dict[str, PairedMoments] = {}
            for name in stage.names:
                inputs[name], pair = _known(gathered, name, planned[name][0])
                if pair is None:
                    fitted.routed[name] = inputs[name].tokens
                else:
                    moments[name] = pair
            del gathered, pair  # as large as the matrices of a fit
            found_aims = self._aims(planned, stage.names, inputs, moments)
            prepare = last_one_kept()
            for name in stage.names:
                started = time.perf_counter()
                aim = found_aims.pop(name)
                aimed[name], fitted.shares[name] = aim.weight, aim.share
                linear = self._fit(planned[name][0], aim.weight, inputs.pop(name), prepare)
                stored = block.get_parameter(f"{name}.weight")
                replaced[name] = dequantize(linear).to(stored.device, stored.dtype)
                fitted.linears[name] = linear
                fitted.seconds[name] = time.perf_counter() - started
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
            )
        return fitted.reported(errors)

    def _aims(
        self,
        planned: Mapping[str, tuple[str, nn.Linear]],
        names: Sequence[str],
        inputs: Mapping[str, InputStatistics],
        moments: dict[str, PairedMoments],
    ) -> dict[str, Aim]:
        """What the linears of a stage are fitted to; ``moments`` is emptied."""
        assert self._alternating is not None, "only the method alternating has an aim"
        found: dict[str, Aim] = {}
        together: dict[tuple[int, float], list[str]] = {}  # of one input, and one sink weight
        for name in names:
            weight = loaded_weight(self._source, *planned[name]).float()
            found[name] = Aim(weight, 0.0)
            if name in moments:
                sink = self._alternating.sink_weight(planned[name][0])
                together.setdefault((id(moments[name]), sink), []).append(name)
        for (_, sink), alike in together.items():
            pair = moments[alike[0]]
            for name in alike:
                del moments[name]
            weights = {name: found[name].weight for name in alike}
            missing, unseen = (
                {name: cross.product(weight, sink) for name, weight in weights.items()}
                for cross in (pair.fitted, pair.held_out)
            )
            held_out = pair.second
            del pair  # as large as the matrices of a fit
            with _named(planned[alike[0]][0]):
                found |= aims(
                    weights,
                    missing,
                    unseen,
                    inputs[alike[0]],
                    held_out,
                    most=self._aim,
                    sink_weight=sink,
                )
        return found

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

    def _planned(self, index: int) -> list[tuple[str, str, nn.Linear]]:
        """Name below the block, whole name and module of the linears that have a scheme."""
        return [
            (name, full, module)
            for name, full, module in self._source.linears(index)
            if full in self._plan.schemes
        ]

    def _sink_names(self, index: int) -> frozenset[str]:
        """Linears below a block whose first tokens count more."""
        recipe = self._alternating
        return frozenset(
            name
            for name, full, _ in self._source.linears(index)
            if recipe and recipe.sink_weight(full)
        )

    def _token_weights(self, index: int) -> Mapping[str, torch.Tensor] | None:
        return self._plan.token_weights(
            {name: full for name, full, _ in self._source.linears(index)}
        )


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
