# SPDX-License-Identifier: Apache-2.0
"""Llama-like models between Hugging Face's names and those of llama.cpp's convert_hf_to_gguf.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from peers.common import PeerError

__all__ = ["Family", "from_gguf", "interleave_heads", "to_gguf", "uninterleave_heads"]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""By ``model_type``."""

_INTERLEAVED = ("llama",)
"""Whose rotary embedding llama.cpp computes on pairs of rows that lie beside each other."""

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


@dataclass(frozen=True)
class Family:
    """What GGUF makes of a model: its architecture, its tensors' names, the order of their rows.

    Attributes:
        architecture: GGUF's number of it.
        config: the model's config.json.
    """

    architecture: gguf.MODEL_ARCH
    config: dict[str, Any]

    @classmethod
    def of(cls, model: str) -> "Family":
        """Read it from a model's folder.

        Raises:
            PeerError: it is another model, or its config lacks what GGUF needs.
        """
        path = Path(model) / "config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
        missing = [key for key in _NEEDED if key not in config]
        scaled = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get(
            "rope_type", "default"
        )
        biased = kind in _INTERLEAVED and config.get("attention_bias")
        if kind not in _ARCHITECTURES or missing or scaled != "default" or biased:
            raise PeerError(
                f"{path}: model_type {kind!r}, rotary embedding {scaled!r}, attention_bias"
                f" {config.get('attention_bias', False)}, missing {missing}; only"
                f" {', '.join(_ARCHITECTURES)} with the default rotary embedding, and llama without"
                " biases, can be converted here."
            )
        return cls(_ARCHITECTURES[kind], config)

    def names(self, names: list[str]) -> dict[str, str]:
        """GGUF's name of each tensor of the model.

        Raises:
            PeerError: the architecture has no place for a tensor.
        """
        table = gguf.get_tensor_name_map(self.architecture, self.config["num_hidden_layers"])
        renamed = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
        unknown = [name for name, new in renamed.items() if new is None]
        if unknown:
            raise PeerError(
                f"{unknown[0]}: GGUF's {gguf.MODEL_ARCH_NAMES[self.architecture]} has no tensor for"
                " it. Only models with the usual tensors of their family can be converted here."
            )
        return {name: str(new) for name, new in renamed.items()}

    def rotated_heads(self, name: str) -> int | None:
        """Heads of a weight whose rows llama.cpp wants in another order; None for other weights."""
        if self.config["model_type"] not in _INTERLEAVED:
            return None
        if name.endswith("q_proj.weight"):
            return int(self.config["num_attention_heads"])
        return self.kv_heads if name.endswith("k_proj.weight") else None

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        config = self.config
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def to_gguf(family: Family, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a float32 GGUF file, with all that llama.cpp needs to quantise it: it has no tokenizer.

    Args:
        family: of the model.
        tensors: the model's.
        path: file to write.

    Raises:
        PeerError: GGUF has no place for a tensor.
    """
    config, names = family.config, family.names(list(tensors))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(family.kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        weight, rotated = tensor.float(), family.rotated_heads(name)
        if rotated is not None:
            weight = interleave_heads(weight, rotated)
        writer.add_tensor(names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_gguf(
    path: Path, family: Family, names: list[str]
) -> dict[str, tuple[str, int, torch.Tensor]]:
    """Read tensors back from a GGUF file.

    Args:
        path: the file.
        family: of the model it was made from.
        names: Hugging Face names of the tensors.

    Returns:
        Name -> GGUF type, bits it occupies (codes, scales and minima), and its float32 values.

    Raises:
        PeerError: the file lacks a tensor.
    """
    stored: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for name, new in family.names(names).items():
        if new not in stored:
            raise PeerError(f"{path}: has no tensor {new}, which is {name}.")
        tensor = stored[new]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        rotated = family.rotated_heads(name)
        if rotated is not None:
            weight = uninterleave_heads(weight, rotated)
        weights[name] = (str(tensor.tensor_type.name), 8 * int(tensor.n_bytes), weight.contiguous())
    return weights
