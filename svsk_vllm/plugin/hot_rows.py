# SPDX-License-Identifier: Apache-2.0
"""The hot rows of an embedding or output head: one matrix of 8-bit codes is served.

``int4`` and ``int8`` have the same level for the same code, so rows of either kind are rows of
8-bit codes, exactly, and kernels, lookups and reloads are those of ``int8``. What is loaded depends
on the list of hot rows, which may arrive last: a rank keeps what it may need of each tensor, and
puts its rows together when all are there.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from vllm.model_executor.parameter import BasevLLMParameter

from svsk_kernels.codebook import unpack_bytes, unpack_nibbles
from svsk_kernels.layer_kernel import replace_parameters
from svsk_vllm.format import LinearSpec, SvskFormatError
from svsk_vllm.format.hot_rows import hot_rows_problem
from svsk_vllm.format.spec import SCALE_DTYPES
from svsk_vllm.format.suffixes import (
    WEIGHT_HOT_PACKED,
    WEIGHT_HOT_ROWS,
    WEIGHT_HOT_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
)
from svsk_vllm.plugin.arrival import stored_tensor
from svsk_vllm.plugin.sidecar_loader import Arrived, require_dtype, require_shape, same_rows

__all__ = ["HotRows"]

_PIECE: Final = 1 << 24
"""Codes that are unpacked at a time."""


class HotRows:
    """Loads a rank's rows of a table with hot rows, and joins them.

    Args:
        prefix: the layer's name.
        stored: the whole table, with scales of the layer's dtype.
        n: rows of the layer; those beyond ``count`` pad the vocabulary.
        first: the rank's first row of the table.
        count: how many rows of the table it has.
    """

    def __init__(self, prefix: str, stored: LinearSpec, n: int, first: int, count: int) -> None:
        self.prefix, self.stored, self.n = prefix, stored, n
        self.first, self.count = first, count
        hot = stored.scheme.weights.hot_rows
        # Wherever the hot rows are, this rank's others lie in this run of all others.
        self.run = slice(max(0, first - hot), min(stored.n - hot, first + count))

    def register(self, layer: Any, arrived: Arrived) -> None:
        """Register what is loaded: a run of the other rows, and all hot ones.

        Args:
            layer: gets the parameters.
            arrived: counts.
        """
        for name, spec in self.stored.tensors().items():
            run = self.run if name in (WEIGHT_PACKED, WEIGHT_SCALE) else slice(None)
            rows = len(range(*run.indices(spec.shape[0])))
            data = torch.empty(rows, *spec.shape[1:], dtype=spec.dtype)
            loader = _loader(self.prefix, name, spec.shape, run, arrived)
            layer.register_parameter(name, BasevLLMParameter(data=data, weight_loader=loader))

    def join(self, layer: Any, *, counted: bool) -> None:
        """Replace what was loaded by codes and scales as of a layer of codebook ``int8``.

        Rows that pad the vocabulary have scales of zero.

        Args:
            layer: loaded.
            counted: whether they come from a checkpoint: else the list of hot rows is made up too.

        Raises:
            SvskFormatError: the list of hot rows is not one.
        """
        rows = layer.weight_hot_rows.data.long()
        if not counted:
            rows = torch.arange(len(rows), device=rows.device)
        elif problem := hot_rows_problem(rows, self.stored.n):
            raise SvskFormatError(
                f"{self.prefix}.{WEIGHT_HOT_ROWS}: {problem}. The list is damaged: run `svsk"
                " validate` on the folder."
            )
        mine = (rows >= self.first) & (rows < self.first + self.count)
        places = rows[mine] - self.first
        others = torch.ones(self.count, dtype=torch.bool, device=rows.device)
        others[places] = False
        rest = others.nonzero().squeeze(1)
        start = self.first - int((rows < self.first).sum()) - self.run.start
        run = slice(start, start + len(rest))
        codes = torch.zeros(self.n, self.stored.k, dtype=torch.int8, device=rows.device)
        codes[places] = unpack_bytes(layer.weight_hot_packed.data[mine])
        step = max(1, _PIECE // self.stored.k)
        packed = layer.weight_packed.data[run]
        for some, words in zip(rest.split(step), packed.split(step), strict=True):
            codes[some] = unpack_nibbles(words).to(torch.int8)
        scale = layer.weight_scale.data.new_zeros(self.n, layer.weight_scale.shape[1])
        scale[places] = layer.weight_hot_scale.data[mine]
        scale[rest] = layer.weight_scale.data[run]
        stored = codes.bitwise_xor_(-128).view(torch.int32)  # as bytes, q + 128
        replace_parameters(layer, {WEIGHT_PACKED: stored, WEIGHT_SCALE: scale})
        for name in (WEIGHT_HOT_ROWS, WEIGHT_HOT_PACKED, WEIGHT_HOT_SCALE):
            delattr(layer, name)


def _loader(
    prefix: str, name: str, shape: tuple[int, ...], run: slice, arrived: Arrived
) -> Callable[..., None]:
    """Weight loader of a parameter: some rows of the stored tensor.

    vLLM's reload counts ``copy_`` calls and looks for an argument called ``param``. The closure
    must not hold the layer, which would keep it alive.
    """
    dtypes = SCALE_DTYPES if name in (WEIGHT_SCALE, WEIGHT_HOT_SCALE) else (torch.int32,)

    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        stored = stored_tensor(loaded_weight, name)
        if stored is not None:
            require_dtype(stored.name, stored.dtype, *dtypes)
            if not same_rows(stored.tensor, loaded_weight, None, whole=True):
                raise SvskFormatError(
                    f"{stored.name}: vLLM's loader for this architecture changes it before {prefix}"
                    " gets it. Quantise with --head int8 --embedding int8."
                )
        require_shape(f"{prefix}.{name}", loaded_weight, shape)
        param.data.copy_(loaded_weight[run])
        arrived.note(name, (None,))

    return load
