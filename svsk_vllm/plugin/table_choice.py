# SPDX-License-Identifier: Apache-2.0
"""Which of the checkpoint's modules an embedding or output head of vLLM's model is."""

import re
from typing import Any, Final, Protocol

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from svsk_vllm.format import (
    SUFFIXES,
    ConfigGroup,
    LinearSpec,
    SvskCheckpointConfig,
    SvskFormatError,
)
from svsk_vllm.format.suffixes import WEIGHT_PACKED
from svsk_vllm.plugin.arrival import LinearRecord, expect, record_loads
from svsk_vllm.plugin.linear_method import PARAMETERS, Origin
from svsk_vllm.plugin.stored_names import StoredModules, stored_dense, stored_twice
from svsk_vllm.plugin.table_method import SvskHeadMethod, SvskTableMethod, TiedHeadMethod

__all__ = ["table_method"]

_IN_BLOCK: Final = re.compile(r"\.\d+\.")
_EMBEDDINGS: Final = ("embed_tokens", "lm_head")
"""What vLLM's LoRA calls them: the last parts of the names of modules it wraps."""


class Known(Protocol):
    """What is known of a checkpoint while vLLM builds its model."""

    checkpoint: SvskCheckpointConfig

    @property
    def stored(self) -> StoredModules:
        """The stored modules; none where no safetensors can be looked into."""

    def renamed(self) -> SvskCheckpointConfig:
        """The configuration, with vLLM's names where nothing is known to be stored."""

    def stored_specs(
        self, names: tuple[str, ...], schemes: list[ConfigGroup]
    ) -> tuple[LinearSpec, ...] | None:
        """Specifications of stored modules."""


def table_method(
    config: Known, layer: Any, prefix: str, *, counted: bool
) -> QuantizeMethodBase | None:
    """Method of an embedding or output head; None where it is dense.

    Args:
        config: of the checkpoint.
        layer: while it is built: it knows its sizes.
        prefix: its name in vLLM's model, empty where the model does not say.
        counted: whether parameters have to be loaded.

    Raises:
        SvskFormatError: config.json and the stored tensors disagree, or LoRA is to change it.
    """
    is_head = isinstance(layer, ParallelLMHead)
    declared = config.renamed().embedding
    name = _stored_name(config, layer, prefix, is_head=is_head)
    if name is None:
        if is_head and declared is not None and declared.tied:
            _refuse_lora(prefix or "lm_head")
            return TiedHeadMethod(prefix or "lm_head")
        return None
    scheme = _scheme(config, name, is_head=is_head)
    if scheme is None:
        return None
    _refuse_lora(name)
    origin = Origin((name,), config.stored_specs((name,), [scheme]), counted=counted)
    record_loads(layer)
    expect(layer, LinearRecord((None,), PARAMETERS, counted))
    method = SvskHeadMethod if is_head else SvskTableMethod
    return method(prefix or name, [name], [scheme], origin)


def _stored_name(config: Known, layer: Any, prefix: str, *, is_head: bool) -> str | None:
    """The stored module that a layer is: by its name, or where it has none by its size."""
    declared = config.renamed().embedding
    if not config.stored.tensors:  # by other names than the checkpoint's: config.json says which
        if is_head:
            return prefix or None
        return declared.module if declared and prefix in ("", declared.module) else None
    if prefix:
        return config.stored.find(prefix)
    if is_head:
        candidates = [
            name
            for name in config.stored.modules
            if not config.checkpoint.is_embedding(name) and not _IN_BLOCK.search(name)
        ]
    else:
        candidates = [] if declared is None else [declared.module]
    sizes = {name: _size(config, name) for name in candidates}
    wanted = (layer.org_vocab_size, layer.embedding_dim)
    return next((name for name, size in sizes.items() if size == wanted), None)


def _size(config: Known, name: str) -> tuple[int, int] | None:
    """Rows and columns of a module that is stored quantised, else None."""
    packed = config.stored.tensors.get(f"{name}.{WEIGHT_PACKED}")
    scheme = config.checkpoint.scheme_for(name)
    if packed is None or scheme is None or len(packed.shape) != 2:
        return None
    return scheme.weights.shape_of(packed.shape)


def _scheme(config: Known, name: str, *, is_head: bool) -> ConfigGroup | None:
    known = config.renamed()
    scheme = known.scheme_for(name, by_class=False)
    if not config.stored.tensors:
        return scheme
    held = config.stored.suffixes(name)
    if not held & set(SUFFIXES):
        if scheme is not None:
            raise stored_dense(name)
        return None
    if "weight" in held:
        raise stored_twice(name)
    scheme = known.scheme_for(name)
    if scheme is None or not (is_head or known.is_embedding(name)):
        raise SvskFormatError(
            f"{name}: stored quantised, but config.json does not"
            f" {'quantise it' if is_head else 'name it as its embedding'}. Correct it."
        )
    return scheme


def _refuse_lora(name: str) -> None:
    """Refuse adapters of a quantised embedding or head.

    vLLM wraps both as soon as adapters are enabled, and then reads the dense weight.
    """
    lora = getattr(get_current_vllm_config(), "lora_config", None)
    if lora is None:
        return
    targets = getattr(lora, "target_modules", None)
    if targets and not any(end in target for target in targets for end in _EMBEDDINGS):
        return
    raise SvskFormatError(
        f"{name}: it is quantised, and vLLM's LoRA layers for embeddings and output heads read a"
        " dense weight, which is not there. Say which modules adapters change, without these"
        " (--lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj), or"
        " quantise with --head dense --embedding dense."
    )
