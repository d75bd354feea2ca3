# SPDX-License-Identifier: Apache-2.0
"""What is measured of the linears before any is quantised, and the folder that keeps it.

One sweep of the loss's gradient says how much the loss feels each output feature and each token,
and under a bit budget, while a block's Hessians are in memory, how each matrix's loss falls with
the bits spent on it. Most of what a recipe says of the quantising itself does not enter, nor does
the budget: runs that differ in that alone measure once, if they keep it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import (
    CalibrationSet,
    InputStatistics,
    OutputGradients,
    sweep_gradients,
)
from svsk_offline.calibration.held_out import split_order
from svsk_offline.calibration.room import UNLIMITED, Room
from svsk_offline.calibration.text import token_fingerprint
from svsk_offline.calibration.way_back import Observed
from svsk_offline.planning.error_curves import CurveSettings, ErrorCurve, measure_curve
from svsk_offline.planning.measured import Measurements
from svsk_offline.planning.sweep_samples import MEASURED_EVERY, enough_samples
from svsk_offline.planning.unfinished_sweep import UnfinishedSweep
from svsk_offline.precision import block_dtype
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AlternatingRecipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.loaded_weight import loaded_weight
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_offline.world import ALONE, World
from svsk_vllm.format import ConfigGroup, SvskFormatError
from svsk_vllm.version import __version__

__all__ = ["Measuring", "measure_once"]


@dataclass(frozen=True)
class Measuring:
    """One sweep: what it depends on, and what it does.

    What is measured is made of these values and of nothing else, so that :meth:`key` tells whether
    it may be used again.

    Attributes:
        source: the dense model.
        names: the linears, by full name.
        texts: the samples, in the order of the sweep.
        order: of each of these samples, its place before; int64 [samples].
        held_out: how many of them, the last ones, are measured on and not fitted.
        seed: of the labels drawn from the model's predictions.
        curves: what error curves depend on; None measures none.
        directions: of each output's metric; 0 measures none.
        tokens: keep the gradients of tokens. A file that has them serves sweeps without, so this
            is no part of the key.
        device: where to compute.
        world: the processes that measure together, each on its samples.
    """

    source: ModelSource
    names: tuple[str, ...]
    texts: CalibrationSet
    order: torch.Tensor
    held_out: int
    seed: int
    curves: CurveSettings | None
    directions: int
    tokens: bool
    device: torch.device
    world: World = ALONE

    @classmethod
    def of(
        cls,
        source: ModelSource,
        schemes: Mapping[str, ConfigGroup],
        recipe: AlternatingRecipe,
        calibration: CalibrationSet,
        device: torch.device,
        scale_dtype: torch.dtype,
        say: Callable[[str], None] = lambda text: None,
        world: World = ALONE,
    ) -> "Measuring":
        """The sweep that a recipe needs; arguments as of :func:`make_plan`."""
        args, allocation = recipe.gradients, recipe.allocation
        count = None if args.token_power else args.samples
        if allocation is None:
            texts, curves = calibration.subset(count), None
            order, held = torch.arange(len(texts.tokens)), 0
        else:
            texts = calibration.subset(enough_samples(source, schemes, count, calibration, say))
            order, held = split_order(len(texts.tokens), MEASURED_EVERY)
            texts = replace(texts, tokens=texts.tokens[order], parts=())
            scheme = next(iter(schemes.values()))  # all are the recipe's
            curves = CurveSettings.of(scheme, recipe.alternating, allocation, scale_dtype)
        seed, tokens = recipe.calibration.seed, bool(args.token_power)
        return cls(
            source,
            tuple(schemes),
            texts,
            order,
            held,
            seed,
            curves,
            args.directions if recipe.largest_rank else 0,
            tokens,
            device,
            world,
        )

    def share(self) -> tuple[list[int], int]:
        """As :meth:`World.samples`, of the samples of the sweep."""
        return self.world.samples(len(self.texts.tokens), self.held_out)

    def key(self) -> str:
        """All that the measurements depend on, as JSON; the same for the same."""
        values = {
            "versions": [__version__, torch.__version__, transformers.__version__],
            **self.source.identity(),
            "content": self.source.content_sample,
            "linears": self.names,
            "samples": [token_fingerprint(self.texts.tokens), *self.texts.tokens.shape],
            "held_out": self.held_out,
            "order": self.order.tolist(),
            "seed": self.seed,
            "curves": self.curves and self.curves.to_json(),
            "directions": self.directions,
            "device": [self.device.type, str(block_dtype(self.device))],
        }
        if self.world.size > 1:  # they add up in another order
            values["processes"] = self.world.size
        return json.dumps(values, sort_keys=True)

    def run(
        self,
        scratch: Path,
        progress: Callable[[int, int], None],
        say: Callable[[str], None] = lambda text: None,
        room: Room = UNLIMITED,
    ) -> Measurements:
        """Measure, or go on with what was measured before an interruption.

        Args:
            scratch: folder for temporary files, and for what was measured so far.
            progress: called with the steps done and their total.
            say: is told where it goes on.
            room: what may be held at a time.

        Returns:
            What was measured, in the leading process; nothing in others.

        Raises:
            SvskError: the gradients are not finite, or the output does not depend on a linear.
        """
        blocks, whole = len(self.source.blocks[1]), len(self.order)
        world, (places, own_held_out) = self.world, self.share()
        unfinished = UnfinishedSweep(scratch, self.key(), world)
        before = unfinished.found(blocks, say)
        parts = [] if before is None else before[2]

        own: list[Measurements] = []  # of the block under way

        def visit(index: int, block: nn.Module, observed: Observed) -> None:
            linears = [
                one
                for one in self.source.linears(index)
                if one[1] in self.names and one[0] in observed.names
            ]
            owners = world.owners([one.out_features * one.in_features**2 for *_, one in linears])
            for (name, full, module), owner in zip(linears, owners, strict=True):
                if name not in observed.gradients:
                    raise SvskError(
                        f"{full}: the model's output does not depend on it. Add it to --ignore."
                    )
                gradient = observed.gradients.pop(name)  # its moment is as large as a Hessian
                gradient.add_up(world, owner, len(places) / whole, held_out=self.held_out > 0)
                inputs = self._inputs(name, module, owner, observed)
                if owner == world.rank:
                    # Now, while the block's statistics are in memory: one block's at a time are.
                    own.append(self._measured(full, module, gradient, inputs))

        def passed(index: int, gradient: torch.Tensor) -> None:
            parts.append(Measurements.joined(world.gathered(Measurements.joined(own))))
            own.clear()
            unfinished.note(index, parts[-1], gradient)

        sweep_gradients(
            self.source,
            self.texts.picked(places),
            self.device,
            block_dtype(self.device),
            visit,
            full=self.curves is not None,
            moments=self.directions > 0,
            held_out=own_held_out,
            seed=self.seed,
            places=places,
            scratch=scratch,
            progress=progress,
            start=None if before is None else before[:2],
            passed=passed,
            room=room,
        )
        unfinished.remove(blocks)
        return Measurements.joined(parts)

    def _measured(
        self,
        full: str,
        module: nn.Linear,
        gradient: OutputGradients,
        inputs: tuple[InputStatistics, InputStatistics | None] | None,
    ) -> Measurements:
        """What is found of one linear; what was gathered of it is used up."""
        tokens: dict[str, torch.Tensor] = {}
        curves: dict[str, ErrorCurve] = {}
        metrics: dict[str, RowMetric] = {}
        metric, felt = RowMetric.diagonal(gradient.rows), None
        if gradient.fitted is not None:
            metric = RowMetric.of(gradient.fitted.hessian, self.directions)
            metrics[full] = metric.to(torch.device("cpu"))
        if gradient.held_out is not None:
            felt = gradient.held_out.hessian
        if self.tokens:
            tokens[full] = gradient.tokens[self.order.argsort()]
        if self.curves is not None and inputs is not None:
            weight = loaded_weight(self.source, full, module).float()
            curves[full] = _curve(full, weight, gradient.rows, metric, *inputs, felt, self.curves)
        return Measurements({full: gradient.rows.cpu()}, tokens, curves, metrics)

    def _inputs(
        self,
        name: str,
        module: nn.Linear,
        owner: int,
        observed: Observed,
    ) -> tuple[InputStatistics, InputStatistics | None] | None:
        """What a curve is measured on, added up at the owner; None where none is measured."""
        if self.curves is None:
            return None
        own, other = observed.fitted.pop(name), observed.held_out.pop(name, None)
        if self.world.size > 1 and self.held_out and other is None:  # none of this process's
            other = InputStatistics(module.in_features, self.device, full=True)
        for statistics in (own, other):
            if statistics is not None:
                statistics.add_up(self.world, owner)
        return own, other


def _curve(
    name: str,
    weight: torch.Tensor,
    rows: torch.Tensor,
    metric: RowMetric,
    fitted: InputStatistics,
    held_out: InputStatistics | None,
    felt: torch.Tensor | None,
    settings: CurveSettings,
) -> ErrorCurve:
    """The curve of one matrix; the statistics are used up."""
    measured = None if held_out is None else held_out.hessian
    try:
        return measure_curve(weight, fitted.hessian, rows, metric, settings, measured, felt)
    except SvskError as error:
        raise SvskError(f"{name}: {error}") from error


def measure_once(
    measuring: Measuring,
    kept: Path | None,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
    room: Room = UNLIMITED,
) -> Measurements:
    """Measure, unless a folder keeps what an earlier run measured of the same.

    Args:
        measuring: what is measured.
        kept: the folder, made where it is missing; None keeps nothing.
        scratch: folder for temporary files.
        progress: called with the steps done and their total.
        say: is told which of the two is done.
        room: what may be held at a time.

    Returns:
        What was measured, in the leading process; nothing in others.

    Raises:
        SvskError: another run measures for the folder, or as :meth:`Measuring.run`.
    """

    def measure() -> Measurements:
        say("Measuring how much the predictions feel each matrix")
        return measuring.run(scratch, progress, say, room)

    if kept is None:
        return measure()
    key = measuring.key()
    path = kept / f"measured-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    world = measuring.world
    found = _kept(path, key, say) if world.leads else None
    if found is not None and measuring.tokens and not found.tokens:
        found = None
    if world.first(lambda: found is not None):
        return found or Measurements({})
    kept.mkdir(parents=True, exist_ok=True)
    with locked(kept / LOCK_NAME, kept) if world.leads else nullcontext():
        measured = measure()
        if world.leads:
            measured.save(path, key)
    return measured


def _kept(path: Path, key: str, say: Callable[[str], None]) -> Measurements | None:
    """What a file keeps; None if there is none, or none that can be read."""
    if not path.exists():
        return None
    try:
        found = Measurements.load(path, key)
    except (SvskFormatError, LookupError, TypeError, ValueError) as error:
        say(f"{path} cannot be used, so it is replaced: {error}")
        return None
    say(f"How much the predictions feel each matrix was measured before: {path}")
    return found
