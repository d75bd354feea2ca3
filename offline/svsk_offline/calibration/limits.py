# SPDX-License-Identifier: Apache-2.0
"""Whether a model can take the tokens it is given: their number, and their ids."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError

__all__ = ["check_length", "check_token_ids", "longest_sequence"]

_POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_STRETCHED: Final = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling whose factor goes beyond ``max_position_embeddings`` in some configs."""


def longest_sequence(config: Any) -> int | None:
    """Most tokens a model takes, by its transformers config.

    None where positions have no limit (ALiBi, say).

    A sliding window is no limit. Where rotary scaling multiplies positions, the longer reading of
    the config counts.
    """
    config = config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    positions = next(
        (value for key in _POSITIONS if isinstance(value := getattr(config, key, None), int)), None
    )
    if positions is None or positions < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return max([positions, *_stretched(scaling, positions)])


def _stretched(scaling: Any, positions: int) -> Iterator[int]:
    if not isinstance(scaling, Mapping):
        return
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind in _STRETCHED and isinstance(factor, int | float):
        yield int(factor * (scaling.get("original_max_position_embeddings") or positions))
    for value in scaling.values():  # per kind of layer
        yield from _stretched(value, positions)


def check_length(seq_len: int, config: Any, model: str) -> None:
    """Refuse samples that are longer than a model's positions.

    Raises:
        SvskError: they are.
    """
    longest = longest_sequence(config)
    if longest is not None and seq_len > longest:
        raise SvskError(
            f"--seq-len is {seq_len}, but {model} takes {longest} tokens at most. Lower it."
        )


def check_token_ids(
    tokens: torch.Tensor, vocabulary: int, spell: Callable[[int], Any], model: str, source: str
) -> None:
    """Refuse tokens that a model's embedding has no row for.

    Args:
        tokens: int64, any shape.
        vocabulary: rows of the embedding.
        spell: a token's text by its id.
        model: for the error.
        source: of the text, for the error.

    Raises:
        SvskError: an id is out of range.
    """
    beyond = tokens[(tokens >= vocabulary) | (tokens < 0)]
    if len(beyond):
        token = int(beyond[0])
        raise SvskError(
            f"{model}: its tokenizer makes token {token} ({spell(token)!r}) of {source}, but the"
            f" model's vocabulary has {vocabulary}. Tokens were added without resizing the"
            " embedding, or tokenizer and weights belong to different models."
        )
