# SPDX-License-Identifier: Apache-2.0
"""The checker: nothing to say about a sound checkpoint, every kind of damage found and named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svsk_vllm.format import validate_checkpoint
from svsk_vllm.format.architecture_fit import Architecture
from tests.format.damages import (
    ARCHITECTURE,
    CONFIG,
    EMBED,
    FILES,
    SHARD_2,
    TENSORS,
    Case,
    assert_lines,
    edit_quantization,
    edit_weight_map,
    names_of,
    with_value,
)
from tests.support.format_builders import DOWN_PROJ, O_PROJ, Q_PROJ, SINGLE, build_small_checkpoint


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
