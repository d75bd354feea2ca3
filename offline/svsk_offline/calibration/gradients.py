# SPDX-License-Identifier: Apache-2.0
"""How much the model's predictions feel a change of each linear's output, block by block and back.

The KL divergence between the model's own predictions and those under a small change of some outputs
is half the quadratic form of the Fisher information: with labels drawn from the model's predictions
and g the gradient of their summed negative log-likelihood with respect to a linear's output, ``KL ~
1/2 E[(g . dy)^2]`` (Amari 1998; K-FAC, Martens and Grosse 2015, takes it apart into one factor of
the input and one of the output, as is done here).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.block_runner import BlockRunner, StandIn, scratch_tensor
from svsk_offline.calibration.expert_tokens import ExpertPools, fill_up_experts
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.room import UNLIMITED, Room, give_back
from svsk_offline.calibration.stages import turns
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.storage.decoder_blocks import expert_modules, linear_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.world import World

__all__ = ["Observed", "OutputGradients", "draw_labels", "sweep_gradients"]


@dataclass
class OutputGradients:
    """Squared gradients of one linear's output.

    Attributes:
        tokens: float32 [samples, tokens], ``|g_t|^2`` of each token.
        rows: float32 [N], ``E_t[g_tn^2]`` of each output feature.
        fitted: of ``g g^T`` over the tokens of samples to fit but the first :data:`_FIRST` of each,
            in a unit of its own; None where that was not asked for.
        held_out: the same of samples that are held out.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    fitted: InputStatistics | None = None
    held_out: InputStatistics | None = None
    _unit: float = 0.0

    def add_moment(self, slopes: torch.Tensor, *, held_out: bool) -> None:
        """Take in gradients of the output.

        Args:
            slopes: float [rows, N], none of them of a sample's first tokens.
            held_out: of samples that are held out.
        """
        kind = self.held_out if held_out else self.fitted
        if kind is None:
            kind = InputStatistics(slopes.shape[-1], slopes.device, full=True)
            if held_out:
                self.held_out = kind
            else:
                self.fitted = kind
        if not self._unit:
            # Squares of a large model's gradients underflow. A power of two rounds nothing.
            size = float(slopes.float().square().mean().sqrt())
            usable = size and math.isfinite(size)  # what is not finite is refused by its sums
            self._unit = 2.0 ** -round(math.log2(size)) if usable else 1.0
        kind.add(slopes * self._unit)

    def add_up(self, world: World, owner: int, share: float, *, held_out: bool) -> None:
        """Add up what all processes saw, at one of them; tokens stay where they are.

        Args:
            world: the processes, which all come here.
            owner: the one that gets the sums.
            share: of all samples that are this process's.
            held_out: whether any of all samples is held out.
        """
        if world.size == 1:
            return
        self.rows *= share
        world.add(self.rows, owner)
        if self.fitted is None:
            return
        if held_out and self.held_out is None:  # none of this process's
            self.held_out = InputStatistics(len(self.rows), self.rows.device, full=True)
        factor = (max(world.everywhere(self._unit)) / self._unit) ** 2  # units are powers of two
        for kind in (self.fitted, self.held_out):
            if kind is not None:
                kind.add_up(world, owner, factor)


_FIRST: Final = 4
"""First tokens of a sample whose gradients say nothing of the others'.

Attention sinks: of the squared gradients of SmolLM2's v_proj 94% are theirs, in directions that no
other token has.
"""


@dataclass
class Observed:
    """What a sweep gathers of a block's linears, by their names below it.

    Attributes:
        names: those that were looked at; of the others nothing is here.
        gradients: of their outputs.
        fitted: of their inputs, each token weighted by its squared gradient, over samples to fit.
        held_out: over samples that are held out; nothing without such samples.
    """

    names: tuple[str, ...]
    gradients: dict[str, OutputGradients] = field(default_factory=dict)
    fitted: dict[str, InputStatistics] = field(default_factory=dict)
    held_out: dict[str, InputStatistics] = field(default_factory=dict)


Visit = Callable[[int, nn.Module, Observed], None]
"""Called per block, last block first, and where it takes turns per turn: with its number, the
loaded block, and what was gathered, which may be emptied on the way."""


