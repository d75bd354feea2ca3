# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint folder: round trip through the disk, and what is refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svsk_vllm.format import Checkpoint, QuantizedLinear, ShardedReader, SvskFormatError, dequantize
from tests.support.format_builders import (
    DOWN_PROJ,
    INDEX,
    O_PROJ,
    Q_PROJ,
    SINGLE,
    build_small_checkpoint,
    edit_json,
    write_json,
)


def assert_same_linear(read: QuantizedLinear, written: QuantizedLinear) -> None:
    assert read.spec == written.spec
    for field in ("codes", "scale", "u", "v", "gain"):
        ours, theirs = getattr(written, field), getattr(read, field)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    assert torch.equal(dequantize(read), dequantize(written))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    written = build_small_checkpoint(tmp_path / "model", shards, dtype)
    assert (tmp_path / "model" / INDEX).exists() == (shards > 1)
    read = Checkpoint(str(tmp_path / "model"))
    assert read.config == written.config
    assert read.model_dtype == dtype
    assert read.linears == {name: linear.spec for name, linear in written.linears.items()}
    for name, linear in read.iter_linears():
        assert_same_linear(linear, written.linears[name])
        assert_same_linear(read.read_linear(name), written.linears[name])
    assert set(read.dense_names) == set(written.dense)
    for name, tensor in written.dense.items():
        assert read.read_dense(name).dtype == tensor.dtype
        assert torch.equal(read.read_dense(name), tensor)


def test_linears_are_listed_in_the_order_of_the_index(tmp_path: Path) -> None:
    build_small_checkpoint(tmp_path, shards=2)

    def reverse(index: dict[str, Any]) -> None:
        index["weight_map"] = dict(reversed(index["weight_map"].items()))

    assert list(Checkpoint(tmp_path).linears) == [Q_PROJ, O_PROJ, DOWN_PROJ]
    edit_json(tmp_path / INDEX, reverse)
    assert list(Checkpoint(tmp_path).linears) == [DOWN_PROJ, O_PROJ, Q_PROJ]


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, shards=3)
    lost = small.file_of(f"{O_PROJ}.sidecar_v")
    lost.unlink()
    checkpoint = Checkpoint(tmp_path)
    assert f"{O_PROJ}.sidecar_v" in checkpoint.tensors.names
    with pytest.raises(SvskFormatError, match="cannot be opened") as caught:
        checkpoint.tensors.read(f"{O_PROJ}.sidecar_v")
    assert str(lost) in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, torch.float32),
        ({}, None),
        ({"dtype": "auto"}, None),
        ({"dtype": "nn"}, None),
    ],
)
def test_model_dtype(tmp_path: Path, declared: dict[str, str], dtype: torch.dtype | None) -> None:
    small = build_small_checkpoint(tmp_path)
    quantization = small.config.to_dict()
    write_json(tmp_path / "config.json", {**declared, "quantization_config": quantization})
    assert Checkpoint(tmp_path).model_dtype == dtype


