# SPDX-License-Identifier: Apache-2.0
"""Calibration samples that nothing is fitted to, and the error of a block's outputs on them.

The error on tokens that were fitted falls as there are fewer of them: on SmolLM2's down_proj, from
1.7e-3 at 2.3 tokens per input channel to 0.6e-3 at 0.7, while the error on others rises from 4.4e-3
to 11.8e-3. Only the latter says how good a matrix is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import nn

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.calibration.turns import each_turn, turns
from svsk_offline.storage.decoder_blocks import linear_modules
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.world import ALONE, World
from svsk_vllm.format import LinearSpec, QuantizedLinear, dequantize

__all__ = ["OutputErrors", "held_out_last", "measure_outputs", "split_order"]

_EVERY: Final = 8
"""One sample of so many is held out.

A mean square over a few thousand tokens is known to a per cent or two, and an eighth fewer tokens
to fit costs less than that.
"""


def split_order(count: int, every: int = _EVERY) -> tuple[torch.Tensor, int]:
    """An order of samples in which those held out come last, int64 [count], and how many they are.

    They are spread over the text as the others are: one of every so many, at least 1, but none of a
    single sample.
    """
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[every - 1 :: every] = True
    if 1 < count < every:
        chosen[-1] = True
    return torch.argsort(chosen.to(torch.int8), stable=True), int(chosen.sum())


def held_out_last(texts: CalibrationSet, every: int = _EVERY) -> tuple[CalibrationSet, int]:
    """The same samples in :func:`split_order`, and how many are held out."""
    order, held = split_order(len(texts.tokens), every)
    return replace(texts, tokens=texts.tokens[order], parts=()), held


@dataclass(frozen=True)
class OutputErrors:
    """Mean squares of a linear's output, bias left out, and of what is wrong with it.

    Attributes:
        base: ``E|dW x|^2 / E|W x|^2`` of the base without its sidecar; 0 for an output that is
            always zero, None for an expert that none of the tokens was routed to.
        whole: the same with the sidecar.
        sqnr_db: squares of the weights over those of their errors, in dB.
        tokens: held-out tokens it was measured on; 0 where all samples were fitted, and it was
            measured on them.
    """

    base: float | None
    whole: float | None
    sqnr_db: float
    tokens: int

    def report(
        self,
        spec: LinearSpec,
        seconds: float,
        routed_tokens: int | None = None,
        aim_share: float | None = None,
    ) -> LayerReport:
        """What the tool says of a linear with these errors, quantised in so many seconds.

        Args:
            spec: of the linear.
            seconds: spent.
            routed_tokens: of an expert: fitted tokens that were routed to it.
            aim_share: how much of the correction for errors before it is in what it was fitted to.
        """
        return LayerReport(
            name=spec.name,
            shape=(spec.n, spec.k),
            num_weights=spec.num_weights,
            stored_bits=spec.stored_bits,
            base_error=self.base,
            error=self.whole,
            held_out_tokens=self.tokens,
            sqnr_db=self.sqnr_db,
            seconds=seconds,
            routed_tokens=routed_tokens,
            aim_share=aim_share,
        )


@torch.no_grad()
def measure_outputs(
    runner: BlockRunner,
    index: int,
    block: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    *,
    advance: bool,
    aims: Mapping[str, torch.Tensor] | None = None,
    room: int | None = None,
    world: World = ALONE,
) -> dict[str, OutputErrors]:
    """Run the held-out samples through a loaded dense block, and quantised linears beside it.

    Where no sample is held out, the fitted ones are run.

    Args:
        runner: at the block.
        index: number of the block.
        block: the loaded block; its outputs are those of the weights that it has.
        linears: quantised, by their names below the block.
        advance: keep the block's outputs as the next block's inputs.
        aims: float [N, K] by these names, what each was fitted to; None for the block's weights.
        room: bytes of differences of weights at a time, in turns; None for no limit.
        world: the processes whose samples are measured together.

    Returns:
        Errors by the names of ``linears``.
    """
    sums: dict[str, torch.Tensor] = {}  # float64 [3]: output, error of the base, of the whole
    noise: dict[str, float] = {}
    tokens = dict.fromkeys(linears, 0)

    def watch(name: str, module: Any) -> Any:
        linear = _moved(linears[name], runner.device)
        weight = (module.weight if aims is None else aims[name]).float()
        whole = weight - dequantize(linear)
        signal, missed = float(weight.square().sum()), float(whole.square().sum())
        noise[name] = 10 * math.log10(signal / missed) if missed and signal else math.inf
        errors = [whole.to(runner.dtype)]
        aim = None if aims is None else weight.to(runner.dtype)
        if linear.spec.rank:
            errors.insert(0, (weight - dequantize(linear, with_sidecar=False)).to(runner.dtype))
        sums[name] = torch.zeros(3, dtype=torch.float64, device=runner.device)

        def after(module: Any, given: tuple[Any, ...], output: torch.Tensor) -> None:
            rows = given[0].flatten(0, -2)
            if aim is not None:
                product = rows @ aim.T
            else:
                product = output if module.bias is None else output - module.bias
            squares = [_energy(product), *(_energy(rows @ error.T) for error in errors)]
            sums[name] += torch.stack([*squares, squares[-1]][:3])
            tokens[name] += len(rows)

        return module.register_forward_hook(after)

    modules = {name: module for name, module in linear_modules(block) if name in linears}
    groups = [[*modules]]
    if room is not None:  # with a sidecar two differences are held
        sizes = (
            ((name,), (1 + bool(linears[name].spec.rank)) * module.weight.nbytes)
            for name, module in modules.items()
        )
        groups = turns(sizes, room)
    for group in each_turn(groups, room):
        hooks = [watch(name, modules[name]) for name in group]
        try:
            for part in runner.batches("held out" if runner.apart else "fitted"):
                output = runner.forward(index, block, runner.hidden[part])
                if advance and group is groups[-1]:
                    runner.hidden[part] = output.to(runner.hidden)
        finally:
            for hook in hooks:
                hook.remove()
        hooks.clear()  # they hold the differences
    table = torch.zeros(len(linears), 4, dtype=torch.float64)
    for row, name in zip(table, linears, strict=True):
        row[:3], row[3] = sums[name], tokens[name]
    world.add(table)
    result = {}
    for name, (energy, base, whole, count) in zip(linears, table.tolist(), strict=True):
        unit = energy or 1.0
        counted = int(count) if runner.apart else 0
        if count:
            result[name] = OutputErrors(base / unit, whole / unit, noise[name], counted)
        else:
            result[name] = OutputErrors(None, None, noise[name], 0)
    return result


def _energy(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares, float64 []."""
    return values.float().square().sum(dtype=torch.float64)


def _moved(linear: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    values: dict[str, Any] = {field.name: getattr(linear, field.name) for field in fields(linear)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.to(device)
    return QuantizedLinear(**values)
