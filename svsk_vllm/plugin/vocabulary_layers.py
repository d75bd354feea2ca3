# SPDX-License-Identifier: Apache-2.0
"""vLLM's embedding and output head, with the quantisation config that models leave out.

Of vLLM's model classes about one in three passes its config on to the embedding, and as many the
module's name. So vLLM's own registry for out-of-tree layers is given subclasses that fill in the
config, where it is this package's and the model gave none. They do nothing else, and nothing at all
for another model in the process.
"""

import inspect
import logging
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.table_method import TiedHeadMethod

__all__ = ["SvskParallelLMHead", "SvskVocabParallelEmbedding", "register_vocabulary_layers"]

_logger = logging.getLogger("vllm.svsk")  # vLLM shows what is logged below its own name


def _with_config(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords with this package's config, where the model gave none and it is the current one."""
    places = list(inspect.signature(kind.__dict__["__init__"]).parameters)[1:]
    given = dict(zip(places, args, strict=False)) | kwargs
    current = get_current_vllm_config_or_none()
    config = None if current is None else current.quant_config
    if given.get("quant_method") is not None or given.get("quant_config") is not None:
        return kwargs
    if not isinstance(config, SvskConfig) or "quant_config" in places[: len(args)]:
        return kwargs
    return {**kwargs, "quant_config": config}


class SvskVocabParallelEmbedding(VocabParallelEmbedding):
    """vLLM's embedding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_config(VocabParallelEmbedding, args, kwargs))


class SvskParallelLMHead(ParallelLMHead):
    """vLLM's output head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_config(ParallelLMHead, args, kwargs))

    def tie_weights(self, embed_tokens: Any) -> Any:
        """The head that shares the embedding's weight; a quantised table is its head itself."""
        if isinstance(self.quant_method, TiedHeadMethod):
            return self.quant_method.tie_weights(self, embed_tokens)
        return super().tie_weights(embed_tokens)


def register_vocabulary_layers() -> None:
    """Give vLLM's registry the subclasses; again, it does nothing."""
    for name, kind in (
        ("VocabParallelEmbedding", SvskVocabParallelEmbedding),
        ("ParallelLMHead", SvskParallelLMHead),
    ):
        other = op_registry_oot.get(name)
        if other is None:
            PluggableLayer.register_oot(name=name)(kind)
        elif other is not kind:
            _logger.warning(
                "%s is replaced by %s of another package: quantised embeddings and heads of models"
                " that do not pass their quantisation config on are not served.",
                name,
                other.__qualname__,
            )
