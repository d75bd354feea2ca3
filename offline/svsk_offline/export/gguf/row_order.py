# SPDX-License-Identifier: Apache-2.0
"""The order of a weight's rows in GGUF, and the form of its dense tensors.

llama.cpp's converter puts the rows of q and k of some architectures (``llama``) in the order of its
rotary embedding, which turns neighbours: row i of a head and row i + d / 2 become neighbours.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from svsk_kernels.errors import SvskError

__all__ = ["MAX_DIFFERENCE", "closest", "head_counts", "interleaved_rows", "row_orders"]

MAX_DIFFERENCE = 0.3
"""Of a weight from the template's, relative. The right order of a 4-bit weight differs by about
0.15, a wrong one by about 1.4 (the square root of 2, of independent weights)."""


def interleaved_rows(rows: int, heads: int) -> torch.Tensor:
    """Index int64 [rows] that makes neighbours of the rows that the rotary embedding turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of query heads and of key and value heads, from config.json.

    Raises:
        SvskError: config.json does not say.
    """
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise SvskError(f"config.json: num_attention_heads is {heads!r}, expected a number.")
    return heads, int(config.get("num_key_value_heads") or heads)


def row_orders(rows: int, heads: Collection[int]) -> list[torch.Tensor | None]:
    """The orders that a template may have: as they are (None), or interleaved by heads."""
    orders: list[torch.Tensor | None] = [None]
    orders += [
        interleaved_rows(rows, count) for count in dict.fromkeys(heads) if not rows % (2 * count)
    ]
    return orders


def closest(
    what: str, weight: torch.Tensor, template: torch.Tensor, orders: list[torch.Tensor | None]
) -> torch.Tensor | None:
    """The order of rows in which a weight is the template's.

    Args:
        what: name, for the error.
        weight: float32 [N, ...].
        template: float32 of the same shape.
        orders: candidates.

    Raises:
        SvskError: the weight is not the template's in any of them.
    """
    norm = float(template.norm()) or 1.0
    differences = [
        float(((weight if order is None else weight[order]) - template).norm()) / norm
        for order in orders
    ]
    best = min(range(len(orders)), key=differences.__getitem__)
    if not differences[best] < MAX_DIFFERENCE:
        raise SvskError(
            f"{what}: differs from the template's by {differences[best]:.0%} of its size in every"
            f" known order of rows, expected less than {MAX_DIFFERENCE:.0%}. The template is of"
            " another model, is stored in fewer than 4 bits, or llama.cpp stores this weight in a"
            " form that is not known here; or the checkpoint was quantised with --smoothing. Name a"
            " template of this very model, or leave --template out."
        )
    return orders[best]
