# SPDX-License-Identifier: Apache-2.0
"""Factors of keys that cost attention least, by what the keys' rounding does to it.

The formula for the factors (:func:`~svsk_offline.planning.fold_pairs.even_factors`) takes all
errors of scores alike. Attention does not: an error that all keys of a query share cancels, and one
in a key that nobody attends to is not felt. So the formula only says where a search begins. Keys of
a few samples are rounded as llama.cpp's ``q4_0`` rounds them, and a factor goes a step up or down
if that brings attention nearer to that of the keys as they are:

    cost = mean over queries of KL(softmax(s q . k) || softmax(s q . f round(k / f)))

with s the scale of the scores and f the factors. On Qwen2.5-Coder-0.5B this takes away a third of
the KL with a ``q4_0`` cache that the formula leaves (docs/benchmarks/keys.md).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from svsk_offline.storage.fold import LARGEST_EXPONENT, powers_of_two
from svsk_vllm.kv_cache.rounding import q4_0

__all__ = ["Attention", "search_exponents", "seen_attention"]

_QUERIES: Final = 32
"""Positions of a sample whose queries are looked at, all heads': bounds the time of a step."""

_STEPS: Final = (0.5, -0.5, 0.125, -0.125)
"""Of an exponent, multiples of an eighth: half an octave to come near, an eighth to arrive."""

_ROUNDS: Final = 4
"""How often all factors are tried at most; one round alone was tried too (keys.md)."""

_GAIN: Final = 1e-3
"""Share of the cost that a step has to bring, against steps that suit these samples alone."""

_NEVER: Final = -1e30
"""Score of a key that a query does not see. Its exponential is 0, its product with 0 is 0."""

_NAME: Final = "svsk_seen_attention"


@dataclass(frozen=True)
class Attention:
    """Queries and keys of an attention layer, after rotary.

    Attributes:
        queries: float32 [samples, heads, group, queries, head_dim], times the scale of the scores;
            group is how many query heads share a head of keys.
        keys: float32 [samples, heads, tokens, head_dim].
        seen: bool [samples, queries, tokens], keys that a query sees.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor


class _SeenError(Exception):
    """Ends a forward pass whose queries and keys are known."""


def seen_attention(
    block: nn.Module, layer: nn.Module, samples: Iterable[Callable[[], object]]
) -> Attention | None:
    """What an attention layer of a loaded block is given.

    Args:
        block: the block.
        layer: the module of it that computes attention.
        samples: each runs one sample through the block.

    Returns:
        None where the layer does not ask transformers for the function that computes attention (as
        nearly all do), or has no heads of keys that whole groups of query heads share.
    """
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def watch(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> Any:
        if module is layer and query.shape[1] % key.shape[1] == 0:
            found.append(_attention(query, key, attention_mask, scaling))
        raise _SeenError

    with _attention_by(watch, block):
        for run in samples:
            with suppress(_SeenError):
                run()
    if not found:
        return None
    return Attention(*map(torch.cat, zip(*found, strict=True)))


@contextmanager
def _attention_by(function: Callable[..., Any], block: nn.Module) -> Iterator[None]:
    """Let the modules of a block ask for this function."""
    configs: dict[int, Any] = {
        id(config): config
        for module in block.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[_NAME] = function
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        # It holds the queries and keys that it was given.
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attributes of :class:`Attention`, of one call: [1, heads, tokens, head_dim] each.

    A cap of scores and sinks, which some models have, are not taken into account.
    """
    tokens, head_dim = key.shape[-2:]
    scale = head_dim**-0.5 if scaling is None else scaling
    # The last position of each of as many equal parts: late ones see many keys.
    count = min(_QUERIES, tokens)
    places = torch.arange(1, count + 1, device=key.device) * tokens // count - 1
    queries = query[:, :, places].float() * scale
    if mask is None:
        seen = torch.arange(tokens, device=key.device) <= places.unsqueeze(1)
    else:
        rows = mask[:, 0, places, :tokens]
        seen = rows if rows.dtype == torch.bool else rows > -1
    grouped = queries.unflatten(1, (key.shape[1], -1))
    return grouped, key.float(), seen.expand(len(key), -1, -1)


def search_exponents(
    attention: Attention, exponents: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Exponents of two of what keys are divided by, from which no step costs attention less.

    Args:
        attention: of keys that nothing was folded into.
        exponents: float32 [rows, factors], multiples of an eighth, where to begin; a row for each
            head of keys, or one for all of them.
        index: int64 [head_dim], the factor that each channel of a head takes.

    Returns:
        float32 [rows, factors], multiples of an eighth.

    Raises:
        SvskError: a head's channels are no whole blocks of ``q4_0``.
    """
    cost = _Cost(attention, index)
    best, chosen = cost(exponents), exponents.clone()
    for _ in range(_ROUNDS):
        before = chosen
        for factor in range(exponents.shape[1]):
            for step in _STEPS:
                tried = chosen.clone()
                # Rows have nothing in common, so each takes the step or leaves it.
                tried[:, factor] = (tried[:, factor] + step).clamp(
                    -LARGEST_EXPONENT, LARGEST_EXPONENT
                )
                costs = cost(tried)
                better = costs < best * (1 - _GAIN)
                best = torch.where(better, costs, best)
                chosen = torch.where(better.unsqueeze(1), tried, chosen)
        if torch.equal(chosen, before):
            break
    return chosen


class _Cost:
    """The module's cost, for factors of keys."""

    def __init__(self, attention: Attention, index: torch.Tensor) -> None:
        self._attention, self._index = attention, index
        self._wanted = self._logs(attention.keys)
        self._weights = self._wanted.exp()

    def __call__(self, exponents: torch.Tensor) -> torch.Tensor:
        """float32 [rows], from exponents [rows, factors]."""
        factors = powers_of_two(exponents[:, self._index]).unsqueeze(1)
        keys = q4_0(self._attention.keys / factors) * factors
        difference = self._weights * (self._wanted - self._logs(keys))
        heads = difference.sum(-1).mean((0, 2, 3))
        return heads.view(len(exponents), -1).mean(1)

    def _logs(self, keys: torch.Tensor) -> torch.Tensor:
        """Logarithms of attention, float32 [samples, heads, group, queries, tokens]."""
        scores = self._attention.queries @ keys.unsqueeze(2).mT
        seen = self._attention.seen[:, None, None]
        return scores.where(seen, scores.new_tensor(_NEVER)).log_softmax(-1)
