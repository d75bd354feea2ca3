# SPDX-License-Identifier: Apache-2.0
"""Quantising a model's embedding table and output head."""

import math
import time
from collections.abc import Callable
from typing import Final

import torch

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.calibration.head_input import collect_head_input
from svsk_offline.calibration.held_out import OutputErrors
from svsk_offline.planning.tables import Table, TablePlan
from svsk_offline.quantizers.eight_bits import round_to_eight_bits
from svsk_offline.quantizers.hot_rows import common_tokens, round_with_hot_rows
from svsk_offline.quantizers.quantize_linear import quantize_linear
from svsk_offline.recipe import PublishedRecipe, Recipe
from svsk_offline.storage.checkpoint_writer import QuantizedTables
from svsk_offline.world import ALONE, World
from svsk_vllm.format import QuantizedLinear, dequantize

__all__ = ["quantize_tables"]

_ROWS: Final = 8192
"""Of a table whose error is measured at a time."""


def quantize_tables(
    plan: TablePlan,
    runner: BlockRunner,
    tokens: torch.Tensor,
    held_out: int,
    recipe: Recipe,
    say: Callable[[str], None],
    world: World = ALONE,
) -> QuantizedTables:
    """Quantise what the plan says, and measure it.

    The error of a head is that of its output on the held-out tokens; the error of a table that is
    only looked up is that of its rows, each counting the same.

    Args:
        plan: the tables.
        runner: past the last block.
        tokens: the calibration samples of all processes, int64 [samples, tokens].
        held_out: how many of them, the last ones, are held out.
        recipe: of a head that is quantised as linears are.
        say: told how common the tokens of hot rows are.
        world: the processes; the leading one quantises, the others get nothing.

    Raises:
        SvskError: a table holds values that cannot be stored, or statistics cannot be used.
    """
    if not plan.tables:
        return QuantizedTables()
    linears, reports = [], []
    full = not isinstance(recipe, PublishedRecipe)
    fitted, measured = (
        collect_head_input(runner, runner.tokens, full=full) if plan.multiplied else (None, None)
    )
    for statistics in (fitted, measured):
        if statistics is not None:
            statistics.add_up(world, 0)
    if not world.leads:
        return QuantizedTables()
    for table in plan.tables:
        started = time.perf_counter()
        spec = table.spec
        weight = runner.source.tensors.read(table.stored)
        if spec.scheme.weights.num_bits == 8:
            linear = round_to_eight_bits(weight, spec)
        elif spec.scheme.weights.hot_rows:
            hot = _hot_rows(table, tokens, held_out, say)
            linear = round_with_hot_rows(weight, spec, hot, runner.device)
        else:
            assert fitted is not None, "only what is multiplied with is quantised to 4 bits"
            linear = quantize_linear(
                spec.name, weight.to(runner.device), fitted, recipe, spec.scheme, spec.scale_dtype
            )
        seconds = time.perf_counter() - started
        moment = None
        if measured is not None and table is plan.multiplied:
            moment = measured.hessian.cpu()
        counted = 0 if moment is None else held_out * tokens.shape[1]
        errors = _errors(weight, linear, moment, counted)
        linears.append(linear)
        reports.append(errors.report(spec, seconds))
    replaced = frozenset(table.stored for table in plan.tables)
    return QuantizedTables(tuple(linears), tuple(reports), replaced, plan.untied)


def _hot_rows(
    table: Table, tokens: torch.Tensor, held_out: int, say: Callable[[str], None]
) -> torch.Tensor:
    """The rows of a table that get 8 bits, by the samples that are not held out: int32 [h]."""
    spec = table.spec
    fitted, others = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    hot = common_tokens(fitted, table.special, spec.n, spec.scheme.weights.hot_rows)
    which, name = (others, "held-out tokens") if held_out else (fitted, "tokens")
    share = float(torch.isin(which.cpu(), hot).double().mean())
    say(f"{spec.name}: the {len(hot)} rows in 8 bits are those of {share:.1%} of the {name}")
    return hot


def _errors(
    weight: torch.Tensor, linear: QuantizedLinear, moment: torch.Tensor | None, tokens: int
) -> OutputErrors:
    """Errors under a second moment [K, K] of the input; None for inputs that are rows' numbers."""
    signal = energy = missed = without = noise = 0.0
    for start in range(0, len(weight), _ROWS):
        rows = range(start, min(start + _ROWS, len(weight)))
        dense = weight[rows.start : rows.stop].float().cpu()
        error = dense - dequantize(linear, rows=rows)
        signal += float(dense.square().sum())
        noise += float(error.square().sum())
        energy += _energy(dense, moment)
        lost = _energy(error, moment)
        missed += lost
        if linear.spec.rank:
            lost = _energy(dense - dequantize(linear, with_sidecar=False, rows=rows), moment)
        without += lost
    unit = energy or 1.0
    sqnr = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return OutputErrors(without / unit, missed / unit, sqnr, tokens)


def _energy(rows: torch.Tensor, moment: torch.Tensor | None) -> float:
    return float((rows.square() if moment is None else (rows @ moment) * rows).double().sum())
