# SPDX-License-Identifier: Apache-2.0
"""The cache of a whole model, and whether the model used it."""

from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.kinds import KEY_KINDS, VALUE_KINDS, KvKinds
from svsk_vllm.kv_cache.layers import PerChannelKeys, RoundedLayer

__all__ = ["check_filled", "model_cache"]


def model_cache(config: PretrainedConfig, kinds: KvKinds) -> Cache:
    """An empty cache for a model, to be given to its ``forward`` as ``past_key_values``.

    Layers with a sliding window or attention in chunks keep every token here: transformers' mask
    hides those that are out of sight from a cache that has them.

    Args:
        config: of the model, or of the whole of which it is the text part.
        kinds: how keys and values are stored.

    Raises:
        SvskError: some layer of the model does not keep keys and values, or keeps more.
    """
    decoder: Any = config.get_text_config(decoder=True)
    name = f"{decoder.model_type} model"
    if getattr(decoder, "kv_lora_rank", None) is not None:
        raise SvskError(
            f"--kv {kinds}: this {name} has latent attention (kv_lora_rank ="
            f" {decoder.kv_lora_rank}), whose engines store the latents and not keys and values."
            " Leave --kv out."
        )
    try:
        plain = DynamicCache(config=config).layers
    except KeyError as error:
        raise SvskError(
            f"--kv {kinds}: this {name} has layers of type {error}, which are no plain attention."
            " Leave --kv out."
        ) from error
    for index, layer in enumerate(plain):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise SvskError(
                f"--kv {kinds}: layer {index} of this {name} keeps a {type(layer).__name__},"
                " expected keys and values of attention alone. Leave --kv out."
            )
    values, keys = VALUE_KINDS[kinds.values], KEY_KINDS[kinds.keys]
    if keys is None:
        return Cache(layers=[PerChannelKeys(values) for _ in plain])
    return Cache(layers=[RoundedLayer(keys, values) for _ in plain])


def check_filled(cache: Cache, tokens: int) -> None:
    """Check that a forward pass over ``tokens`` tokens stored all of them in every layer.

    Raises:
        SvskError: it did not, so that its logits are not those of this cache.
    """
    for index, layer in enumerate(cache.layers):
        if layer.get_seq_length() != tokens:
            raise SvskError(
                f"The model stored {layer.get_seq_length()} of {tokens} tokens in layer {index} of"
                " the cache that it was given: it has a cache of its own, which --kv cannot"
                " replace. Leave --kv out."
            )
