# SPDX-License-Identifier: Apache-2.0
"""Caches of keys and values in few bits, for transformers: a model attends to what they stored."""

from svsk_vllm.kv_cache.kinds import KEY_KINDS, VALUE_KINDS, KvKinds
from svsk_vllm.kv_cache.layers import PerChannelKeys, RoundedLayer
from svsk_vllm.kv_cache.model_cache import check_filled, model_cache

__all__ = [
    "KEY_KINDS",
    "VALUE_KINDS",
    "KvKinds",
    "PerChannelKeys",
    "RoundedLayer",
    "check_filled",
    "model_cache",
]
