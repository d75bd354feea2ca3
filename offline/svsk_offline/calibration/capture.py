# SPDX-License-Identifier: Apache-2.0
"""Running calibration samples through a model one decoder block at a time."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.errors import SvskError
from svsk_offline.source import ModelSource, linear_modules

__all__ = ["BlockRunner", "InputStatistics"]


class InputStatistics:
    """Second moments of one linear's input, accumulated in float32 sample by sample.

    Args:
        features: number of input channels K.
        device: where the inputs are.
        full: keep the whole matrix ``E[x x^T]``; otherwise only its diagonal.
    """

    def __init__(self, features: int, device: torch.device, *, full: bool) -> None:
        shape = (features, features) if full else (features,)
        self._sum = torch.zeros(shape, device=device)
        self._first = torch.zeros(shape, device=device)
        self._tokens = self._samples = 0
        self.prepared: dict[Any, Any] = {}
        """Whatever is derived from these statistics once for all linears that share them, by the deriver's key."""

    def add(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of some samples, float [samples, tokens, K], or [tokens, K] without first tokens."""
        self._accumulate(self._sum, inputs.detach().reshape(-1, inputs.shape[-1]).float())
        self._tokens += inputs[..., 0].numel()
        if inputs.ndim == 3:  # a flattened input does not say where samples begin
            self._accumulate(self._first, inputs.detach()[:, 0].float())
            self._samples += inputs.shape[0]

    @staticmethod
    def _accumulate(total: torch.Tensor, rows: torch.Tensor) -> None:
        if total.ndim == 2:
            total.addmm_(rows.T, rows)
        else:
            total += rows.square().sum(0)

    @property
    def second_moment(self) -> torch.Tensor:
        """``E[x_j^2]``, float32 [K]."""
        return (self._sum.diagonal() if self._sum.ndim == 2 else self._sum) / max(1, self._tokens)

    @property
    def hessian(self) -> torch.Tensor:
        """``E[x x^T]`` over all tokens, float32 [K, K]."""
        return self._full(self._sum) / max(1, self._tokens)

    @property
    def first_hessian(self) -> torch.Tensor:
        """``E[x x^T]`` over the first token of each sample, float32 [K, K]."""
        return self._full(self._first) / max(1, self._samples)

    @staticmethod
    def _full(total: torch.Tensor) -> torch.Tensor:
        if total.ndim != 2:
            raise ValueError("Only the diagonal was accumulated; create the statistics with full=True.")
        return total


_OnCall = Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the blocks' arguments are known."""


class _Recorder(nn.Module):
    """Stands in for a decoder block: notes what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module, on_call: _OnCall) -> None:
        super().__init__()
        self._attributes = block.__dict__
        self._on_call = on_call

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, such as attention_type, to choose a mask.
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._on_call(hidden_states, args, kwargs)
        return hidden_states


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
        self._file: Any = None
        self.hidden = self._embed(calibration.tokens, memory_limit, scratch)

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, *, collect: bool, full: bool = False) -> dict[str, InputStatistics]:
        """Run every sample through block ``index``, whose weights are loaded, and keep its outputs.

        Args:
            index: number of the block.
            block: the loaded block.
            collect: gather the inputs' statistics.
            full: gather whole second-moment matrices, not only their diagonals.

        Returns:
            Statistics by the name of each ``nn.Linear`` below the block; linears fed by the same tensor share them.
        """
        args, kwargs = self._calls[index]
        statistics: dict[str, InputStatistics] = {}
        hooks = self._watch(block, statistics, full) if collect else []
        try:
            for start in range(0, self.hidden.shape[0], self._batch):
                part = slice(start, start + self._batch)
                output = block(self.hidden[part].to(self.device, self.dtype), *args, **kwargs)
                self.hidden[part] = (output[0] if isinstance(output, tuple) else output).to(self.hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return statistics

    @property
    def on_disk(self) -> bool:
        """Whether the hidden states are in a file."""
        return self._file is not None

    def close(self) -> None:
        """Remove the temporary file, if there is one."""
        if self._file is not None:
            self._file.close()

    def _watch(self, block: nn.Module, statistics: dict[str, InputStatistics], full: bool) -> list[Any]:
        """Hooks that add each distinct input tensor to its moments once."""
        seen: dict[str, Any] = {"tensor": None, "statistics": None}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                tensor = inputs[0]
                if tensor is seen["tensor"]:  # q, k and v, or gate and up
                    statistics[name] = seen["statistics"]
                    return
                if name not in statistics:
                    statistics[name] = InputStatistics(tensor.shape[-1], self.device, full=full)
                own = statistics[name]
                own.add(tensor)
                seen.update(tensor=tensor, statistics=own)

            return before

        return [module.register_forward_pre_hook(hook(name)) for name, module in linear_modules(block)]

    @torch.no_grad()
    def _embed(self, tokens: torch.Tensor, memory_limit: int, scratch: Path | None) -> torch.Tensor:
        """Inputs of the first block for all samples; the arguments of every block are noted on the way."""
        name, blocks = self.source.blocks
        model: Any = self.source.model
        embedding = model.get_input_embeddings()
        prefix = next(key for key, module in model.named_modules() if module is embedding)
        self.source.load(embedding, f"{prefix}.", self.dtype, self.device)
        inputs: list[torch.Tensor] = []

        def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(self._calls) < len(blocks):
                self._calls.append((args, kwargs))
            if not inputs:
                inputs.append(hidden)
            if len(self._calls) == len(blocks):
                raise _Stop

        parent = model.get_submodule(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        setattr(parent, attribute, nn.ModuleList(_Recorder(block, note) for block in blocks))
        for buffer_owner in model.modules():  # rotary tables and the like
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, key, buffer.to(self.device))
        hidden: torch.Tensor | None = None
        try:
            for index, sample in enumerate(tokens):
                inputs.clear()
                with contextlib.suppress(_Stop):
                    model(input_ids=sample.unsqueeze(0).to(self.device), use_cache=False)
                if hidden is None:
                    shape = (len(tokens), *inputs[0].shape[1:])
                    hidden = self._allocate(shape, inputs[0].dtype, memory_limit, scratch)
                hidden[index] = inputs[0][0].to(hidden)
        except NotImplementedError as error:  # a parameter that is still on the meta device
            raise SvskError(
                f"{self.source.folder}: {type(model).__name__} has parameters before its decoder blocks besides the "
                "token embedding; such models are not supported."
            ) from error
        finally:
            setattr(parent, attribute, blocks)
            self.source.unload(embedding)
        assert hidden is not None, "a calibration set has at least one sample"
        return hidden

    def _allocate(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_limit: int, scratch: Path | None
    ) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if size <= memory_limit:
            return torch.empty(shape, dtype=dtype)
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - has no name, closed by close()
        raw = np.memmap(self._file, dtype=np.uint8, mode="w+", shape=(size,))
        return torch.from_numpy(raw).view(dtype).view(shape)
