# SPDX-License-Identifier: Apache-2.0
"""The checker: nothing to say about a sound checkpoint, every kind of damage found and named."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svsk_vllm.format import validate_checkpoint
from svsk_vllm.format.architecture_fit import Architecture
from tests.support.format_builders import (
    DOWN_PROJ,
    INDEX,
    O_PROJ,
    Q_PROJ,
    SINGLE,
    SmallCheckpoint,
    build_small_checkpoint,
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


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sound_checkpoint_has_no_problems(
    tmp_path: Path, shards: int, dtype: torch.dtype
) -> None:
    small = build_small_checkpoint(tmp_path, shards, dtype)
    assert validate_checkpoint(tmp_path) == []
    assert validate_checkpoint(str(tmp_path), Architecture(small.dense_shapes)) == []


@pytest.mark.parametrize("case", TENSORS + FILES + CONFIG, ids=names_of(TENSORS + FILES + CONFIG))
def test_damage_is_found_and_named(tmp_path: Path, case: Case) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    case.damage(small)
    problems = validate_checkpoint(tmp_path)
    assert_lines(problems, case.lines)
    assert len(problems) == len(case.lines), problems  # one damage, one line: no echoes


@pytest.mark.parametrize("case", ARCHITECTURE, ids=names_of(ARCHITECTURE))
def test_damage_that_only_the_architecture_shows(tmp_path: Path, case: Case) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    case.damage(small)
    assert validate_checkpoint(tmp_path) == []
    problems = validate_checkpoint(tmp_path, Architecture(small.dense_shapes))
    assert_lines(problems, case.lines)
    assert len(problems) == len(case.lines), problems


@pytest.mark.parametrize("case", TENSORS + FILES + CONFIG, ids=names_of(TENSORS + FILES + CONFIG))
def test_damage_is_found_with_an_architecture_too(tmp_path: Path, case: Case) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    shapes = small.dense_shapes
    case.damage(small)
    assert_lines(validate_checkpoint(tmp_path, Architecture(shapes)), case.lines)


def test_a_linear_the_architecture_lacks(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    shapes = {
        name: shape for name, shape in small.dense_shapes.items() if name != f"{Q_PROJ}.weight"
    }
    assert validate_checkpoint(tmp_path, Architecture(shapes)) == [
        f"{Q_PROJ}: stored quantised, but the architecture has no {Q_PROJ}.weight."
    ]


def test_many_damages_are_all_reported(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    shapes = small.dense_shapes
    wanted = [
        f"no {DOWN_PROJ}.sidecar_u",
        f"inf in {DOWN_PROJ}.sidecar_gain",
        f"NaN in {Q_PROJ}.weight_scale",
        f"NaN in {EMBED}",
        f"dtype of {O_PROJ}.sidecar_gain",
        "sidecar tensor of nothing",
        "dense and quantised",
        "tensor not in the index",
        "stray shard",
        "target without a dot that is not there",
        "dense tensor gone",
    ]
    cases = {case.name: case for case in TENSORS + FILES + CONFIG + ARCHITECTURE}
    for name in wanted:
        cases[name].damage(small)
    problems = validate_checkpoint(tmp_path, Architecture(shapes))
    for name in wanted:
        assert_lines(problems, cases[name].lines)


def test_a_lost_shard_does_not_hide_damage_in_the_others(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    small.replace(EMBED, with_value(0, float("nan")))
    (tmp_path / SHARD_2).unlink()
    problems = validate_checkpoint(tmp_path, Architecture(small.dense_shapes))
    assert_lines(problems, ((SHARD_2, "cannot be opened"), (EMBED, "not finite")))
    assert len(problems) == 2  # what the lost shard held is not reported a second time


def test_a_lost_tensor_does_not_hide_damage_in_other_linears(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    lost = f"{Q_PROJ}.weight_scale"
    shard = small.file_of(lost)
    small.replace(f"{DOWN_PROJ}.weight_scale", with_value(0, float("inf")))
    small.remove(lost)
    edit_weight_map(lambda files: files.update({lost: shard.name}))(small)
    problems = validate_checkpoint(tmp_path)
    assert_lines(
        problems, ((f"lists {lost}", shard.name), (f"{DOWN_PROJ}.weight_scale", "not finite"))
    )
    assert len(problems) == 2


def test_a_broken_config_does_not_hide_a_lost_shard(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    edit_quantization(lambda q: q.update(colour=1))(small)
    (tmp_path / SHARD_2).unlink()
    assert_lines(validate_checkpoint(tmp_path), (("colour",), (SHARD_2, "cannot be opened")))


@pytest.mark.parametrize("size", [0, 4, 200])
def test_a_single_file_cut_short(tmp_path: Path, size: int) -> None:
    build_small_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:size])
    problems = validate_checkpoint(tmp_path)
    assert len(problems) == 1
    assert_lines(problems, ((str(path), "cannot be opened"),))


def test_a_shard_beside_a_single_file(tmp_path: Path) -> None:
    build_small_checkpoint(tmp_path)
    save_file({"model.extra": torch.zeros(2)}, tmp_path / "old.safetensors")
    problems = validate_checkpoint(tmp_path)
    assert len(problems) == 1
    assert_lines(problems, ((str(tmp_path / "old.safetensors"), "in no index"),))


def test_a_checkpoint_with_nothing_quantized(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    save_file(small.dense, tmp_path / SINGLE)
    assert_lines(validate_checkpoint(tmp_path), ((str(tmp_path), "no quantised linear"),))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_lines(
        validate_checkpoint(tmp_path / "nowhere"), (("nowhere", "config.json", "no such file"),)
    )


def test_large_and_odd_dense_tensors_are_no_problem(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    odd = {
        "large": torch.tensor([1e38], dtype=torch.float64),
        "fp8": torch.tensor([448.0]).to(torch.float8_e4m3fn),
        "exponents": torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "unsigned": torch.tensor([65535], dtype=torch.uint16),
        "flags": torch.tensor([True]),
    }
    save_file(load_file(tmp_path / SINGLE) | odd, tmp_path / SINGLE)
    shapes = small.dense_shapes | {name: tuple(tensor.shape) for name, tensor in odd.items()}
    assert validate_checkpoint(tmp_path, Architecture(shapes)) == []
    save_file(
        load_file(tmp_path / SINGLE)
        | {"fp8": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)},
        tmp_path / SINGLE,
    )
    assert_lines(
        validate_checkpoint(tmp_path, Architecture(shapes)),
        (("fp8", "1 of 1 values are not finite"),),
    )


BEYOND = [
    replaced(
        "beyond the dtype:", "model.norm.weight", with_value(3, 7e4), "7e+04", "torch.float16"
    ),
    replaced(
        "products beyond the dtype:",
        f"{Q_PROJ}.weight_scale",
        with_value(5, 3e4),
        "beyond",
        "torch.float16",
    ),
    replaced(
        "products beyond float32:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, 1e38),
        "beyond what float32",
    ),
    replaced(
        "beyond, negative:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, -9e34),
        "beyond what float32",
    ),
    replaced(
        "beyond the dtype with the sidecar:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, 30.0),
        "torch.float16",
    ),
]


@pytest.mark.parametrize("case", BEYOND, ids=names_of(BEYOND))
def test_finite_values_that_load_as_infinities(tmp_path: Path, case: Case) -> None:
    small = build_small_checkpoint(tmp_path, dtype=torch.float16)
    case.damage(small)
    problems = validate_checkpoint(tmp_path)
    assert_lines(problems, case.lines)
    assert len(problems) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_beyond_a_wider_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """1e38 is a number in both, 13 times as much in neither."""
    small = build_small_checkpoint(tmp_path, dtype=dtype)
    small.replace(f"{O_PROJ}.weight_scale", with_value(0, 1e38))
    assert_lines(
        validate_checkpoint(tmp_path), ((f"{O_PROJ}.weight_scale", "beyond what float32"),)
    )
    small.replace(f"{O_PROJ}.weight_scale", with_value(0, 1e36))
    assert validate_checkpoint(tmp_path) == []


def test_a_bound_that_no_weight_reaches_is_no_problem(tmp_path: Path) -> None:
    """In float16 a scale of 8,000 takes code 8, not 7, beyond the largest number.

    The weight itself decides.
    """
    small = build_small_checkpoint(tmp_path, dtype=torch.float16)
    small.replace(f"{Q_PROJ}.weight_scale", lambda scale: torch.full_like(scale, 8190.0))
    assert validate_checkpoint(tmp_path) != []
    # Every code is -8, 65,520: rounds to infinity.
    small.replace(f"{Q_PROJ}.weight_packed", torch.zeros_like)
    assert validate_checkpoint(tmp_path) != []
    # Every code is -7.
    small.replace(f"{Q_PROJ}.weight_packed", lambda packed: torch.full_like(packed, 0x11111111))
    assert validate_checkpoint(tmp_path) == []
