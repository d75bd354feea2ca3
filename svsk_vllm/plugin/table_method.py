# SPDX-License-Identifier: Apache-2.0
"""Serving a quantised embedding table or output head."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from svsk_kernels.layer_kernel import TableKernel
from svsk_vllm.format import LinearSpec, SvskFormatError
from svsk_vllm.plugin.hot_rows import HotRows
from svsk_vllm.plugin.linear_method import SvskLinearMethod
from svsk_vllm.plugin.shard_probe import ShardId
from svsk_vllm.plugin.stored_names import other_size

__all__ = ["SvskHeadMethod", "SvskTableMethod", "TiedHeadMethod"]


class SvskHeadMethod(SvskLinearMethod):
    """Method of an output head that is stored by itself.

    vLLM pads the vocabulary and cuts it by rows: the rows that pad it have scales of zero and no
    sidecar.
    """

    def _rows(self, layer: Any, loader: Any, n: int, shard: ShardId) -> torch.Tensor:
        held = layer.shard_indices
        rows = torch.full((n,), -1, dtype=torch.int64, device="cpu")
        count = held.org_vocab_end_index - held.org_vocab_start_index
        rows[:count] = torch.arange(count, device="cpu") + held.org_vocab_start_index
        return rows

    def _columns(self, layer: Any, loader: Any, k: int, shard: ShardId) -> torch.Tensor:
        return torch.arange(k, device="cpu")

    def _register_base(
        self, layer: Any, n: int, k: int, loader_of: Callable[[str], Callable[..., None]]
    ) -> None:
        if not self.weights.hot_rows:
            super()._register_base(layer, n, k, loader_of)
            return
        held, name = layer.shard_indices, self.origin.names[0]
        first, last = held.org_vocab_start_index, held.org_vocab_end_index
        stored = LinearSpec(name, layer.org_vocab_size, k, self.schemes[0], self.params_dtype)
        self.hot_rows = HotRows(self.prefix, stored, n, first, last - first)
        self.hot_rows.register(layer, self.arrived)

    def _join(self, layer: Any) -> None:
        if self.weights.hot_rows:
            self.hot_rows.join(layer, counted=self.origin.counted)

    def _check_sizes(self, layer: Any, input_size: int, output_size: int) -> None:
        for spec in self.origin.stored or ():
            if (spec.n, spec.k) != (layer.org_vocab_size, input_size):
                raise other_size(spec, layer.org_vocab_size, input_size)


class SvskTableMethod(SvskHeadMethod):
    """Method of an embedding table, which may be the output head too."""

    lookup = True

    def create_weights(self, layer: Any, *args: Any, **extra: Any) -> None:
        """As of a linear, with a kernel that looks up rows too.

        Raises:
            SvskFormatError: as of a linear.
        """
        super().create_weights(layer, *args, **extra)
        assert isinstance(self.kernel, TableKernel), "kernels that do not look up refuse the spec"
        self.table = self.kernel

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the table.

        Args:
            layer: the layer.
            input_: int64, any shape: rows of this rank's part.

        Returns:
            [..., K] of the layer's dtype.
        """
        rows = self.table.rows(layer, input_.reshape(-1))
        return rows.view(*input_.shape, rows.shape[-1])


class TiedHeadMethod(QuantizeMethodBase):
    """Method of an output head that is the embedding's quantised table: it holds nothing.

    Args:
        name: of the head, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Nothing is loaded into a tied head."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embedding itself is the head: its method multiplies too."""
        if not hasattr(embed_tokens, "bias"):
            # A head always has one, which may be None; some of vLLM's classes hand it on.
            embed_tokens.register_parameter("bias", None)
        return embed_tokens

    def apply(self, layer: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Only where a model ties in another way than by ``tie_weights``.

        Raises:
            SvskFormatError: always.
        """
        raise SvskFormatError(
            f"{self.name}: vLLM's class for this model does not tie it to the embedding by"
            " tie_weights(), so that the quantised table cannot be its head. Quantise with --head"
            " dense --embedding dense."
        )
