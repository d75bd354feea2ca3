# SPDX-License-Identifier: Apache-2.0
"""Allocation of bits over matrices, against the best of all combinations."""

import itertools
import random
from dataclasses import replace

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline.planning.bit_budget import Choice, allocate
from svsk_vllm.format.group_scales import ScaleBits

BASES: tuple[tuple[int, ScaleBits], ...] = ((64, 16), (32, 16), (32, 6))


def problem(seed: int, matrices: int) -> dict[str, list[Choice]]:
    """Losses that fall with the bits, at a rate of each matrix's own."""
    generator = random.Random(seed)
    choices = {}
    for index in range(matrices):
        weight, size = generator.uniform(0.1, 10), generator.choice([100, 400])
        options = []
        for (group, scale_bits), rank in itertools.product(BASES, (0, 8, 16)):
            bits = size * (64 + 4 * scale_bits // (group // 16)) // 16 + size * rank // 40
            loss = (
                weight
                * generator.uniform(0.9, 1.0)
                / (1 + rank / 10)
                * (0.8 if group == 32 else 1)
                * (1.02 if scale_bits == 6 else 1)
            )
            options.append(Choice(group, scale_bits, rank, 4, bits, loss))
        choices[f"m{index}"] = options
    return choices


def best_of_all(choices: dict[str, list[Choice]], fused: dict[str, str], budget: float) -> float:
    least = float("inf")
    for picks in itertools.product(*choices.values()):
        bases: dict[str, set[tuple[int, int]]] = {}
        for name, pick in zip(choices, picks, strict=True):
            bases.setdefault(fused[name], set()).add(pick.base)
        if sum(p.stored_bits for p in picks) <= budget and all(
            len(found) == 1 for found in bases.values()
        ):
            least = min(least, sum(p.loss for p in picks))
    return least


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_near_the_best_of_all_and_within_the_budget(seed: int, share: float) -> None:
    choices = problem(seed, 4)
    fused = {"m0": "qkv", "m1": "qkv", "m2": "o", "m3": "down"}
    smallest = sum(min(c.stored_bits for c in options) for options in choices.values())
    largest = sum(max(c.stored_bits for c in options) for options in choices.values())
    budget = smallest + share * (largest - smallest)
    chosen = allocate(choices, fused, budget, 1)
    assert list(chosen) == list(choices)
    assert sum(c.stored_bits for c in chosen.values()) <= budget
    assert chosen["m0"].base == chosen["m1"].base
    assert sum(c.loss for c in chosen.values()) <= 1.15 * best_of_all(choices, fused, budget)


def test_sensitive_matrices_get_more() -> None:
    options = [Choice(64, 16, rank, 4, 1000 + 10 * rank, 1 / (1 + rank)) for rank in (0, 8, 16, 32)]
    scaled = [replace(c, loss=100 * c.loss) for c in options]
    chosen = allocate({"a": options, "b": scaled}, {"a": "a", "b": "b"}, 2000 + 330, 1)
    assert chosen["b"].rank == 32
    assert chosen["a"].rank == 0


def test_budget_below_the_smallest() -> None:
    with pytest.raises(
        SvskError, match=r"A target of 4\.2 bits per weight is less than the 4\.2500 "
    ):
        allocate({"a": [Choice(64, 16, 0, 4, 425, 1.0)]}, {"a": "a"}, 4.2, 100)
