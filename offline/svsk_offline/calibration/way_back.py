# SPDX-License-Identifier: Apache-2.0
"""The way of the loss's gradient back through one block, and what is gathered on it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.calibration.expert_tokens import fill_up_experts
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.turns import each_turn, experts_of_turns, turns
from svsk_offline.storage.decoder_blocks import expert_modules, linear_modules
from svsk_offline.world import World

__all__ = ["Observed", "OutputGradients", "WayBack"]


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


class WayBack:
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
        pools = experts_of_turns(self._block, groups, self._fitted_alone)
        for group in each_turn(groups, room):
            observed = Observed(tuple(group))
            self._run(observed, moments=self._moments, last=group is groups[-1])
            fill_up_experts(self._block, observed.fitted, group, pools)
            for name in group:
                if name in self._experts and name not in observed.gradients:
                    observed.gradients[name] = self._none(linears[name].out_features)
            yield observed

    def _fitted_alone(self, group: Sequence[str]) -> dict[str, InputStatistics]:
        """Second moments of the inputs of some linears, over the samples to fit."""
        observed = Observed(tuple(group))
        self._run(observed, moments=False, last=False, which="fitted")
        return observed.fitted

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

    def _run(
        self,
        observed: Observed,
        *,
        moments: bool,
        last: bool,
        which: Literal["all", "fitted"] = "all",
    ) -> None:
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
            for window in runner.batches(which):  # the hooks read it
                start = self._inputs[window].to(runner.device, runner.dtype).requires_grad_()
                with torch.enable_grad():
                    output = runner.forward(self._index, self._block, start)
                (back,) = torch.autograd.grad(output, start, self._gradient[window].to(output))
                if last:
                    self._gradient[window] = back.to(self._gradient)
        finally:
            for handle in hooks:
                handle.remove()
