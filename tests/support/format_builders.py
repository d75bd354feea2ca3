# SPDX-License-Identifier: Apache-2.0
"""Random quantised linears, and small checkpoints on disk, at the level of the format.

No model, no quantiser.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

from svsk_kernel_tools.stack_linears import random_linear as random_plain
from svsk_kernels.codebook import code_bits
from svsk_vllm.format import (
    Codebook,
    ConfigGroup,
    EmbeddingArgs,
    LinearSpec,
    QuantizedLinear,
    SidecarArgs,
    SvskCheckpointConfig,
    WeightArgs,
)
from svsk_vllm.format.group_scales import ScaleBits

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

property_test = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Decorator of property tests: a slow or busy machine is no failure."""


def make_group(
    *,
    targets: Sequence[str] = ("Linear",),
    group_size: int = 64,
    codebook: Codebook = "int4",
    scale_bits: ScaleBits = 16,
    rank: int = 0,
    tile_m: int = 512,
    tile_n: int = 1024,
    num_bits: int = 8,
    hot_rows: int = 0,
) -> ConfigGroup:
    """A config group, every setting of the scheme by keyword."""
    return ConfigGroup(
        targets=tuple(targets),
        weights=WeightArgs(
            num_bits=code_bits(codebook),
            group_size=group_size,
            codebook=codebook,
            scale_bits=scale_bits,
            hot_rows=hot_rows,
        ),
        sidecar=SidecarArgs.model_validate(
            {"rank": rank, "tile_m": tile_m, "tile_n": tile_n, "num_bits": num_bits}
        ),
    )