def test_is_svsk(tmp_path: Path) -> None:
    assert not Checkpoint.is_svsk(tmp_path)
    write_json(tmp_path / "config.json", {"dtype": "bfloat16"})
    assert not Checkpoint.is_svsk(tmp_path)
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "awq"}})
    assert not Checkpoint.is_svsk(tmp_path)
    build_small_checkpoint(tmp_path)
    assert Checkpoint.is_svsk(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda config: config.pop("quantization_config"),
            ["quantization_config: missing", "svsk quantize"],
        ),
        (
            lambda config: config["quantization_config"].update(quant_method="gptq"),
            ["quantization_config: quant_method 'gptq', expected 'svsk'"],
        ),
        (
            lambda config: config["quantization_config"].pop("quant_method"),
            ["None", "expected 'svsk'"],
        ),
        (lambda config: config["quantization_config"].update(version="2.0"), ["version 2.0"]),
        (lambda config: config["quantization_config"].update(bits=4), ["bits: unknown key"]),
    ],
)
def test_refuses_the_config_and_names_the_file(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    build_small_checkpoint(tmp_path).edit_config(change)
    with pytest.raises(SvskFormatError) as caught:
        Checkpoint(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a list"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_refuses_damaged_json(
    tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    build_small_checkpoint(tmp_path, shards=2)
    if content is None:
        (tmp_path / file).unlink()
        message = (
            message
            if file == "config.json"
            else f"neither {SINGLE} nor {INDEX}. Only safetensors are read: convert"
        )
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(SvskFormatError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "sub/a.safetensors", "weights.bin", 3, None]
)
def test_an_index_reaches_only_safetensors_beside_it(tmp_path: Path, shard: object) -> None:
    build_small_checkpoint(tmp_path, shards=2)
    edit_json(tmp_path / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(
        SvskFormatError, match=r"lm_head\.weight is in .*the name of a .safetensors file beside it"
    ) as caught:
        Checkpoint(tmp_path)
    assert repr(shard) in str(caught.value)
    assert INDEX in str(caught.value)


def test_a_linear_without_a_scheme_is_refused(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    small.edit_config(lambda config: config["quantization_config"].update(ignore=["re:.*q_proj"]))
    with pytest.raises(
        SvskFormatError, match=f"{Q_PROJ}: stored quantised, but is on the ignore list"
    ):
        _ = Checkpoint(tmp_path).linears
    small.edit_config(lambda config: config["quantization_config"].update(ignore=[]))
    small.edit_config(lambda config: config["quantization_config"]["config_groups"].pop("base"))
    with pytest.raises(
        SvskFormatError, match=f"{Q_PROJ}: stored quantised, but matches no config group"
    ):
        _ = Checkpoint(tmp_path).linears


def test_a_stored_k_that_no_whole_groups_fill_is_refused(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    small.replace(f"{Q_PROJ}.weight_packed", lambda tensor: tensor[:, :9])
    with pytest.raises(
        SvskFormatError,
        match=rf"{Q_PROJ}\.weight_packed: shape \[\d+, 9\] holds K = 72 input features, not a"
        r" multiple of the group size 64 that config\.json gives it\. Correct the config",
    ):
        _ = Checkpoint(tmp_path).linears


def test_a_missing_tensor_is_refused_when_its_linear_is_read(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    small.remove(f"{DOWN_PROJ}.sidecar_gain")
    checkpoint = Checkpoint(tmp_path)
    assert_same_linear(checkpoint.read_linear(O_PROJ), small.linears[O_PROJ])
    with pytest.raises(SvskFormatError, match=rf"{DOWN_PROJ}\.sidecar_gain: missing"):
        checkpoint.read_linear(DOWN_PROJ)


def test_reader_describes_every_dtype_a_dense_tensor_may_have(tmp_path: Path) -> None:
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    integers = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.bool,
    ]
    eights = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    tensors = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in floats + integers}
    tensors |= {str(dtype): torch.zeros(2, 3, dtype=torch.uint8).view(dtype) for dtype in eights}
    save_file(tensors, tmp_path / SINGLE)
    reader = ShardedReader(tmp_path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        described = reader.describe(name)
        assert (described.dtype, described.shape) == (tensor.dtype, (2, 3))
        assert described.num_bits == 6 * tensor.dtype.itemsize * 8
        assert reader.read(name).dtype == tensor.dtype


@pytest.mark.parametrize(
    "act", [ShardedReader.describe, ShardedReader.read, ShardedReader.shard_of]
)
def test_reader_names_a_tensor_that_is_not_there(
    tmp_path: Path, act: Callable[[ShardedReader, str], object]
) -> None:
    build_small_checkpoint(tmp_path)
    with pytest.raises(SvskFormatError, match=r"no tensor model\.nothing") as caught:
        act(ShardedReader(tmp_path), "model.nothing")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("act", [ShardedReader.describe, ShardedReader.read])
def test_reader_names_a_tensor_that_its_shard_lacks(
    tmp_path: Path, act: Callable[[ShardedReader, str], object]
) -> None:
    small = build_small_checkpoint(tmp_path, shards=2)
    shard = small.file_of("lm_head.weight")
    edit_json(
        tmp_path / INDEX, lambda index: index["weight_map"].update({"model.nothing": shard.name})
    )
    with pytest.raises(SvskFormatError, match=r"cannot read model\.nothing") as caught:
        act(ShardedReader(tmp_path), "model.nothing")
    assert str(shard) in str(caught.value)