def sweep_gradients(
    source: ModelSource,
    calibration: CalibrationSet,
    device: torch.device,
    dtype: torch.dtype,
    visit: Visit,
    *,
    full: bool,
    moments: bool = False,
    held_out: int = 0,
    seed: int = 0,
    places: Sequence[int] | None = None,
    room: Room = UNLIMITED,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    start: tuple[int, torch.Tensor] | None = None,
    passed: Callable[[int, torch.Tensor], None] = lambda index, gradient: None,
) -> None:
    """Run the samples forward through the model and the gradient of their loss back.

    One block is in memory at a time.

    The inputs of all blocks are kept, in memory or in a temporary file; the way back runs each
    block again from them, several times where what is gathered of its linears takes turns.

    Args:
        source: the dense model.
        calibration: the samples.
        device: where blocks run.
        dtype: floating dtype they run in.
        visit: what to do with each block's gradients.
        full: give ``visit`` whole second-moment matrices, not only their diagonals.
        moments: gather the second moments of the gradients of each output as well.
        held_out: samples, the last ones, whose inputs are kept apart.
        seed: of the labels drawn from the model's predictions.
        places: of each sample among those of all processes, ascending: it gets the labels that it
            gets in one process. None where these are all there are.
        room: what may be held at a time.
        scratch: folder for temporary files.
        progress: called with the number of blocks passed, both ways, and their total.
        start: the last block that an interrupted sweep passed on its way back, and the gradient
            that it gave to ``passed`` there; None for a sweep from the start.
        passed: called after ``visit`` with the block's number and the gradient of the loss with
            respect to its inputs, float [samples, tokens, features], which changes afterwards.

    Raises:
        SvskError: the gradient is not finite.
    """
    name, blocks = source.blocks
    runner = BlockRunner(
        source,
        calibration,
        device,
        dtype,
        memory_limit=room.hidden,
        scratch=scratch,
        held_out=held_out,
    )
    inputs, file = scratch_tensor((len(blocks), *runner.hidden.shape), dtype, room.hidden, scratch)
    try:
        left = len(blocks) if start is None else start[0]
        for index, block in enumerate(blocks[:left]):
            inputs[index] = runner.hidden.to(inputs)
            source.load(block, f"{name}.{index}.", dtype, device)
            runner.advance(index, block)
            source.unload(block)
            progress(index + 1, 2 * len(blocks))
        gradient = runner.hidden
        if start is None:
            _loss_gradient(source, calibration.tokens, runner, seed, places)
        else:
            gradient.copy_(start[1])
        for index in reversed(range(left)):
            source.load(blocks[index], f"{name}.{index}.", dtype, device)
            back = _WayBack(runner, index, blocks[index], inputs[index], gradient, full, moments)
            for observed in back.in_turns(room.statistics):
                for key, gradients in observed.gradients.items():
                    if not bool(torch.isfinite(gradients.rows).all()):
                        raise SvskError(
                            f"{name}.{index}.{key}: its output's gradient is not finite on the"
                            " calibration text. Is a weight of the model or of its head as good"
                            " as infinite?"
                        )
                visit(index, blocks[index], observed)
            source.unload(blocks[index])
            passed(index, gradient)
            progress(2 * len(blocks) - index, 2 * len(blocks))
    finally:
        runner.close()
        if file is not None:
            file.close()


