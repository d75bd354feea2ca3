# SPDX-License-Identifier: Apache-2.0
"""The inputs of a block's linears in the dense and in the quantised model, side by side.

What a linear reads in the quantised model differs from what it reads in the dense one by the
errors of all linears before it, those of its own block included. So a block's linears are taken in
stages, in the order in which they run: those of one input together, each stage after the weights
of the stages before are replaced. Gathered all at once, with the block's own linears dense, the
same correction diverges: o_proj and down_proj then make up for errors that q, k, v, gate and up
have made up for already (SmolLM2-135M: KL 0.93 in place of 0.047).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from svsk_offline.calibration.block_runner import BlockRunner, scratch_tensor
from svsk_offline.calibration.cross_moment import CrossMoment, PairedMoments
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.room import UNLIMITED
from svsk_offline.calibration.stages import Stage

__all__ = ["InputPairs", "replaced_weights"]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once an input is known."""


class InputPairs:
    """The samples' hidden states in the dense model, beside a runner's in the quantised one.

    Args:
        runner: of the quantised model, at its first block: what follows the embedding is the same
            in both.
        memory_limit: bytes of hidden states to keep in memory; more go to a temporary file.
        scratch: folder for it.
    """

    def __init__(
        self,
        runner: BlockRunner,
        *,
        memory_limit: int = UNLIMITED.hidden,
        scratch: Path | None = None,
    ) -> None:
        self.runner, self._memory_limit, self._scratch = runner, memory_limit, scratch
        self._files: dict[str, IO[bytes] | None] = {}  # by linear; "" for the hidden states
        self.hidden, self._files[""] = scratch_tensor(
            tuple(runner.hidden.shape), runner.hidden.dtype, memory_limit, scratch
        )
        for part in runner.batches():
            self.hidden[part] = runner.hidden[part]
        self._dense: dict[str, torch.Tensor] = {}  # [samples, tokens, K] that a linear reads

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, stages: Collection[Stage] = ()) -> None:
        """Run every sample through block ``index`` as it is in the dense model.

        Args:
            index: number of the block.
            block: the loaded block, its weights dense.
            stages: what :meth:`gather` will be asked for: the inputs of these are kept until the
                next call.
        """
        self._forget()
        paired = [stage.names[0] for stage in stages if stage.paired]
        samples = len(self.hidden)
        limit = self._memory_limit // max(1, len(paired))
        part = slice(0)
        known: set[str] = set()

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if name in known:
                    return
                known.add(name)  # some models call a linear twice
                given = inputs[0].detach()
                given = given.reshape(part.stop - part.start, -1, given.shape[-1])
                if name not in self._dense:
                    shape = (samples, *given.shape[1:])
                    self._dense[name], self._files[name] = scratch_tensor(
                        shape, given.dtype, limit, self._scratch
                    )
                self._dense[name][part] = given.to(self._dense[name])

            return before

        hooks = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in paired]
        try:
            for part in self.runner.batches():
                known.clear()
                output = self.runner.forward(index, block, self.hidden[part])
                self.hidden[part] = output.to(self.hidden)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def gather(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, torch.Tensor],
        quantised: Mapping[str, torch.Tensor],
        *,
        first: Collection[str] = (),
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, tuple[InputStatistics, PairedMoments]]:
        """Moments of the input of a stage's linears.

        Args:
            index: number of the block.
            block: the loaded block, its weights dense.
            linears: of one of the paired stages that :meth:`advance` was given, in its order, the
                weights by name below the block, float32 [N, K] on the block's device.
            quantised: weights of the linears in the stages before, by their names below the block.
            first: as for :meth:`BlockRunner.collect`.
            weights: likewise.

        Returns:
            By the name of each linear, the second moment of its input in the quantised model over
            the samples that are fitted, and how the dense model's input differs from it, there and
            over those held out, whose tokens count alike.
        """
        name, weight = next(iter(linears.items()))
        apart = any(one in first for one in linears)

        def second() -> InputStatistics:
            return InputStatistics(weight.shape[1], weight.device, full=True, first=apart)

        # Linears of one input whose tokens count alike share their moments.
        alike: dict[int, dict[str, torch.Tensor]] = {}
        for one in linears:
            counts = None if weights is None else weights[one]
            alike.setdefault(id(counts), {})[one] = linears[one]
        own: list[tuple[torch.Tensor | None, InputStatistics, PairedMoments]] = []
        result: dict[str, tuple[InputStatistics, PairedMoments]] = {}
        for those in alike.values():
            counts = None if weights is None else weights[next(iter(those))]
            cross = CrossMoment(those, first=apart)
            own.append((counts, second(), PairedMoments(cross, cross.empty(), second())))
            result |= dict.fromkeys(those, own[-1][1:])
        for samples in ("fitted", "held out"):
            for part in self.runner.batches(samples):
                with replaced_weights(block, quantised):
                    given = self._input(index, block, name, self.runner.hidden[part])
                dense = self._dense[name][part].to(given.device).view(given.shape)
                for counts, statistics, pair in own:
                    if samples == "fitted":
                        count = None if counts is None else counts[part]
                        statistics.add(given, count)
                        pair.fitted.add(dense, given, count)
                    else:  # no gradients were taken of these
                        pair.second.add(given)
                        pair.held_out.add(dense, given)
        return result

    def close(self) -> None:
        """Remove the temporary files, if there are any."""
        self._forget()
        if self._files[""] is not None:
            self._files[""].close()

    def _forget(self) -> None:
        self._dense.clear()
        for name in [name for name in self._files if name]:
            if (file := self._files.pop(name)) is not None:
                file.close()

    def _input(self, index: int, block: nn.Module, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """What a linear of a block reads for inputs of the block, [samples, tokens, K]."""
        found: list[torch.Tensor] = []

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            found.append(inputs[0].detach())
            raise _Stop

        hook = block.get_submodule(name).register_forward_pre_hook(before)
        try:
            self.runner.forward(index, block, hidden)
        except _Stop:
            pass
        finally:
            hook.remove()
        return found[0]


@contextmanager
def replaced_weights(block: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A block with other weights in some linears, by their names below it, for a while."""
    parameters = {name: block.get_parameter(f"{name}.weight") for name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
