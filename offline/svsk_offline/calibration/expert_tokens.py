# SPDX-License-Identifier: Apache-2.0
"""Experts that few tokens are routed to: what their Hessians are made of.

An expert is fitted to the tokens that the router sends it. Of a mixture of 128 that is one in
sixteen, very unevenly, and a Hessian of K inputs means little with fewer than K tokens. So the
tokens that are missing to K are taken from all experts of the layer: of an expert that no token
reaches the Hessian is theirs alone.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn

from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_vllm.architecture.experts import SeparateExperts

__all__ = ["ExpertPools", "fill_up_experts"]


class ExpertPools:
    """The moments of all tokens that the experts of each layer of a block took in.

    Where statistics are gathered of some experts at a time, those of each time are added, in the
    order of the experts: the sums then have the bits of those of all at once.
    """

    def __init__(self) -> None:
        # By the module of the experts and a projection; gate and up, which read the same tokens,
        # have one.
        self._pools: dict[tuple[str, str], InputStatistics] = {}

    def add(self, block: nn.Module, statistics: Mapping[str, InputStatistics]) -> None:
        """Take in the statistics of some experts, of which nothing has been read.

        Args:
            block: the block.
            statistics: by the name of the linear below it. Gate and up of an expert are there
                together.
        """
        for prefix, experts in _mixtures(block):
            seen: dict[int, InputStatistics] = {}  # by the first expert's: its projection's pool
            for projection, names in experts.parts():
                members = [
                    statistics[full] for n in names if (full := f"{prefix}.{n}") in statistics
                ]
                if not members:
                    continue
                shared = id(members[0])
                if shared in seen:
                    self._pools[prefix, projection] = seen[shared]
                    continue
                pool = self._pools.setdefault((prefix, projection), members[0].empty())
                seen[shared] = pool
                for member in members:
                    pool.take_in(member)

    def fill_up(
        self,
        block: nn.Module,
        statistics: MutableMapping[str, InputStatistics],
        names: Collection[str] | None = None,
    ) -> None:
        """Complete the statistics of a block's experts, in place.

        Args:
            block: the block.
            statistics: by the name of the linear below the block, of the tokens that were routed to
                it. ``tokens`` says how many these were, before and after. Experts that saw none
                share the statistics of all, with ``tokens`` 0.
            names: of the linears below the block that are completed; None for all.
        """
        for prefix, experts in _mixtures(block):
            done: set[int] = set()
            idle: dict[int, InputStatistics] = {}
            for projection, linears in experts.parts():
                pool = self._pools.get((prefix, projection))
                if pool is None:  # the samples reached none of the layer's experts
                    continue
                linear: Any = experts.get_submodule(linears[0])
                for full in (f"{prefix}.{name}" for name in linears):
                    if names is not None and full not in names:
                        continue
                    own = statistics.get(full)
                    if own is None:
                        if id(pool) not in idle:  # a copy: the pool may yet fill up others
                            idle[id(pool)] = pool.empty()
                            idle[id(pool)].take_in(pool)
                            idle[id(pool)].tokens = 0  # none of their own
                        statistics[full] = idle[id(pool)]
                    elif id(own) not in done:
                        done.add(id(own))
                        own.fill_up(pool, linear.in_features)


def fill_up_experts(
    block: nn.Module,
    statistics: MutableMapping[str, InputStatistics],
    names: Collection[str] | None = None,
    pools: ExpertPools | None = None,
) -> None:
    """Complete the statistics of a block's experts, in place; see :meth:`ExpertPools.fill_up`.

    Args:
        block: the block.
        statistics: by the name of the linear below the block, of the tokens routed to it.
        names: of the linears below the block that are completed; None for all.
        pools: of all experts of the block; None where all that there are have statistics here.
    """
    if pools is None:
        pools = ExpertPools()
        pools.add(block, statistics)
    pools.fill_up(block, statistics, names)


def _mixtures(block: nn.Module) -> Iterator[tuple[str, SeparateExperts]]:
    """The mixtures of experts below a block, by name."""
    for name, module in block.named_modules():
        if isinstance(module, SeparateExperts):
            yield name, module
