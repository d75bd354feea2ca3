# SPDX-License-Identifier: Apache-2.0
"""Taking the linears of a block in turns, where memory does not hold what is gathered of all.

The second moments of 256 experts of 7168 inputs are 53 GB. Each turn runs the samples through the
block once more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import nn

from svsk_offline.calibration.expert_tokens import ExpertPools
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.room import give_back
from svsk_offline.storage.decoder_blocks import expert_modules

__all__ = ["each_turn", "experts_of_turns", "turns"]


def turns(parts: Iterable[tuple[Sequence[str], int]], room: int) -> list[list[str]]:
    """Names in turns, in their order, as many at a time as there is room for.

    Args:
        parts: names that stay together, and the bytes that they take.
        room: bytes. What takes more has a turn of its own.

    Returns:
        At least one turn; of no names an empty one.
    """
    found: list[list[str]] = [[]]
    left = room
    for names, size in parts:
        if size > left and found[-1]:
            found.append([])
            left = room
        found[-1] += names
        left -= size
    return found


def each_turn(groups: Iterable[list[str]], room: int | None) -> Iterator[list[str]]:
    """The turns, one after another; where room is limited, what one freed goes to the system.

    Args:
        groups: the names of each turn.
        room: bytes that a turn may take; None for no limit.
    """
    for group in groups:
        yield group
        if room is not None:
            give_back()


def experts_of_turns(
    block: nn.Module,
    groups: Iterable[list[str]],
    gather: Callable[[list[str]], Mapping[str, InputStatistics]],
) -> ExpertPools | None:
    """The sums over all experts of a block, where several turns hold them.

    An expert may take tokens that it is missing from those of other turns, so these sums are
    complete before the first turn begins.

    Args:
        block: the block.
        groups: the names of each turn.
        gather: the statistics of a turn's linears, of experts not yet filled up.

    Returns:
        None where one turn has all experts there are.
    """
    experts = expert_modules(block)
    mixed = [group for group in groups if any(name in experts for name in group)]
    if len(mixed) < 2:
        return None
    pools = ExpertPools()
    for group in mixed:
        pools.add(block, gather(group))
    return pools
