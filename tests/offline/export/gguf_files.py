# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests: tiny checkpoints to export, templates by another hand, and reading back."""

from pathlib import Path
from typing import Any

import gguf
import torch

from svsk_vllm.format import ConfigGroup, EmbeddingArgs, ShardedReader
from tests.support.tiny_models import (
    EMBEDDING,
    scheme,
    table_schemes,
    write_dense,
    write_random_svsk,
)

HEADS, KV_HEADS = 4, 2
"""Of the tiny models."""


def whole_matrix_schemes() -> dict[str, ConfigGroup]:
    """Both codebooks, every way to store scales, groups of 32 and 64, sidecars without tiles."""
    return {
        "default": scheme("Linear", rank=3, tile_m=0, tile_n=0),
        "k": scheme(r"re:.*\.k_proj$", rank=2, tile_m=0, tile_n=0, scale_bits=8),
        "v": scheme(r"re:.*\.v_proj$"),
        "o": scheme(
            r"re:.*\.o_proj$",
            rank=4,
            num_bits=4,
            group_size=32,
            codebook="quad8",
            tile_m=0,
            tile_n=0,
        ),
        "up": scheme(r"re:.*\.up_proj$", group_size=32, scale_bits=6, rank=5, tile_m=0, tile_n=0),
    }


def write_svsk(folder: Path, family: str, *, tables: bool = False) -> Path:
    """A dense model and a checkpoint of it, both below ``folder``; returns the checkpoint."""
    tied = family == "llama"
    more: dict[str, ConfigGroup] = {}
    if tables:
        more = table_schemes(None if tied else "int8", "int8")
    return write_random_svsk(
        write_dense(folder / "dense", family),
        folder / "svsk",
        schemes={**whole_matrix_schemes(), **more},
        ignore=() if tables else ("lm_head",),
        embedding=EmbeddingArgs(module=EMBEDDING, tied=tied) if tables else None,
    )


def in_llamas_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as arch llama has them, said in another way than the exporter does."""
    head = len(weight) // heads
    rows = [
        h * head + i + half * head // 2
        for h in range(heads)
        for i in range(head // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def expected_order(name: str, weight: torch.Tensor, architecture: str) -> torch.Tensor:
    """A weight or bias of the tiny models as GGUF has its rows."""
    for projection, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if architecture == "llama" and projection in name:
            return in_llamas_order(weight, heads)
    return weight


def names_of(architecture: str) -> Any:
    """GGUF's name of a tensor of a model of two blocks."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 2)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def write_template(dense: Path, path: Path, architecture: str, kind: str = "F16") -> Path:
    """The dense model as a GGUF file whose matrices have the type ``kind``."""
    reader, name_of = ShardedReader(dense), names_of(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("template")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name in reader.names:
        weight = expected_order(name, reader.read(name).float(), architecture)
        numbers = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        data = gguf.quants.quantize(weight.numpy(), numbers)
        writer.add_tensor(name_of(name), data, raw_dtype=numbers)
    writer.add_tensor("rope_freqs.weight", torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, torch.Tensor]]]:
    """Metadata, and type and float32 values of each tensor."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(values).reshape(shape))
    return {key: field.contents() for key, field in reader.fields.items()}, tensors
