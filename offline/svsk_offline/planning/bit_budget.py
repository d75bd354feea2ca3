# SPDX-License-Identifier: Apache-2.0
"""Choosing rank, factor bits, group size and scale bits per matrix under a bit budget.

Every choice for a matrix has a size and a loss, an estimate of what it adds to the KL divergence.
The least total loss within the budget is sought by Lagrangian relaxation (Shoham and Gersho 1988):
at a price per bit each matrix takes the choice of least loss plus price, and the price is bisected
to the budget. What that leaves unused is then spent, step by step, where it gains most per bit.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from svsk_kernels.errors import SvskError
from svsk_vllm.format.group_scales import ScaleBits

__all__ = ["Choice", "allocate"]

_BISECTIONS: Final = 60
"""Each halves the interval of prices: 60 are more than the bits of a float64."""


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix.

    Attributes:
        group_size: weights per scale.
        scale_bits: how scales are stored (:mod:`svsk_vllm.format.group_scales`).
        rank: of the sidecar, per tile.
        factor_bits: bits of a factor.
        stored_bits: everything stored of the matrix.
        loss: estimated share of the KL divergence, in a unit common to all matrices.
    """

    group_size: int
    scale_bits: ScaleBits
    rank: int
    factor_bits: int
    stored_bits: int
    loss: float

    @property
    def base(self) -> tuple[int, ScaleBits]:
        """What fused matrices have in common: group size and scale bits."""
        return self.group_size, self.scale_bits

    def __add__(self, other: "Choice") -> "Choice":
        """The same choice for two matrices."""
        mine, theirs = (replace(one, stored_bits=0, loss=0.0) for one in (self, other))
        if mine != theirs:
            raise ValueError(f"{mine} and {theirs} are two choices, not one for two matrices.")
        bits = self.stored_bits + other.stored_bits
        return replace(self, stored_bits=bits, loss=self.loss + other.loss)


def allocate(
    choices: Mapping[str, Sequence[Choice]],
    fused: Mapping[str, Hashable],
    target_bpw: float,
    num_weights: int,
) -> dict[str, Choice]:
    """Pick a choice for every matrix: a small total loss, and a total size within the budget.

    Args:
        choices: by matrix name, all that are possible.
        fused: by matrix name, what it is fused with at run time: matrices of equal value get one
            base, because they share one base kernel.
        target_bpw: bits per weight of all matrices together.
        num_weights: weights of all matrices together.

    Returns:
        A choice by matrix name, in the order of ``choices``.

    Raises:
        SvskError: even the smallest choices exceed the budget.
    """
    budget = target_bpw * num_weights
    sets: dict[Hashable, dict[str, Sequence[Choice]]] = {}
    for name, options in choices.items():
        sets.setdefault(fused[name], {})[name] = options
    smallest = _at_price(sets, math.inf)
    if _size(smallest) > budget:
        raise SvskError(
            f"A target of {target_bpw} bits per weight is less than the"
            f" {_size(smallest) / num_weights:.4f} that the smallest choices allowed take. Raise"
            " the target, or allow smaller ranks or larger groups."
        )
    # In the unit of the losses: they scale with the inputs, and what is chosen must not.
    largest = max((c.loss for options in choices.values() for c in options), default=0.0)
    low, high = 0.0, largest / budget or 1.0
    while _size(_at_price(sets, high)) > budget:  # ends: at an infinite price it fits
        low, high = high, high * 16
    for _ in range(_BISECTIONS):
        # By powers while there is no lower bound: the price may be any share of the losses.
        middle = (low + high) / 2 if low else high / 16
        if _size(_at_price(sets, middle)) > budget:
            low = middle
        else:
            high = middle
    # `high` is always within the budget, `low` never.
    chosen = _spend(choices, _at_price(sets, high), budget)
    return {name: chosen[name] for name in choices}


def _at_price(
    sets: Mapping[Hashable, Mapping[str, Sequence[Choice]]], price: float
) -> dict[str, Choice]:
    """Least loss plus price times bits, per fused set; at an infinite price, fewest bits."""

    def cost(choice: Choice) -> tuple[float, float]:
        if math.isinf(price):
            return float(choice.stored_bits), choice.loss
        return choice.loss + price * choice.stored_bits, float(choice.stored_bits)

    chosen: dict[str, Choice] = {}
    for members in sets.values():
        # Fused matrices share a base; of two of equal cost that of larger groups, which the
        # kernels scale less often.
        bases = sorted(
            {choice.base for options in members.values() for choice in options}, reverse=True
        )
        picks: list[dict[str, Choice]] = []
        for base in bases:
            fitting = {
                name: [c for c in options if c.base == base] for name, options in members.items()
            }
            if all(fitting.values()):
                picks.append({name: min(options, key=cost) for name, options in fitting.items()})
        # Costs are pairs, so that the second decides where the first ties.
        best: dict[str, Choice] = min(
            picks, key=lambda pick: tuple(map(sum, zip(*map(cost, pick.values()), strict=True)))
        )
        chosen |= best
    return chosen


def _spend(
    choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], budget: float
) -> dict[str, Choice]:
    """Take the steps that gain most per bit until none fits what is left of the budget.

    Bases stay, since fused matrices would have to change theirs together.
    """
    rest = budget - _size(chosen)
    while True:
        best, rate = None, 0.0
        for name, options in choices.items():
            now = chosen[name]
            for choice in options:
                more = choice.stored_bits - now.stored_bits
                if choice.base != now.base or not 0 < more <= rest:
                    continue
                gain = (now.loss - choice.loss) / more
                if gain > rate:
                    best, rate = (name, choice), gain
        if best is None:
            return chosen
        name, choice = best
        rest -= choice.stored_bits - chosen[name].stored_bits
        chosen = {**chosen, name: choice}


def _size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.stored_bits for choice in chosen.values())