class _WayBack:
    """The way of the loss's gradient back through one block.

    Args:
        runner: of the samples.
        index: number of the block.
        block: the loaded block.
        inputs: of the block, [samples, tokens, features].
        gradient: of the loss with respect to the block's outputs, likewise.
        full: gather whole second moments of the linears' inputs.
        moments: gather those of their outputs' gradients.
    """

    def __init__(
        self,
        runner: BlockRunner,
        index: int,
        block: nn.Module,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
        full: bool,
        moments: bool,
    ) -> None:
        self._runner, self._index, self._block = runner, index, block
        self._inputs, self._gradient = inputs, gradient
        self._full, self._moments = full, moments
        self._experts = expert_modules(block)
        self._fitted = len(inputs) - runner.held_out

    def in_turns(self, room: int | None) -> Iterator[Observed]:
        """What is gathered of all linears, as many at a time as there is room for.

        With the last turn ``gradient`` becomes that with respect to the block's inputs.

        Args:
            room: bytes; None for no limit. A turn's moments are to be dropped before the next.
        """
        linears = dict(linear_modules(self._block))
        groups = [[*linears]]
        if room is not None:
            sizes = (((name,), self._size(module)) for name, module in linears.items())
            groups = turns(sizes, room)
        mixed = [group for group in groups if any(name in self._experts for name in group)]
        pools = ExpertPools()
        if len(mixed) > 1:  # an expert may take what it is missing from those of other turns
            for group in mixed:
                observed = Observed(tuple(group))
                self._run(observed, moments=False, last=False)
                pools.add(self._block, observed.fitted)
                observed.fitted.clear()
        for group in groups:
            observed = Observed(tuple(group))
            self._run(observed, moments=self._moments, last=group is groups[-1])
            if len(mixed) > 1:
                pools.fill_up(self._block, observed.fitted, group)
            else:
                fill_up_experts(self._block, observed.fitted)
            for name in group:
                if name in self._experts and name not in observed.gradients:
                    observed.gradients[name] = self._none(linears[name].out_features)
            yield observed
            if room is not None:
                give_back()

    def _size(self, module: nn.Linear) -> int:
        """Bytes of what is gathered of a linear."""
        kinds = 2 if self._runner.held_out else 1
        wide = module.in_features ** (2 if self._full else 1)
        return 4 * kinds * (wide + (module.out_features**2 if self._moments else 0))

    def _none(self, features: int) -> OutputGradients:
        """Of an expert that no token was routed to."""
        return OutputGradients(
            torch.zeros(self._inputs.shape[:2]), torch.zeros(features, device=self._runner.device)
        )

    def _run(self, observed: Observed, *, moments: bool, last: bool) -> None:
        """Run the block once, forward and back; only the last time the gradient moves on."""
        runner, tokens = self._runner, self._inputs.shape[:2]

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
            def after(module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> None:
                if output.requires_grad:
                    part, sources = window, given[0].detach()
                    places = self._experts[name].routed if name in self._experts else None
                    output.register_hook(
                        lambda gradient: note(name, part, places, sources, gradient)
                    )

            return after

        def note(
            name: str,
            part: slice,
            places: torch.Tensor | None,
            inputs: torch.Tensor,
            slope: torch.Tensor,
        ) -> None:
            # Some blocks flatten samples and tokens.
            squares = slope.detach().float().flatten(0, -2).square()
            if name not in observed.gradients:
                observed.gradients[name] = self._none(squares.shape[-1])
            kind = observed.fitted if part.stop <= self._fitted else observed.held_out
            if name not in kind:
                kind[name] = InputStatistics(inputs.shape[-1], runner.device, full=self._full)
            total = observed.gradients[name]
            per_token = squares.sum(1)
            total.rows += squares.sum(0) / tokens.numel()
            if places is None:
                places = torch.arange(len(per_token), device=per_token.device)
            if moments:
                later = slope.detach().flatten(0, -2)[places % tokens[1] >= _FIRST]
                if len(later):
                    total.add_moment(later, held_out=part.stop > self._fitted)
            total.tokens[part].view(-1)[places.cpu()] = per_token.cpu()
            kind[name].add(inputs, per_token)

        hooks = [
            self._block.get_submodule(name).register_forward_hook(hook(name))
            for name in observed.names
        ]
        try:
            for window in runner.batches():  # the hooks read it
                start = self._inputs[window].to(runner.device, runner.dtype).requires_grad_()
                with torch.enable_grad():
                    output = runner.forward(self._index, self._block, start)
                (back,) = torch.autograd.grad(output, start, self._gradient[window].to(output))
                if last:
                    self._gradient[window] = back.to(self._gradient)
        finally:
            for handle in hooks:
                handle.remove()


def _loss_gradient(
    source: ModelSource,
    tokens: torch.Tensor,
    runner: BlockRunner,
    seed: int,
    places: Sequence[int] | None,
) -> None:
    """Turn outputs of the last block into the gradient of the loss with respect to them, in place.

    The loss is the summed negative log-likelihood of labels drawn from the model's own predictions.
    """
    hidden, device, dtype = runner.hidden, runner.device, runner.dtype
    current = hidden[:1]
    given = StandIn(source.blocks[1][-1], lambda *_: current, members=runner.members)
    generator = torch.Generator(device).manual_seed(seed)
    before = 0
    with source.replaced_blocks([given]) as model, source.loaded_outside(dtype, device):
        for index, sample in enumerate(tokens):
            place = index if places is None else places[index]
            for _ in range(before, place):  # samples of other processes
                _uniform(len(sample), generator)
            before = place + 1
            current = hidden[index : index + 1].to(device, dtype).requires_grad_()
            with torch.enable_grad():
                logits = model(input_ids=sample.unsqueeze(0).to(device), use_cache=False).logits
            # Of the loss with respect to the logits, but for the labels.
            slope = logits[0].detach().float().softmax(-1)
            labels = draw_labels(slope, generator)
            slope[torch.arange(len(labels), device=device), labels] -= 1
            (back,) = torch.autograd.grad(logits, current, slope.unsqueeze(0).to(logits))
            hidden[index] = back[0].to(hidden)


def draw_labels(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label per row, by inversion: ``torch.multinomial`` is many times slower here.

    Args:
        probabilities: float [T, V], on the generator's device.
        generator: seeded.

    Returns:
        int64 [T]; a label of probability 0 is never drawn, except by a uniform number of exactly 0.
    """
    running = probabilities.cumsum(-1)
    uniform = _uniform(len(running), generator)
    drawn = torch.searchsorted(running, uniform * running[:, -1:]).clamp_(max=running.shape[-1] - 1)
    return drawn.squeeze(1)


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 1, generator=generator, device=generator.device)
