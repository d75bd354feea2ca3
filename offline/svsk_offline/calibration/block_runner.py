# SPDX-License-Identifier: Apache-2.0
"""Running calibration samples through a model one decoder block at a time."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
import torch
from torch import nn

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.block_arguments import Comparison, containers
from svsk_offline.calibration.expert_tokens import ExpertPools, fill_up_experts
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.room import UNLIMITED
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.storage.decoder_blocks import expert_modules, linear_modules
from svsk_offline.storage.dense_model import ModelSource

__all__ = ["BlockRunner", "StandIn", "scratch_tensor"]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the blocks' arguments are known."""


class _TakesFirst(Exception):  # noqa: N818 - control flow, not an error
    """The model takes the first of what a block returns, so its blocks return tuples."""


class StandIn(nn.Module):
    """Takes the place of a decoder block.

    ``respond`` gives its output for hidden states, arguments and keywords.

    Args:
        block: the block.
        respond: gives the hidden states that follow.
        members: return them as the first member of a tuple of so many, as the blocks of some models
            do; 0 for no tuple.
    """

    def __init__(
        self,
        block: nn.Module,
        respond: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor],
        *,
        members: int = 0,
    ) -> None:
        super().__init__()
        self._attributes = block.__dict__
        self._respond, self._members = respond, members

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, such as attention_type, to choose a mask.
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._respond(hidden_states, args, kwargs)
        return (output, *[None] * (self._members - 1)) if self._members else output


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block besides the hidden states."""

_MOST_MEMBERS: Final = 3


class _Watcher:
    """Stands in for all blocks of a model, and notes what they are given.

    Args:
        source: the model.
        members: as for :class:`StandIn`.
    """

    def __init__(self, source: ModelSource, members: int) -> None:
        self._kind, self._folder = type(source.model).__name__, source.folder
        self._count = len(source.blocks[1])
        self.stand_ins = [
            StandIn(block, partial(self._note, number), members=members)
            for number, block in enumerate(source.blocks[1])
        ]

    def run(self, model: Any, samples: torch.Tensor) -> tuple[torch.Tensor, list[_Call]]:
        """Inputs of the first block for some samples, and the other arguments of every block.

        Args:
            model: the model, with the stand-ins in place.
            samples: token ids, int64 [samples, tokens].
        """
        self._inputs: list[torch.Tensor] = []
        self._calls: list[_Call] = []
        with contextlib.suppress(_Stop):
            model(input_ids=samples, use_cache=False)
        if len(self._calls) < self._count:
            raise self._unusual()
        return self._inputs[0], self._calls

    def _note(
        self, number: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if number != len(self._inputs):
            raise self._unusual()
        self._inputs.append(hidden)
        self._calls.append(containers((args, kwargs)))
        if hidden.ndim < self._inputs[0].ndim:
            raise _TakesFirst
        if len(self._inputs) == self._count:
            raise _Stop
        return hidden

    def _unusual(self) -> SvskError:
        return SvskError(
            f"{self._folder}: {self._kind} does not run its decoder blocks once each, one after the"
            " other; such models are not supported."
        )


class BlockRunner:
    """Hidden states of all calibration samples, moved from block to block.

    Only one block's weights and one batch of activations are in memory; the hidden states
    themselves are kept in a memory-mapped temporary file once they exceed ``memory_limit``.

    Args:
        source: the dense model.
        calibration: the samples.
        device: where blocks run.
        dtype: floating dtype they run in.
        batch_tokens: tokens per forward pass of a block.
        memory_limit: bytes of hidden states to keep in memory.
        scratch: folder for the temporary file.
        held_out: how many samples, the last ones, are not gathered by :meth:`collect`.
        apart: whether samples are held out, here or in another process; None: here.
    """

    def __init__(
        self,
        source: ModelSource,
        calibration: CalibrationSet,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_tokens: int = 2048,
        memory_limit: int = UNLIMITED.hidden,
        scratch: Path | None = None,
        held_out: int = 0,
        apart: bool | None = None,
    ) -> None:
        self.held_out = held_out
        self.apart = held_out > 0 if apart is None else apart
        self.tokens = calibration.tokens
        self.source, self.device, self.dtype = source, device, dtype
        self._calls: dict[int, list[_Call]] = {}  # of every block, by the number of samples
        self._batch = max(1, batch_tokens // calibration.tokens.shape[1])
        self.file: IO[bytes] | None = None
        self.members = 0  # of the tuple that a block returns, 0 for no tuple
        self._count = len(calibration.tokens)
        self.hidden = self._embed(calibration.tokens, memory_limit, scratch)

    @torch.no_grad()
    def collect(
        self,
        index: int,
        block: nn.Module,
        *,
        full: bool,
        first: Collection[str] = (),
        weights: Mapping[str, torch.Tensor] | None = None,
        advance: bool = True,
        names: Collection[str] | None = None,
        pools: ExpertPools | None = None,
    ) -> dict[str, InputStatistics]:
        """Run the samples that are fitted through a loaded block; gather its linears' inputs.

        Args:
            index: number of the block.
            block: the loaded block.
            full: gather whole second-moment matrices, not only their diagonals.
            first: names of linears below the block whose first tokens are gathered apart as well.
            weights: by the name of each linear below the block, how much each token counts, float
                [samples, tokens]; linears of one input that name the same tensor share their
                statistics.
            advance: keep the block's outputs as the next block's inputs.
            names: of the linears below the block whose inputs are gathered; None for all.
            pools: of all experts of the block, where only some are named; None where all are.

        Returns:
            Statistics by the name of each ``nn.Linear`` below the block; linears fed by the same
            tensor share them. Those of an expert are of its routed tokens, and filled up as
            :mod:`svsk_offline.calibration.expert_tokens` says.
        """
        statistics: dict[str, InputStatistics] = {}
        window: list[slice] = [slice(0)]

        experts = expert_modules(block)

        def create(name: str, features: int) -> InputStatistics:
            # The inputs of experts do not say where samples begin.
            apart = name in first and name not in experts
            return InputStatistics(features, self.device, full=full, first=apart)

        hooks = self._watch(block, statistics, create, weights, window, names)
        try:
            for part in self.batches("fitted"):
                window[0] = part
                output = self.forward(index, block, self.hidden[part])
                if advance:
                    self.hidden[part] = output.to(self.hidden)
        finally:
            for hook in hooks:
                hook.remove()
        fill_up_experts(block, statistics, names, pools)
        return statistics

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Run every sample through block ``index``, which is loaded, and keep its outputs."""
        for part in self.batches():
            self.hidden[part] = self.forward(index, block, self.hidden[part]).to(self.hidden)

    def batches(self, which: Literal["all", "fitted", "held out"] = "all") -> Iterator[slice]:
        """Slices of the samples, each as many as run at a time.

        None has samples of both kinds, so a block's outputs have the same bits whether the kinds
        are run in one pass or in two.
        """
        count = self._count
        fitted = count - self.held_out
        ends = {"all": (0, fitted, count), "fitted": (0, fitted), "held out": (fitted, count)}
        for first, last in pairwise(ends[which]):
            for start in range(first, last, self._batch):
                yield slice(start, min(start + self._batch, last))

    def forward(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of block ``index`` for inputs of samples, both [samples, tokens, features]."""
        # Copied, as a block may fill caches and change masks in place.
        args, kwargs = copy.deepcopy(self._calls[len(hidden)][index])
        output = block(hidden.to(self.device, self.dtype), *args, **kwargs)
        self.members = len(output) if isinstance(output, tuple) else 0
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def close(self) -> None:
        """Remove the temporary file, if there is one."""
        if self.file is not None:
            self.file.close()

    def _watch(
        self,
        block: nn.Module,
        statistics: dict[str, InputStatistics],
        create: Callable[[str, int], InputStatistics],
        weights: Mapping[str, torch.Tensor] | None,
        window: list[slice],
        names: Collection[str] | None,
    ) -> list[Any]:
        """Hooks that add each input tensor, under each weighting, to its moments once."""
        seen: dict[str, Any] = {"tensor": None, "weights": None, "statistics": None}
        experts = expert_modules(block)

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            own_weights = None if weights is None else weights[name]

            def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                tensor = inputs[0]
                # Q, k and v, or gate and up.
                if tensor is seen["tensor"] and own_weights is seen["weights"]:
                    statistics[name] = seen["statistics"]
                    return
                if name not in statistics:
                    statistics[name] = create(name, tensor.shape[-1])
                shared = statistics[name]
                counts = None if own_weights is None else own_weights[window[0]]
                if counts is not None and name in experts:
                    counts = counts.flatten()[experts[name].routed.cpu()]
                shared.add(tensor, counts)
                seen.update(tensor=tensor, weights=own_weights, statistics=shared)

            return before

        return [
            module.register_forward_pre_hook(hook(name))
            for name, module in linear_modules(block)
            if names is None or name in names
        ]

    @torch.no_grad()
    def _embed(self, tokens: torch.Tensor, memory_limit: int, scratch: Path | None) -> torch.Tensor:
        """Inputs of the first block for all samples; the blocks' arguments are noted."""
        with self.source.loaded_outside(self.dtype, self.device, head=False):
            watcher = self._watcher(tokens[:1].to(self.device))
            with self.source.replaced_blocks(watcher.stand_ins) as model:
                hidden: torch.Tensor | None = None
                for index, sample in enumerate(tokens):
                    first, calls = watcher.run(model, sample.unsqueeze(0).to(self.device))
                    if index == 0:
                        self._calls[1] = calls
                    self._compare(self._calls[1], calls)
                    if hidden is None:
                        shape = (len(tokens), *first.shape[1:])
                        hidden, self.file = scratch_tensor(
                            shape, first.dtype, memory_limit, scratch
                        )
                    hidden[index] = first[0].to(hidden)
                # Masks and the like have as many rows as samples run at a time.
                for count in {part.stop - part.start for part in self.batches()} - {1}:
                    self._calls[count] = watcher.run(model, tokens[:count].to(self.device))[1]
        assert hidden is not None, "a calibration set has at least one sample"
        return hidden

    def _compare(self, first: list[_Call], calls: list[_Call]) -> None:
        """Refuse a model whose blocks' arguments differ from one sample to another."""
        comparison = Comparison()  # its memory is of one sample's objects
        for number, (ours, theirs) in enumerate(zip(first, calls, strict=True)):
            if (differs := comparison.difference(ours, theirs)) is not None:
                raise SvskError(
                    f"{self.source.folder}: {type(self.source.model).__name__} calls its decoder"
                    f" blocks with arguments that depend on the tokens (block {number}, {differs});"
                    " such models are not supported."
                )

    def _watcher(self, sample: torch.Tensor) -> _Watcher:
        """Stand-ins that return what the model expects of its blocks.

        A tensor, or a tuple, which shows when it runs.

        Args:
            sample: token ids, int64 [1, tokens].

        Raises:
            SvskError: the model does not run with any.
        """
        problems: list[Exception] = []
        for members in range(_MOST_MEMBERS + 1):
            watcher = _Watcher(self.source, members)
            try:
                with self.source.replaced_blocks(watcher.stand_ins) as model:
                    watcher.run(model, sample)
            except (SvskError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a model class does with what it does not expect
                problems.append(error)
            else:
                self.members = members
                return watcher
        kind, first = type(self.source.model).__name__, problems[0]
        raise SvskError(
            f"{self.source.folder}: {kind} cannot be run one decoder block at a time"
            f" ({type(first).__name__}: {' '.join(str(first).split())[:300]})."
        ) from first


def scratch_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, memory_limit: int, folder: Path | None
) -> tuple[torch.Tensor, IO[bytes] | None]:
    """An uninitialised tensor in memory, or in a nameless file of ``folder`` if it is too large.

    Returns:
        The tensor, and the file to close when it is no longer used (None in memory).
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size <= memory_limit:
        return torch.empty(shape, dtype=dtype), None
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - has no name, closed by the caller
    try:
        # A sparse file on a full disk would end the process without a word.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise SvskError(
            f"{folder}: no room for {size / 1e9:.1f} GB of hidden states ({error.strerror}). Free"
            " some, write the output elsewhere, or lower calibration.samples or gradients.samples."
        ) from error
    raw = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
    return torch.from_numpy(raw).view(dtype).view(shape), file
