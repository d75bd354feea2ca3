# SPDX-License-Identifier: Apache-2.0
"""Architectures whose vLLM loaders move rows by a weight's name; what the plugin serves of them.

A loader that moves rows (one fused tensor interleaved by heads, rotary halves) does so for the
names and parameters it knows. It leaves a sidecar behind, whose rows then belong to other rows of
the base. So each of these architectures either has its order followed by the plugin, or is served
without a sidecar, or not at all. The plugin besides compares the rows that arrive with those
stored, so that a loader that is not listed here is refused and never served wrong.

Read in vLLM 0.32 (``load_weights`` of every model) and, where a version is named, in those before
it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

__all__ = ["ROW_ORDERS", "RowOrder", "row_order_problem"]

Served = Literal["any rank", "rank 0", "no rank"]


@dataclass(frozen=True)
class RowOrder:
    """Modules of an architecture whose rows vLLM moves while loading.

    Attributes:
        modules: regular expression that is searched in the module's name.
        served: what the plugin serves of these modules.
        reason: what vLLM's loader does with them.
        only_before_032: whether vLLM 0.32 has given the class up and runs transformers' own, which
            keeps the order.
    """

    modules: str
    served: Served
    reason: str
    only_before_032: bool = False


_QKV: Final = r"(^|\.)query_key_value$"
_QK: Final = r"(^|\.)[qk]_proj$"
_BY_HEADS = "vLLM's loader regroups the rows of query_key_value, which are stored by heads"
_FALCON = RowOrder(_QKV, "any rank", _BY_HEADS)
_FUSED_BY_NAME = RowOrder(_QKV, "rank 0", f"{_BY_HEADS}, and cannot regroup those of a sidecar")
_FUSED_UNTIL_032 = replace(_FUSED_BY_NAME, only_before_032=True)
_LLAMA4 = RowOrder(
    _QK,
    "rank 0",
    "vLLM's loader regroups the rows of q_proj and"
    " k_proj for rotary embedding, but not a sidecar's",
)
_K2_HORIZON = RowOrder(
    _QK,
    "no rank",
    "vLLM's loader regroups the rows of q_proj and"
    " k_proj for rotary embedding in dense weights only",
)
_TELECHAT2 = RowOrder(
    r"(^|\.)key_value$", "no rank", "vLLM's loader splits key_value by heads, in dense weights only"
)

ROW_ORDERS: Final[Mapping[str, RowOrder]] = MappingProxyType(
    {
        "FalconForCausalLM": _FALCON,
        "RWForCausalLM": _FALCON,
        "BloomForCausalLM": _FUSED_BY_NAME,
        "BloomModel": _FUSED_BY_NAME,
        "GPTNeoXForCausalLM": _FUSED_UNTIL_032,
        "PersimmonForCausalLM": _FUSED_UNTIL_032,
        "FuyuForCausalLM": _FUSED_UNTIL_032,  # its language model is Persimmon
        "Llama4ForCausalLM": _LLAMA4,
        "Llama4ForConditionalGeneration": _LLAMA4,
        "EagleLlama4ForCausalLM": _LLAMA4,
        "K2HorizonForCausalLM": _K2_HORIZON,
        "TeleChat2ForCausalLM": _TELECHAT2,
    }
)
"""By the names in ``architectures`` of config.json."""


def row_order_problem(
    architectures: Iterable[str], module: str, rank: int, *, own_class: bool = False
) -> str | None:
    """Why a module would be served with its rows in another order, and the remedy; or None.

    Args:
        architectures: ``architectures`` of config.json.
        module: name of the linear, as stored or as vLLM calls it.
        rank: rank of its sidecar, 0 for none.
        own_class: whether the vLLM at hand has a class of its own for the architecture, which is
            known while serving. Otherwise vLLM 0.32 is meant, which has none for some.
    """
    for architecture in architectures:
        order = ROW_ORDERS.get(architecture)
        if order is None or not re.search(order.modules, module):
            continue
        if order.only_before_032 and not own_class:
            continue
        if order.served == "no rank":
            return (
                f"{module}: {architecture}: {order.reason}. Put it on the ignore list (--ignore)"
                " when quantising."
            )
        if order.served == "rank 0" and rank:
            return (
                f"{module}: a sidecar of rank {rank}, but {architecture}: {order.reason}. Quantise"
                " this module without a sidecar (rank 0), or put it on the ignore list (--ignore)."
            )
    return None
