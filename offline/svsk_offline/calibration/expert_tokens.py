# SPDX-License-Identifier: Apache-2.0
"""Experts that few tokens are routed to: what their Hessians are made of.

An expert is fitted to the tokens that the router sends it. Of a mixture of 128 that is one in
sixteen, very unevenly, and a Hessian of K inputs means little with fewer than K tokens. So the
tokens that are missing to K are taken from all experts of the layer: of an expert that no token
reaches the Hessian is theirs alone.
"""

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_vllm.architecture.experts import SeparateExperts

__all__ = ["fill_up_experts"]


def fill_up_experts(block: nn.Module, statistics: MutableMapping[str, InputStatistics]) -> None:
    """Complete the statistics of a block's experts, in place.

    Args:
        block: the block.
        statistics: by the name of the linear below the block, of the tokens that were routed to it.
            ``tokens`` says how many these were, before and after. Experts that saw none share the
            statistics of all, with ``tokens`` 0.
    """
    for prefix, experts in block.named_modules():
        if not isinstance(experts, SeparateExperts):
            continue
        pools: dict[tuple[int, ...], InputStatistics] = {}
        done: set[int] = set()
        for _, names in experts.parts():
            members = {
                name: statistics[full]
                for name in names
                if (full := f"{prefix}.{name}") in statistics
            }
            if not members:
                continue
            # Gate and up read the same tokens: one pool for both.
            key = tuple(map(id, members.values()))
            if key not in pools:
                pools[key] = InputStatistics.pooled(list(members.values()))
            pool = pools[key]
            linear: Any = experts.get_submodule(names[0])
            for name in names:
                own = members.get(name)
                if own is None:
                    statistics[f"{prefix}.{name}"] = pool
                elif id(own) not in done:
                    done.add(id(own))
                    own.fill_up(pool, linear.in_features)
        for pool in pools.values():
            pool.tokens = 0  # none of their own
