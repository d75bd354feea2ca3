# SPDX-License-Identifier: Apache-2.0
"""Model folders of other quantisers.

Bits per weight by hand, files that count, and damaged ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svsk_eval.errors import EvalError
from svsk_eval.text.model_folder import bits_per_weight, read_folder

N, K, GROUP = 64, 128, 32
GROUPS = K // GROUP
LINEAR, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AUTO_GPTQ = "gptq_model-4bit-128g.safetensors"

Tensors = dict[str, torch.Tensor]


def write_folder(
    folder: Path, tensors: Tensors, name: str = SINGLE, method: str | None = None
) -> Path:
    """A folder with one file of weights."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = (
        {} if method is None else {"quantization_config": {"quant_method": method}}
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file({NORM: torch.ones(K), **tensors}, folder / name)
    return folder


def linear(**parts: torch.Tensor) -> Tensors:
    """A linear's tensors, and a bias, which does not count."""
    stored = {f"{LINEAR}.{name}": part for name, part in parts.items()}
    return stored | {f"{LINEAR}.bias": torch.zeros(N, dtype=torch.float16)}


def dense_tensors() -> Tensors:
    return linear(weight=torch.zeros(N, K, dtype=torch.bfloat16))


def awq() -> Tensors:
    return linear(
        qweight=torch.zeros(K, N // 8, dtype=torch.int32),
        qzeros=torch.zeros(GROUPS, N // 8, dtype=torch.int32),
        scales=torch.zeros(GROUPS, N, dtype=torch.float16),
    )


def gptq() -> Tensors:
    return linear(
        qweight=torch.zeros(K // 8, N, dtype=torch.int32),
        qzeros=torch.zeros(GROUPS, N // 8, dtype=torch.int32),
        scales=torch.zeros(GROUPS, N, dtype=torch.float16),
        g_idx=torch.zeros(K, dtype=torch.int32),
    )


def compressed_tensors() -> Tensors:
    return linear(
        weight_packed=torch.zeros(N, K // 8, dtype=torch.int32),
        weight_scale=torch.zeros(N, GROUPS, dtype=torch.bfloat16),
        weight_shape=torch.tensor([N, K]),
    )


def bitsandbytes() -> Tensors:
    """NF4 in blocks of 64 with plain absmax; the state of quantisation is JSON in bytes."""
    return linear(weight=torch.zeros(N * K // 2, 1, dtype=torch.uint8)) | {
        f"{LINEAR}.weight.absmax": torch.zeros(N * K // 64),
        f"{LINEAR}.weight.quant_map": torch.zeros(16),
        f"{LINEAR}.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "dense", dense_tensors())


@pytest.mark.parametrize(
    ("method", "tensors", "name", "bits"),
    [
        # Codes of 4 bits; per group a zero point of 4 bits and a scale of 16.
        ("awq", awq(), SINGLE, 4 + (4 + 16) / 32),
        # As AWQ, and for each of the 128 inputs its group's number in 32 bits, shared by 64
        # outputs.
        ("gptq", gptq(), SINGLE, 4 + (4 + 16) / 32 + 32 / 64),
        ("gptq", gptq(), AUTO_GPTQ, 4 + (4 + 16) / 32 + 32 / 64),
        # Codes of 4 bits, a scale of 16 per group, and the shape in two integers of 64 bits for
        # 8192 weights.
        ("compressed-tensors", compressed_tensors(), SINGLE, 4 + 16 / 32 + 2 * 64 / 8192),
        # Codes of 4 bits, a scale of 32 per block of 64, 16 levels of 32 bits and a state of 90
        # bytes.
        ("bitsandbytes", bitsandbytes(), SINGLE, 4 + 32 / 64 + (16 * 32 + 90 * 8) / 8192),
    ],
)
def test_bits_per_weight_by_hand(
    dense: Path, tmp_path: Path, method: str, tensors: Tensors, name: str, bits: float
) -> None:
    reference = read_folder(dense)
    folder = read_folder(write_folder(tmp_path / "quantised", tensors, name, method))
    assert bits_per_weight(reference, [reference, folder]) == [16, pytest.approx(bits, abs=1e-12)]
    assert (reference.method, folder.method) == ("none", method)
    assert folder.size_bytes == (tmp_path / "quantised" / name).stat().st_size


def test_several_files_of_other_names(tmp_path: Path, dense: Path) -> None:
    folder = write_folder(tmp_path / "gptq", {}, "gptq_model-00001-of-00002.safetensors")
    save_file(gptq(), folder / "gptq_model-00002-of-00002.safetensors")
    (folder / "gptq_model.bin").write_bytes(bytes(1000))
    quantized, reference = read_folder(folder), read_folder(dense)
    assert bits_per_weight(reference, [quantized]) == [pytest.approx(5.125)]
    assert quantized.size_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    save_file(gptq(), folder / "copy.safetensors")
    with pytest.raises(
        EvalError,
        match=r"is in copy\.safetensors and in gptq_model-00002-of-00002\.safetensors, and",
    ):
        read_folder(folder)


def shard(folder: Path) -> list[Path]:
    """Put a dense folder's weights into two shards with an index."""
    (folder / SINGLE).unlink()
    shards = {"model-00001-of-00002.safetensors": {NORM: torch.ones(K)}}
    shards["model-00002-of-00002.safetensors"] = dense_tensors()
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return [folder / file for file in shards]


def test_only_files_that_are_loaded_count(dense: Path) -> None:
    single = (dense / SINGLE).stat().st_size
    for stray in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors"):
        (dense / stray).write_bytes(bytes(1000))  # not even safetensors: it is not looked into
        assert read_folder(dense).size_bytes == single
    before = read_folder(dense)
    shards = shard(dense)
    sharded = read_folder(dense)
    assert sharded.size_bytes == sum(file.stat().st_size for file in shards)
    assert sharded.tensors == before.tensors
    save_file({"other": torch.ones(1)}, dense / SINGLE)
    with pytest.raises(
        EvalError, match=r"loads model\.safetensors, vLLM what .*index\.json names. Remove the one"
    ):
        read_folder(dense)
    assert sharded.fingerprint != before.fingerprint


def test_weights_that_are_not_safetensors(tmp_path: Path, dense: Path) -> None:
    (dense / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "model.gguf").write_bytes(bytes(30))
    assert (read_folder(tmp_path).size_bytes, read_folder(tmp_path).tensors) == (30, {})
    for part, size in (("1", 10), ("2", 7)):
        (tmp_path / f"pytorch_model-{part}.bin").write_bytes(bytes(size))
    assert (read_folder(tmp_path).size_bytes, read_folder(tmp_path).tensors) == (17, {})


@pytest.mark.parametrize("name", [SINGLE, AUTO_GPTQ])
@pytest.mark.parametrize("kept", [4, 60])
def test_a_damaged_header(tmp_path: Path, name: str, kept: int) -> None:
    folder = write_folder(tmp_path / "damaged", gptq(), name)
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    with pytest.raises(EvalError, match=rf"{name}: cannot be opened"):
        read_folder(folder)


def test_damaged_shards(dense: Path) -> None:
    first, _ = shard(dense)
    first.unlink()
    with pytest.raises(EvalError, match=rf"{first.name}: cannot be opened"):
        read_folder(dense)
    save_file({"other": torch.ones(1)}, first)
    with pytest.raises(EvalError, match=rf"{first.name}: cannot read {NORM}"):
        read_folder(dense)
    (dense / INDEX).write_text("{}")
    with pytest.raises(EvalError, match='no "weight_map" object'):
        read_folder(dense)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"none: not a model folder\. .*no such file"):
        read_folder(tmp_path / "none")


def test_a_folder_without_weights(dense: Path) -> None:
    (dense / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(EvalError, match="has no weights"):
        read_folder(dense)
    (dense / INDEX).unlink()
    (dense / SINGLE).unlink()
    with pytest.raises(EvalError, match="has no weights"):
        read_folder(dense)