def random_linear(spec: LinearSpec, seed: int = 0) -> QuantizedLinear:
    """A linear of random content: every code, scales of both signs, full-range factors.

    Hot rows, which have codes of 8 bits, are drawn from all over.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = random_plain(
        spec.grid,
        spec.scale_dtype,
        generator,
        codebook=spec.scheme.weights.codebook,
        group_size=spec.group_size,
        rank=spec.rank,
        factor_bits=spec.factor_bits,
    )
    scale = plain.scale.float()
    scale = spec.scales.round(scale, spec.scales.row_scale(scale)).to(spec.scale_dtype)
    codes, hot, count = plain.codes, None, spec.scheme.weights.hot_rows
    if count:
        hot = torch.randperm(spec.n, generator=generator)[:count].sort().values
        wide = torch.randint(-128, 128, (count, spec.k), generator=generator)
        codes = codes.index_copy(0, hot, wide.to(torch.int8))
        hot = hot.to(torch.int32)
    return QuantizedLinear(spec, codes, scale, plain.u, plain.v, plain.gain, hot)


def write_checkpoint(
    folder: Path,
    config: SvskCheckpointConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder by hand: the writer of the offline tool is not what is tested here.

    Args:
        folder: made when missing.
        config: goes into config.json.
        tensors: every tensor by name.
        shards: 1 for ``model.safetensors``, more for that many shards (tensors dealt in turn) and
            an index.
        hf_config: other keys of config.json, ``{"dtype": "bfloat16"}`` by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    declared = {"dtype": "bfloat16"} if hf_config is None else dict(hf_config)
    write_json(folder / "config.json", {**declared, "quantization_config": config.to_dict()})
    save_shards(folder, tensors, shards)


def save_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shards: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to one file, or deal them in turn to several with an index."""
    header = None if metadata is None else dict(metadata)
    if shards == 1:
        save_file(dict(tensors), folder / SINGLE, header)
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name, its in weight_map.items() if its == file}
        save_file(part, folder / file, header)
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def total_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all tensors, as an index counts them."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Load a JSON object, let ``change`` alter it in place, write it back."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``change`` alter the tensors of ``model.safetensors`` in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@dataclass(frozen=True)
class SmallCheckpoint:
    """A checkpoint of three quantised linears and four dense tensors, and what was put into it.

    ``q_proj``: base only, int4, K of 128. ``o_proj``: 4-bit factors of rank 2, quad8, groups of 32,
    K of 96, a bias. ``down_proj``: int8 factors of rank 3, ragged tiles in both directions, in a
    group that names it.
    """

    folder: Path
    config: SvskCheckpointConfig
    linears: dict[str, QuantizedLinear]
    dense: dict[str, torch.Tensor]

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of the unquantised architecture."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.dense.items()}
        return shapes | {
            f"{name}.weight": (linear.spec.n, linear.spec.k)
            for name, linear in self.linears.items()
        }

    def file_of(self, tensor: str) -> Path:
        """The safetensors file that holds a tensor."""
        index = self.folder / INDEX
        if not index.exists():
            return self.folder / SINGLE
        shard: str = json.loads(index.read_text(encoding="utf-8"))["weight_map"][tensor]
        return self.folder / shard

    def edit_config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Alter config.json."""
        edit_json(self.folder / "config.json", change)

    def remove(self, name: str) -> None:
        """Take a tensor out of its file and out of the index."""
        path = self.file_of(name)
        if (self.folder / INDEX).exists():
            edit_json(self.folder / INDEX, lambda index: index["weight_map"].pop(name))
        self._save({key: tensor for key, tensor in load_file(path).items() if key != name}, path)

    def replace(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace a tensor by what ``change`` makes of it."""
        path = self.file_of(name)
        tensors = load_file(path)
        self._save({**tensors, name: change(tensors[name]).contiguous()}, path)

    def add(self, name: str, tensor: torch.Tensor, beside: str, *, to_index: bool = True) -> None:
        """Add a tensor to the file that holds ``beside``, and to the index where there is one."""
        path = self.file_of(beside)
        if to_index and (self.folder / INDEX).exists():
            edit_json(
                self.folder / INDEX, lambda index: index["weight_map"].update({name: path.name})
            )
        self._save({**load_file(path), name: tensor}, path)

    def _save(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """Save a shard and keep the index's size true: a test sees only the damage it means."""
        save_file(tensors, path)
        if (self.folder / INDEX).exists():
            total = sum(total_bytes(load_file(file)) for file in self.folder.glob("*.safetensors"))
            edit_json(self.folder / INDEX, lambda index: index["metadata"].update(total_size=total))


Q_PROJ = "model.layers.0.self_attn.q_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


def build_small_checkpoint(
    folder: Path,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    scale_bits: ScaleBits = 16,
    *,
    tables: bool = False,
    hot_rows: int = 0,
) -> SmallCheckpoint:
    """Write a :class:`SmallCheckpoint` of a model of dtype ``dtype``.

    Args:
        folder: where.
        shards: how many.
        dtype: of scales and dense tensors.
        scale_bits: of the three linears.
        tables: quantise embedding and head too, to 8 bits: 50 x 32 in groups of 16, 50 x 64.
        hot_rows: of both tables, whose other rows then have 4 bits.
    """
    codebook: Codebook = "int4" if hot_rows else "int8"
    config = SvskCheckpointConfig(
        config_groups={
            "base": make_group(scale_bits=scale_bits),
            "attention": make_group(
                targets=["re:.*o_proj$"],
                group_size=32,
                codebook="quad8",
                rank=2,
                tile_m=16,
                tile_n=40,
                num_bits=4,
                scale_bits=scale_bits,
            ),
            "mlp": make_group(
                targets=[DOWN_PROJ], rank=3, tile_m=16, tile_n=100, scale_bits=scale_bits
            ),
        },
        ignore=() if tables else (HEAD,),
        producer={"svsk": "0.1.0", "anything": [1, None]},
    )
    shapes = {Q_PROJ: (24, 128), O_PROJ: (33, 96), DOWN_PROJ: (20, 192)}
    if tables:
        more = {
            "head": make_group(targets=[HEAD], codebook=codebook, hot_rows=hot_rows),
            "embedding": make_group(
                targets=[EMBEDDING], codebook=codebook, group_size=16, hot_rows=hot_rows
            ),
        }
        config = config.model_copy(
            update={
                "config_groups": config.config_groups | more,
                "embedding": EmbeddingArgs(module=EMBEDDING),
            }
        )
        shapes |= {EMBEDDING: (50, 32), HEAD: (50, 64)}
    linears: dict[str, QuantizedLinear] = {}
    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, (n, k)) in enumerate(shapes.items()):
        scheme = config.scheme_for(name)
        assert scheme is not None
        linears[name] = random_linear(LinearSpec(name, n, k, scheme, dtype), seed)
        tensors |= linears[name].to_tensors()
    generator = torch.Generator().manual_seed(9)
    dense = {
        f"{EMBEDDING}.weight": torch.randn(50, 24, generator=generator).to(dtype),
        "model.norm.weight": torch.randn(24, generator=generator),
        f"{O_PROJ}.bias": torch.randn(33, generator=generator).to(dtype),
        f"{HEAD}.weight": torch.randn(50, 24, generator=generator).to(dtype),
    }
    dense = {name: t for name, t in dense.items() if name.removesuffix(".weight") not in linears}
    hf_config = {"dtype": str(dtype).removeprefix("torch.")}
    write_checkpoint(folder, config, tensors | dense, shards=shards, hf_config=hf_config)
    return SmallCheckpoint(folder, config, linears, dense)
