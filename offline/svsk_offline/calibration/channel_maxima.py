# SPDX-License-Identifier: Apache-2.0
"""Magnitudes of a block's channels, and which linears read the output of which norm."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.storage.decoder_blocks import linear_modules

__all__ = ["MOMENT", "BlockMaxima", "LinearInput", "OutputChannels", "collect_maxima"]

MOMENT: Final = 8
"""Power of the magnitudes whose mean stands for those that a rounding of few bits has to reach."""


@dataclass
class LinearInput:
    """One tensor that linears of a block read.

    Attributes:
        maxima: float32 [K], ``max |x|`` of each channel over all tokens.
        linears: names below the block of those that read it, in the order in which they do.
        norm: name below the block of the module with a vector ``weight`` that gives it, None where
            there is none.
    """

    maxima: torch.Tensor
    linears: list[str] = field(default_factory=list)
    norm: str | None = None


@dataclass
class OutputChannels:
    """Sums over all that a module gave, for each entry of its last dimension.

    Attributes:
        maxima: float32 [features], ``max |x|``.
        squares: float64 [features], ``sum x^2``.
        powers: float64 [features], the sum of magnitudes to the power :data:`MOMENT`; in float32
            they would be infinite from 6e4 on.
        count: of what was summed.
    """

    maxima: torch.Tensor
    squares: torch.Tensor
    powers: torch.Tensor
    count: int

    @classmethod
    def of(cls, output: torch.Tensor) -> "OutputChannels":
        """Of one tensor, float [..., features]."""
        rows = output.flatten(0, -2).double()
        powers = rows.abs().pow(MOMENT).sum(0)
        return cls(_maxima(output), rows.square().sum(0), powers, len(rows))

    def add(self, other: "OutputChannels") -> None:
        """Take in what came later."""
        torch.maximum(self.maxima, other.maxima, out=self.maxima)
        self.squares += other.squares
        self.powers += other.powers
        self.count += other.count


@dataclass
class BlockMaxima:
    """What was seen of a block.

    Attributes:
        inputs: of its linears, in the order in which they were first read.
        outputs: of the last dimension of what modules give, by their names below the block.
    """

    inputs: list[LinearInput] = field(default_factory=list)
    outputs: dict[str, OutputChannels] = field(default_factory=dict)


class _Watch:
    """Hooks that see one forward pass after another.

    A tensor is known by where its values lie. All that one pass gives are held until the next
    begins, so that no place is used twice.
    """

    def __init__(self) -> None:
        self.found = BlockMaxima()
        self._of: dict[str, LinearInput] = {}
        self._norms: list[tuple[torch.Tensor, str]] = []
        self._read: list[tuple[torch.Tensor, LinearInput]] = []

    def begin(self) -> None:
        """Forget the tensors of the pass before."""
        self._norms.clear()
        self._read.clear()

    def norm(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._norms.append((output, name))

        return after

    def linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, given: tuple[Any, ...]) -> None:
            tensor = given[0].detach()
            read = next((one for known, one in self._read if _same(known, tensor)), None)
            if read is None:
                read = self._of.get(name) or self._new(tensor)
                torch.maximum(read.maxima, _maxima(tensor), out=read.maxima)
                self._read.append((tensor, read))
            if name not in self._of:
                self._of[name] = read
                read.linears.append(name)

        return before

    def output(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def after(module: nn.Module, given: Any, output: torch.Tensor) -> None:
            new, outputs = OutputChannels.of(output.detach()), self.found.outputs
            if name in outputs:
                outputs[name].add(new)
            else:
                outputs[name] = new

        return after

    def _new(self, tensor: torch.Tensor) -> LinearInput:
        norm = next((name for known, name in self._norms if _same(known, tensor)), None)
        read = LinearInput(torch.zeros(tensor.shape[-1], device=tensor.device), norm=norm)
        self.found.inputs.append(read)
        return read


@torch.no_grad()
def collect_maxima(
    runner: BlockRunner, index: int, block: nn.Module, outputs: Collection[str] = ()
) -> BlockMaxima:
    """Run every sample through block ``index``, which is loaded, and keep its outputs.

    Args:
        runner: holds the samples.
        index: number of the block.
        block: the loaded block.
        outputs: names below the block of modules whose outputs are looked at as well.
    """
    watch = _Watch()
    hooks = [
        module.register_forward_hook(watch.norm(name))
        for name, module in block.named_modules()
        if _is_norm(module)
    ]
    hooks += [
        module.register_forward_pre_hook(watch.linear(name))
        for name, module in linear_modules(block)
    ]
    hooks += [
        block.get_submodule(name).register_forward_hook(watch.output(name)) for name in outputs
    ]
    try:
        for part in runner.batches():
            watch.begin()
            output = runner.forward(index, block, runner.hidden[part])
            runner.hidden[part] = output.to(runner.hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a vector ``weight``, at most a ``bias`` beside it, and no parts."""
    own = dict(module.named_parameters())
    vectors = all(parameter.ndim == 1 for parameter in own.values())
    return "weight" in own and vectors and own.keys() <= {"weight", "bias"}


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one pass are the same values in the same place."""
    return left is right or (
        left.data_ptr() == right.data_ptr()
        and left.numel() == right.numel()
        and left.shape[-1] == right.shape[-1]
    )


def _maxima(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().flatten(0, -2).amax(0).float()
