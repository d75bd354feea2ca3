# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: the quantisation method ``svsk``."""

__all__ = ["register_with_vllm"]

_registered = False


def register_with_vllm() -> None:
    """Make vLLM know ``--quantization svsk`` and checkpoints whose config.json says so.

    Idempotent.
    """
    global _registered
    if _registered:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from svsk_vllm.plugin.quantization_config import SvskConfig
    from svsk_vllm.plugin.vocabulary_layers import register_vocabulary_layers

    register_quantization_config("svsk")(SvskConfig)
    register_vocabulary_layers()
    _registered = True
