# SPDX-License-Identifier: Apache-2.0
"""GGUF's metadata and tensors of Llama, Qwen2 and Qwen3 models, without a template.

As llama.cpp's own converter writes them (convert_hf_to_gguf.py, LlamaModel, Qwen2Model,
Qwen3Model). SmolLM and SmolLM2 are Llamas.
"""

from typing import Any, Final

import gguf
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.export.gguf.file import Describe, GgufTensor
from svsk_offline.export.gguf.plan import (
    Placed,
    Plan,
    dense_tensor,
    file_type,
    gguf_names,
    linear_tensor,
    weight_in_order,
)
from svsk_offline.export.gguf.row_order import head_counts, interleaved_rows
from svsk_offline.export.gguf.tokenizer import add_tokenizer
from svsk_vllm.format import Checkpoint

__all__ = ["FAMILIES", "family_plan"]

FAMILIES: Final = ("llama", "qwen2", "qwen3")
"""``model_type`` of config.json, and GGUF's name of the architecture."""
_INTERLEAVED: Final = "llama"
"""The one of them whose rotary embedding turns neighbours in llama.cpp."""
_NEEDED: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_EMBEDDING: Final = "token_embd.weight"
_HEAD: Final = "output.weight"


def family_plan(source: Checkpoint) -> Plan:
    """Plan a file from the checkpoint alone.

    Raises:
        SvskError: a model of another family, or with a setting that is not known here.
    """
    config, where = source.hf_config, source.folder / "config.json"
    architecture = config.get("model_type")
    if architecture not in FAMILIES:
        raise SvskError(
            f"{where}: model_type {architecture!r}: {', '.join(FAMILIES)} can be written from the"
            " checkpoint alone. Give a GGUF file of the same model with --template."
        )
    _require_plain(source)
    names = gguf_names(source, architecture)
    placed: dict[str, Placed] = {}
    tensors: list[GgufTensor] = []
    for name, new in names.items():
        module, order = name.removesuffix(".weight"), _order(source, architecture, name)
        if module in source.linears:
            placed[module] = Placed(new, order)
            tensors.append(linear_tensor(source, module, placed[module]))
        else:
            tensors.append(dense_tensor(new, weight_in_order(source.read_dense(name), order)))
    rows = {tensor.name: tensor.shape[0] for tensor in tensors}
    if _EMBEDDING not in rows:
        raise SvskError(f"{where}: the checkpoint has no embedding, expected {_EMBEDDING}'s.")
    if _HEAD not in rows and not config.get("tie_word_embeddings"):
        raise SvskError(f"{where}: the head is not tied, but the checkpoint has none.")
    if (factors := _rope_factors(source)) is not None:
        tensors.append(dense_tensor("rope_freqs.weight", factors))
    describe = _metadata(source, rows[_EMBEDDING], placed)
    return Plan(architecture, describe, tensors, placed)


def _require_plain(source: Checkpoint) -> None:
    """Refuse settings that llama.cpp would not be told of."""
    config, where = source.hf_config, source.folder / "config.json"
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise SvskError(f"{where}: has no {missing[0]}, which GGUF needs.")
    kind = _rope(config)["rope_type"]
    for key, value, known in (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("use_sliding_window", bool(config.get("use_sliding_window")), (False,)),
        ("rope_type", kind, ("default", "linear", "llama3", "yarn")),
    ):
        if value not in known:
            raise SvskError(
                f"{where}: {key} {value!r}: expected one of {known}. Give a GGUF file of the same"
                " model with --template."
            )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, which transformers 5 keeps under one key."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    theta = stated.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**stated, "rope_type": kind, "rope_theta": float(theta)}


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _order(source: Checkpoint, architecture: str, name: str) -> torch.Tensor | None:
    heads, kv_heads = head_counts(source.hf_config)
    projection = name.rpartition(".")[0].rpartition(".")[2]
    count = {"q_proj": heads, "k_proj": kv_heads}.get(projection)
    if architecture != _INTERLEAVED or count is None:
        return None
    return interleaved_rows(count * _head_dim(source.hf_config), count)


def _rope_factors(source: Checkpoint) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies of Llama 3's rotary embedding by, float32 [d / 2]."""
    rope = _rope(source.hf_config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(source.folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = _head_dim(source.hf_config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    factors: torch.Tensor = plain / scaled
    return factors


def _metadata(source: Checkpoint, rows: int, placed: dict[str, Placed]) -> Describe:
    config = source.hf_config
    heads, kv_heads = head_counts(config)
    rope = _rope(config)

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(source.folder.resolve().name)
        writer.add_file_type(file_type(source, placed))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(rows)
        writer.add_rope_dimension_count(_head_dim(config))
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(
                rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            )
        add_tokenizer(writer, source.folder, rows)

    return describe
