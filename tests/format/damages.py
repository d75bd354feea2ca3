# SPDX-License-Identifier: Apache-2.0
"""Ways in which a checkpoint of three shards is damaged, and what is said of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.format_builders import (
    DOWN_PROJ,
    INDEX,
    O_PROJ,
    Q_PROJ,
    SINGLE,
    SmallCheckpoint,
    edit_json,
)

Damage = Callable[[SmallCheckpoint], object]
EMBED = "model.embed_tokens.weight"
SHARD_2 = "model-00002-of-00003.safetensors"


@dataclass(frozen=True)
class Case:
    """Damage to a checkpoint of three shards, and what each line of its problems must hold."""

    name: str
    damage: Damage
    lines: tuple[tuple[str, ...], ...]


def with_value(position: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[position] = value
        return tensor

    return change


def edit_quantization(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda small: small.edit_config(lambda config: change(config["quantization_config"]))


def edit_weight_map(change: Callable[[dict[str, str]], object]) -> Damage:
    return lambda small: edit_json(small.folder / INDEX, lambda index: change(index["weight_map"]))


def truncate(small: SmallCheckpoint) -> None:
    path = small.folder / SHARD_2
    path.write_bytes(path.read_bytes()[:-100])


def keep_20_rows(small: SmallCheckpoint) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        small.replace(f"{Q_PROJ}.{suffix}", lambda tensor: tensor[:20])


def missing(name: str, shape: str) -> Case:
    return Case(f"no {name}", lambda small: small.remove(name), ((f"{name}: missing", shape),))


def replaced(
    title: str, name: str, change: Callable[[torch.Tensor], torch.Tensor], *words: str
) -> Case:
    return Case(f"{title} {name}", lambda small: small.replace(name, change), ((name, *words),))


TENSORS = [
    missing(f"{Q_PROJ}.weight_packed", "weight_scale is there"),
    missing(f"{Q_PROJ}.weight_scale", "torch.bfloat16 [24, 2]"),
    missing(f"{DOWN_PROJ}.sidecar_u", "torch.int8 [20, 2, 3]"),
    missing(f"{DOWN_PROJ}.sidecar_v", "torch.int8 [2, 3, 192]"),
    missing(f"{O_PROJ}.sidecar_gain", "torch.float32 [3, 3, 2]"),
    replaced(
        "dtype of",
        f"{Q_PROJ}.weight_packed",
        torch.Tensor.long,
        "torch.int64",
        "expected torch.int32 [24, 16]",
    ),
    replaced(
        "dtype of",
        f"{Q_PROJ}.weight_scale",
        torch.Tensor.int,
        "torch.int32",
        "expected torch.bfloat16 [24, 2]",
    ),
    replaced(
        "dtype of",
        f"{DOWN_PROJ}.sidecar_u",
        torch.Tensor.byte,
        "torch.uint8",
        "expected torch.int8 [20, 2, 3]",
    ),
    replaced(
        "dtype of",
        f"{O_PROJ}.sidecar_v",
        torch.Tensor.char,
        "torch.int8",
        "expected torch.uint8 [3, 2, 48]",
    ),
    replaced(
        "dtype of",
        f"{O_PROJ}.sidecar_gain",
        torch.Tensor.half,
        "torch.float16",
        "expected torch.float32",
    ),
    replaced(
        "shape of",
        f"{Q_PROJ}.weight_packed",
        lambda t: t[:, :9],
        "[24, 9]",
        "K = 72",
        "group size 64",
    ),
    replaced(
        "axes of", f"{Q_PROJ}.weight_packed", torch.Tensor.flatten, "[384]", "expected a matrix"
    ),
    replaced(
        "no rows in", f"{DOWN_PROJ}.weight_packed", lambda t: t[:0], "[0, 24]", "one row or more"
    ),
    replaced(
        "shape of",
        f"{Q_PROJ}.weight_scale",
        lambda t: t[:, :1],
        "[24, 1]",
        "expected torch.bfloat16 [24, 2]",
    ),
    replaced(
        "shape of", f"{DOWN_PROJ}.sidecar_u", lambda t: t[..., :2], "[20, 2, 2]", "[20, 2, 3]"
    ),
    replaced("shape of", f"{DOWN_PROJ}.sidecar_v", lambda t: t.mT, "[2, 192, 3]", "[2, 3, 192]"),
    replaced("shape of", f"{DOWN_PROJ}.sidecar_gain", lambda t: t[:1], "[1, 2, 3]", "[2, 2, 3]"),
    replaced(
        "NaN in",
        f"{Q_PROJ}.weight_scale",
        with_value(5, float("nan")),
        "1 of 48 values are not finite",
    ),
    replaced(
        "inf in",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, float("inf")),
        "1 of 12 values are not finite",
    ),
    replaced("NaN in", EMBED, with_value(7, float("nan")), "1 of 1200 values are not finite"),
    replaced(
        "-inf in", f"{O_PROJ}.bias", with_value(0, float("-inf")), "1 of 33 values are not finite"
    ),
    Case(
        "sidecar tensor of nothing",
        lambda small: small.add(
            "model.layers.9.mlp.up_proj.sidecar_u", torch.zeros(2, 1, 1).char(), beside=EMBED
        ),
        (("model.layers.9.mlp.up_proj.weight_packed: missing", "sidecar_u is there"),),
    ),
    Case(
        "sidecar of a linear of rank 0",
        lambda small: small.add(f"{Q_PROJ}.sidecar_v", torch.zeros(1, 1, 128).char(), beside=EMBED),
        ((f"{Q_PROJ}.sidecar_v: unexpected", "rank 0"),),
    ),
    Case(
        "dense and quantised",
        lambda small: small.add(f"{O_PROJ}.weight", torch.zeros(33, 96), beside=EMBED),
        ((O_PROJ, "both dense (.weight) and quantised"),),
    ),
]

FILES = [
    Case(
        "tensor not in the index",
        lambda small: small.add("model.extra", torch.zeros(2), beside=EMBED, to_index=False),
        (("holds model.extra", "index does not list"),),
    ),
    Case(
        "tensor not in its shard",
        edit_weight_map(lambda files: files.update({"model.extra": SHARD_2})),
        ((INDEX, "lists model.extra", SHARD_2, "does not hold it"),),
    ),
    Case(
        "tensor listed in another shard",
        edit_weight_map(lambda files: files.update({EMBED: SHARD_2})),
        ((INDEX, f"lists {EMBED}", SHARD_2), (f"holds {EMBED}", "does not list there")),
    ),
    Case(
        "shard gone",
        lambda small: (small.folder / SHARD_2).unlink(),
        ((SHARD_2, "cannot be opened", "lists 5 tensors"),),
    ),
    Case("shard cut short", truncate, ((SHARD_2, "cannot be opened", "lists 5 tensors"),)),
    Case(
        "shard empty",
        lambda small: (small.folder / SHARD_2).write_bytes(b""),
        ((SHARD_2, "cannot be opened"),),
    ),
    Case(
        "stray shard",
        lambda small: save_file({"model.extra": torch.zeros(2)}, small.folder / "old.safetensors"),
        (("old.safetensors", "holds model.extra", "index does not list"),),
    ),
    Case(
        "total_size too large",
        lambda small: edit_json(
            small.folder / INDEX, lambda index: index["metadata"].update(total_size=10**9)
        ),
        ((INDEX, "total_size 1000000000 exceeds"),),
    ),
    Case(
        "no weight_map",
        lambda small: edit_json(small.folder / INDEX, lambda index: index.pop("weight_map")),
        ((INDEX, "weight_map"),),
    ),
    Case("no index", lambda small: (small.folder / INDEX).unlink(), ((INDEX, SINGLE, "neither"),)),
]

CONFIG = [
    Case(
        "no quantization_config",
        lambda small: small.edit_config(lambda config: config.pop("quantization_config")),
        (("config.json", "quantization_config: missing"),),
    ),
    Case(
        "no config.json",
        lambda small: (small.folder / "config.json").unlink(),
        (("config.json", "no such file"),),
    ),
    Case(
        "unknown key",
        edit_quantization(lambda q: q.update(colour=1)),
        (("config.json", "colour: unknown key"),),
    ),
    Case(
        "major version",
        edit_quantization(lambda q: q.update(version="2.0")),
        (("config.json", "version 2.0"),),
    ),
    Case(
        "ignored but quantised",
        edit_quantization(lambda q: q.update(ignore=["lm_head", Q_PROJ])),
        ((f"{Q_PROJ}: stored quantised", "is on the ignore list", "config.json"),),
    ),
    Case(
        "quantised without a scheme",
        edit_quantization(lambda q: q["config_groups"].pop("base")),
        ((f"{Q_PROJ}: stored quantised", "matches no config group", "config.json"),),
    ),
    Case(
        "two schemes",
        edit_quantization(lambda q: q["config_groups"].update(again={"targets": ["Linear"]})),
        ((Q_PROJ, "base, again", "match equally well"),),
    ),
    Case(
        "target that is not there",
        edit_quantization(
            lambda q: q["config_groups"]["mlp"]["targets"].append("model.layers.7.mlp.down_proj")
        ),
        (("config.json", "mlp names model.layers.7.mlp.down_proj", "not stored quantised"),),
    ),
    Case(
        "target without a dot that is not there",
        edit_quantization(lambda q: q["config_groups"]["mlp"]["targets"].append("lm_head")),
        (("config.json", "mlp names lm_head", "not stored quantised"),),
    ),
    Case(
        "scale dtype against the model's",
        lambda small: small.edit_config(lambda config: config.update(dtype="float16")),
        tuple(
            (f"{m}.weight_scale: torch.bfloat16", "torch.float16")
            for m in (Q_PROJ, O_PROJ, DOWN_PROJ)
        ),
    ),
]

ARCHITECTURE = [
    Case(
        "dense tensor gone",
        lambda small: small.remove("model.norm.weight"),
        (("model.norm.weight: missing", "[24]"),),
    ),
    Case(
        "dense tensor of another shape",
        lambda small: small.replace(EMBED, lambda t: t[:49]),
        ((EMBED, "[49, 24]", "expects [50, 24]"),),
    ),
    Case(
        "linear of another shape",
        keep_20_rows,
        ((f"{Q_PROJ}.weight_packed", "[20, 128]", "expects [24, 128]"),),
    ),
    Case(
        "dense tensor of no module",
        lambda small: small.add("model.rotary.inv_freq", torch.zeros(4), beside=EMBED),
        (("model.rotary.inv_freq: the architecture has no such parameter",),),
    ),
]


def assert_lines(problems: list[str], expected: tuple[tuple[str, ...], ...]) -> None:
    for words in expected:
        assert [p for p in problems if all(word in p for word in words)], (
            f"no line with {words} in {problems}"
        )


def names_of(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]
