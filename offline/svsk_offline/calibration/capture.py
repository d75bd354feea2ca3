# SPDX-License-Identifier: Apache-2.0
"""Running calibration samples through a model one decoder block at a time."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from svsk_offline.calibration.arguments import Comparison, containers
from svsk_offline.calibration.statistics import InputStatistics
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.errors import SvskError
from svsk_offline.source import ModelSource, linear_modules

__all__ = ["BlockRunner", "StandIn", "scratch_tensor"]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the blocks' arguments are known."""


class StandIn(nn.Module):
    """Takes the place of a decoder block; ``respond`` gives its output for hidden states, arguments and keywords."""

    def __init__(
        self, block: nn.Module, respond: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]
    ) -> None:
        super().__init__()
        self._attributes = block.__dict__
        self._respond = respond

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, such as attention_type, to choose a mask.
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._respond(hidden_states, args, kwargs)


class BlockRunner:
    """Hidden states of all calibration samples, moved from block to block.

    Only one block's weights and one batch of activations are in memory; the hidden states themselves are kept in a
    memory-mapped temporary file once they exceed ``memory_limit``.

    Args:
        source: the dense model.
        calibration: the samples.
        device: where blocks run.
        dtype: floating dtype they run in.
        batch_tokens: tokens per forward pass of a block.
        memory_limit: bytes of hidden states to keep in memory.
        scratch: folder for the temporary file.
    """

    def __init__(
        self,
        source: ModelSource,
        calibration: CalibrationSet,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_tokens: int = 2048,
        memory_limit: int = 2 << 30,
        scratch: Path | None = None,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._batch = max(1, batch_tokens // calibration.tokens.shape[1])
        self._file: IO[bytes] | None = None
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
    ) -> dict[str, InputStatistics]:
        """Run every sample through block ``index``, whose weights are loaded, and gather its linears' inputs.

        Args:
            index: number of the block.
            block: the loaded block.
            full: gather whole second-moment matrices, not only their diagonals.
            first: names of linears below the block whose first tokens are gathered apart as well.
            weights: by the name of each linear below the block, how much each token counts, float [samples, tokens];
                linears of one input that name the same tensor share their statistics.
            advance: keep the block's outputs as the next block's inputs.

        Returns:
            Statistics by the name of each ``nn.Linear`` below the block; linears fed by the same tensor share them.
        """
        statistics: dict[str, InputStatistics] = {}
        window: list[slice] = [slice(0)]

        def create(name: str, features: int) -> InputStatistics:
            return InputStatistics(features, self.device, full=full, first=name in first)

        hooks = self._watch(block, statistics, create, weights, window)
        try:
            for part in self.batches():
                window[0] = part
                output = self.forward(index, block, self.hidden[part])
                if advance:
                    self.hidden[part] = output.to(self.hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return statistics

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Run every sample through block ``index``, whose weights are loaded, and keep its outputs."""
        for part in self.batches():
            self.hidden[part] = self.forward(index, block, self.hidden[part]).to(self.hidden)

    def batches(self) -> Iterator[slice]:
        """Slices of the samples, each as many as run at a time."""
        for start in range(0, self.hidden.shape[0], self._batch):
            yield slice(start, start + self._batch)

    def forward(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output [samples, tokens, features] of block ``index`` for some samples' inputs of the same shape."""
        args, kwargs = copy.deepcopy(self._calls[index])  # a block may fill caches and change masks in place
        output = block(hidden.to(self.device, self.dtype), *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @property
    def on_disk(self) -> bool:
        """Whether the hidden states are in a file."""
        return self._file is not None

    def close(self) -> None:
        """Remove the temporary file, if there is one."""
        if self._file is not None:
            self._file.close()

    def _watch(
        self,
        block: nn.Module,
        statistics: dict[str, InputStatistics],
        create: Callable[[str, int], InputStatistics],
        weights: Mapping[str, torch.Tensor] | None,
        window: list[slice],
    ) -> list[Any]:
        """Hooks that add each distinct input tensor, under each distinct weighting, to its moments once."""
        seen: dict[str, Any] = {"tensor": None, "weights": None, "statistics": None}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            own_weights = None if weights is None else weights[name]

            def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                tensor = inputs[0]
                if tensor is seen["tensor"] and own_weights is seen["weights"]:  # q, k and v, or gate and up
                    statistics[name] = seen["statistics"]
                    return
                if name not in statistics:
                    statistics[name] = create(name, tensor.shape[-1])
                own = statistics[name]
                own.add(tensor, None if own_weights is None else own_weights[window[0]])
                seen.update(tensor=tensor, weights=own_weights, statistics=own)

            return before

        return [module.register_forward_pre_hook(hook(name)) for name, module in linear_modules(block)]

    @torch.no_grad()
    def _embed(self, tokens: torch.Tensor, memory_limit: int, scratch: Path | None) -> torch.Tensor:
        """Inputs of the first block for all samples; the arguments of every block are noted on the way."""
        blocks = self.source.blocks[1]
        model: Any = self.source.model
        embedding = model.get_input_embeddings()
        prefix = next(key for key, module in model.named_modules() if module is embedding)
        self.source.load(embedding, f"{prefix}.", self.dtype, self.device)
        inputs: list[torch.Tensor] = []

        index = 0  # of the sample
        comparison = Comparison()

        def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            number = len(inputs)
            inputs.append(hidden)
            if index == 0:
                self._calls.append(containers((args, kwargs)))
            elif (differs := comparison.difference(self._calls[number], (args, kwargs))) is not None:
                raise SvskError(
                    f"{self.source.folder}: {type(model).__name__} calls its decoder blocks with arguments that depend "
                    f"on the tokens (block {number}, {differs}); such models are not supported."
                )
            if len(inputs) == len(blocks):
                raise _Stop
            return hidden

        for buffer_owner in model.modules():  # rotary tables and the like
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, key, buffer.to(self.device))
        hidden: torch.Tensor | None = None
        try:
            with self.source.replaced_blocks(StandIn(block, note) for block in blocks) as model:
                for index, sample in enumerate(tokens):
                    inputs.clear()
                    comparison = Comparison()  # its memory is of one sample's objects
                    with contextlib.suppress(_Stop):
                        model(input_ids=sample.unsqueeze(0).to(self.device), use_cache=False)
                    if hidden is None:
                        shape = (len(tokens), *inputs[0].shape[1:])
                        hidden, self._file = scratch_tensor(shape, inputs[0].dtype, memory_limit, scratch)
                    hidden[index] = inputs[0][0].to(hidden)
        except NotImplementedError as error:  # a parameter that is still on the meta device
            raise SvskError(
                f"{self.source.folder}: {type(model).__name__} has parameters before its decoder blocks besides the "
                "token embedding; such models are not supported."
            ) from error
        finally:
            self.source.unload(embedding)
        assert hidden is not None, "a calibration set has at least one sample"
        return hidden


def scratch_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, memory_limit: int, folder: Path | None
) -> tuple[torch.Tensor, IO[bytes] | None]:
    """An uninitialised tensor in memory, or in a nameless temporary file of ``folder`` above ``memory_limit`` bytes.

    Returns:
        The tensor, and the file to close when it is no longer used (None in memory).
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size <= memory_limit:
        return torch.empty(shape, dtype=dtype), None
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - has no name, closed by the caller
    try:
        if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end the process without a word
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise SvskError(
            f"{folder}: no room for {size / 1e9:.1f} GB of hidden states ({error.strerror}). Free some, write the "
            "output elsewhere, or lower calibration.samples or gradients.samples."
        ) from error
    raw = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
    return torch.from_numpy(raw).view(dtype).view(shape), file
