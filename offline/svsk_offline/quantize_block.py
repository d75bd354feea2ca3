# SPDX-License-Identifier: Apache-2.0
"""The linears of a decoder block: their inputs gathered, quantised, measured."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.cross_moment import CrossMoment
from svsk_offline.calibration.held_out import OutputErrors, measure_outputs
from svsk_offline.calibration.input_pairs import InputPairs, replaced_weights
from svsk_offline.planning.plan import Plan
from svsk_offline.quantizers.aimed_weight import aimed_weight
from svsk_offline.quantizers.alternating import PreparedInput, last_one_kept
from svsk_offline.quantizers.quantize_linear import quantize_linear
from svsk_offline.recipe import AlternatingArgs, AlternatingRecipe, Recipe
from svsk_offline.storage.decoder_blocks import expert_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.storage.loaded_weight import loaded_weight
from svsk_vllm.format import QuantizedLinear, dequantize

__all__ = ["BlockQuantizer"]

Prepare = Callable[[InputStatistics, AlternatingArgs, float], PreparedInput]

_T = TypeVar("_T")


class BlockQuantizer:
    """Quantises block after block.

    Args:
        source: the dense model.
        recipe: how.
        plan: each linear's scheme and metric, and how much tokens count.
        runner: at the first block.
        scale_dtype: stored dtype of scales.
        scratch: folder for temporary files.
    """

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        plan: Plan,
        runner: BlockRunner,
        scale_dtype: torch.dtype,
        scratch: Path,
    ) -> None:
        self._source, self._recipe, self._plan, self._runner = source, recipe, plan, runner
        self._scale_dtype = scale_dtype
        self._alternating = recipe if isinstance(recipe, AlternatingRecipe) else None
        self._aim = self._alternating.alternating.aim if self._alternating else 0.0
        self._pairs = InputPairs(runner, scratch=scratch) if self._aim else None

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
        statistics = self._runner.collect(
            index,
            block,
            full=self._alternating is not None,
            first=self._sink_names(index),
            weights=self._token_weights(index),
            # With nothing held out the same samples are measured below.
            advance=advance and self._runner.held_out > 0,
        )
        routed = {
            name: statistics[name].tokens for name in expert_modules(block) if name in statistics
        }
        fitted = _Fitted()
        prepare = last_one_kept()
        for name, full, module in self._planned(index):
            started = time.perf_counter()
            given = _known(statistics, name, full)
            weight = loaded_weight(self._source, full, module)
            fitted.linears[name] = self._fit(full, weight, given, prepare)
            fitted.seconds[name] = time.perf_counter() - started
            del statistics[name]  # the largest there is
        errors = measure_outputs(self._runner, index, block, fitted.linears, advance=advance)
        return fitted.reported(errors, routed)

    def _in_stages(
        self, pairs: InputPairs, index: int, block: nn.Module
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        """One input after another, each as the quantised linears before it give it."""
        planned = {name: (full, module) for name, full, module in self._planned(index)}
        fitted = _Fitted()
        replaced: dict[str, torch.Tensor] = {}
        aims: dict[str, torch.Tensor] = {}
        routed: dict[str, int] = {}
        found = (stage.among(planned) for stage in pairs.stages(index, block))
        stages = [stage for stage in found if stage.names]
        pairs.advance(index, block, stages)
        first, weights = self._sink_names(index), self._token_weights(index)
        for stage in stages:
            gathered = pairs.gather(index, block, stage, replaced, first=first, weights=weights)
            prepare = last_one_kept()
            inputs: dict[str, InputStatistics] = {}
            for name in stage.names:
                full, module = planned[name]
                inputs[name], cross = _known(gathered, name, full)
                weight = loaded_weight(self._source, full, module)
                aims[name] = self._aimed(full, weight, inputs[name], cross, prepare)
                if not stage.paired:
                    routed[name] = inputs[name].tokens
            del gathered, cross  # before the fit, whose matrices are as large
            for name in stage.names:
                started = time.perf_counter()
                statistics = inputs.pop(name)
                linear = self._fit(planned[name][0], aims[name], statistics, prepare)
                dense = block.get_parameter(f"{name}.weight")
                replaced[name] = dequantize(linear).to(dense.device, dense.dtype)
                fitted.linears[name] = linear
                fitted.seconds[name] = time.perf_counter() - started
        for name, (full, _) in planned.items():
            _known(fitted.linears, name, full)
        with replaced_weights(block, replaced):
            errors = measure_outputs(
                self._runner, index, block, fitted.linears, advance=False, aims=aims
            )
        return fitted.reported(errors, routed)

    def _aimed(
        self,
        full: str,
        weight: torch.Tensor,
        statistics: InputStatistics,
        cross: CrossMoment | None,
        prepare: Prepare,
    ) -> torch.Tensor:
        """What base and sidecar are fitted to, [N, K]."""
        assert self._alternating is not None, "only the method alternating has an aim"
        if cross is None:
            return weight
        sink = self._alternating.sink_weight(full)
        with _named(full):
            given = prepare(statistics, self._alternating.alternating, sink)
        return aimed_weight(weight.float(), cross, given.order, self._aim, sink)

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


@dataclass
class _Fitted:
    """Linears of a block and the seconds that each took, by their names below the block."""

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def reported(
        self, errors: Mapping[str, OutputErrors], routed: Mapping[str, int]
    ) -> tuple[list[QuantizedLinear], list[LayerReport]]:
        reports = [
            errors[name].report(linear.spec, self.seconds[name], routed.get(name))
            for name, linear in self.linears.items()
        ]
        return list(self.linears.values()), reports


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
