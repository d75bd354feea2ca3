# SPDX-License-Identifier: Apache-2.0
"""SVSK checkpoints of a large model's size that take no room: whole headers, files without data.

    python -m tests.support.sparse_checkpoints qwen3-8b FOLDER

Schemes differ from matrix to matrix, as a bit budget makes them, and config.json names each.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from svsk_eval.speed.random_model import SHAPES
from svsk_vllm.format import ConfigGroup, LinearSpec, SvskCheckpointConfig
from svsk_vllm.format.model_config import declared
from svsk_vllm.format.seal import schemes_metadata
from tests.support.tiny_models import scheme

__all__ = ["write_sparse_svsk"]

SHARD_BYTES: Final = 2 * 10**9
_DTYPES: Final = {
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_sparse_svsk(
    folder: Path, shape: Mapping[str, Any], *, experts: int = 0, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a checkpoint with the tensors of a model of Qwen3's kind, all of them zeros.

    Args:
        folder: made when missing.
        shape: keys of config.json, as in ``svsk_eval.speed.random_model.SHAPES``.
        experts: number of experts of a block, whose width is ``moe_intermediate_size``; 0 for a
            dense model.
        shard_bytes: bytes of a file at most, unless a tensor is larger.

    Returns:
        ``folder``.
    """
    schemes = {name: _scheme(number) for number, name in enumerate(_shapes(shape, experts))}
    by_scheme: dict[str, list[str]] = {}
    for name, group in schemes.items():
        by_scheme.setdefault(group.model_dump_json(exclude={"targets"}), []).append(name)
    groups = {
        f"group_{number}": schemes[names[0]].model_copy(update={"targets": tuple(names)})
        for number, names in enumerate(by_scheme.values())
    }
    hidden = shape["hidden_size"]
    tensors: _Tensors = {
        "model.embed_tokens.weight": (torch.bfloat16, (shape["vocab_size"], hidden)),
        "lm_head.weight": (torch.bfloat16, (shape["vocab_size"], hidden)),
        "model.norm.weight": (torch.bfloat16, (hidden,)),
    }
    for name, (n, k) in _shapes(shape, experts).items():
        stored = LinearSpec(name, n, k, schemes[name]).tensors()
        tensors |= {f"{name}.{key}": (one.dtype, one.shape) for key, one in stored.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = SvskCheckpointConfig(config_groups=groups, ignore=("lm_head",))
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **shape}
    (folder / "config.json").write_text(json.dumps(declared(kind, config)))
    _write_shards(folder, tensors, shard_bytes, schemes_metadata(schemes))
    return folder


def _shapes(shape: Mapping[str, Any], experts: int) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of the blocks."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    queries, keys = (shape[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    attention = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    width = shape["moe_intermediate_size" if experts else "intermediate_size"]
    part = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    parents = [f"mlp.experts.{number}" for number in range(experts)] or ["mlp"]
    block = attention | {
        f"{parent}.{key}": size for parent in parents for key, size in part.items()
    }
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape["num_hidden_layers"])
        for name, size in block.items()
    }


def _scheme(number: int) -> ConfigGroup:
    """One of twenty-four schemes."""
    return scheme(
        "Linear",
        rank=(0, 8, 16, 32)[number % 4],
        num_bits=4,
        group_size=(16, 32, 64)[number // 4 % 3],
        codebook="quad8",
        scale_bits=(6, 8)[number // 12 % 2],
        tile_m=0,
        tile_n=0,
    )


def _write_shards(
    folder: Path, tensors: _Tensors, shard_bytes: int, metadata: Mapping[str, str]
) -> None:
    shards: list[dict[str, Any]] = [{}]
    end = total = 0
    for name, (dtype, size) in tensors.items():
        length = torch.Size(size).numel() * dtype.itemsize
        if end and end + length > shard_bytes:
            shards.append({})
            end = 0
        shards[-1][name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(size),
            "data_offsets": [end, end + length],
        }
        end, total = end + length, total + length
    weight_map = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        last = max(entry["data_offsets"][1] for entry in header.values())
        text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + last)  # no data: the file system keeps no zeros
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    write_sparse_svsk(Path(sys.argv[2]), SHAPES[sys.argv[1]])
