# SPDX-License-Identifier: Apache-2.0
"""Llama-like models between Hugging Face's names and those of llama.cpp's convert_hf_to_gguf.py."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch

from peers.common import PeerError

__all__ = ["from_gguf", "gguf_names", "interleave_heads", "to_gguf", "uninterleave_heads"]

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
)


def interleave_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of q or k in the order of llama.cpp's rotary embedding: pairs beside each other.

    Args:
        weight: [heads * d, K], in which row i of a head turns with row i + d / 2.
        heads: number of heads.

    Returns:
        [heads * d, K], in which row 2 i of a head turns with row 2 i + 1.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def uninterleave_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo :func:`interleave_heads`."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_names(names: list[str], blocks: int) -> dict[str, str]:
    """GGUF's name of each tensor of a Llama-like Hugging Face model.

    Raises:
        PeerError: GGUF's Llama has no place for a tensor.
    """
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    renamed = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise PeerError(
            f"{unknown[0]}: GGUF's llama has no tensor for it."
            " Only Llama models can be converted here."
        )
    return {name: str(new) for name, new in renamed.items()}


def to_gguf(model: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a float32 GGUF file, with all that llama.cpp needs to quantise it: it has no tokenizer.

    Args:
        model: folder of a Llama model.
        tensors: the model's tensors.
        path: file to write.

    Raises:
        PeerError: the model is no Llama.
    """
    config = llama_config(model)
    names = gguf_names(list(tensors), config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        weight = tensor.float()
        if name.endswith("q_proj.weight"):
            weight = interleave_heads(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = interleave_heads(weight, kv_heads(config))
        writer.add_tensor(names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_gguf(path: Path, model: str, names: list[str]) -> dict[str, tuple[str, int, torch.Tensor]]:
    """Read tensors back from a GGUF file.

    Args:
        path: the file.
        model: folder of the model it was made from.
        names: Hugging Face names of the tensors.

    Returns:
        Name -> GGUF type, bits it occupies (codes, scales and minima), and its float32 values.

    Raises:
        PeerError: the file lacks a tensor.
    """
    config = llama_config(model)
    stored: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for name, new in gguf_names(names, config["num_hidden_layers"]).items():
        if new not in stored:
            raise PeerError(f"{path}: has no tensor {new}, which is {name}.")
        tensor = stored[new]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            weight = uninterleave_heads(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = uninterleave_heads(weight, kv_heads(config))
        weights[name] = (str(tensor.tensor_type.name), 8 * int(tensor.n_bytes), weight.contiguous())
    return weights


def llama_config(model: str) -> dict[str, Any]:
    """The config of a Llama model.

    Raises:
        PeerError: it is another model, or lacks what GGUF needs.
    """
    path = Path(model) / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in _NEEDED if key not in config]
    scaled = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get(
        "rope_type", "default"
    )
    if config.get("model_type") != "llama" or missing or scaled != "default":
        raise PeerError(
            f"{path}: model_type {config.get('model_type')!r}, rotary embedding {scaled!r}, missing"
            f" {missing}; only Llama models with the default rotary"
            " embedding can be converted here."
        )
    return config


def kv_heads(config: dict[str, Any]) -> int:
    """Number of key and value heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])
