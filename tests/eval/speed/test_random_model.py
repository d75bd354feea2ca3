# SPDX-License-Identifier: Apache-2.0
"""Random models are what any loader expects: valid checkpoints with weights of an ordinary size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svsk_eval.errors import EvalError
from svsk_eval.speed import random_model, throughput
from svsk_eval.speed.fused_obstacle import fused_obstacle
from svsk_eval.speed.random_model import SHAPES, VARIANTS, Shape, Variant, app, write_random_model
from svsk_kernels.cpu.cpu_kernel import CpuKernel
from svsk_kernels.errors import SvskError
from svsk_kernels.layer_kernel import LayerSpec
from svsk_offline.storage.inspection import validate_against_architecture
from svsk_vllm.format import Checkpoint, ShardedReader, dequantize
from svsk_vllm.format.group_scales import unpack_scale_codes

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL |= {"head_dim": 64, "num_hidden_layers": 2, "vocab_size": 512}
STD = 0.02


def small(folder: Path, variant: str, shape: str = "qwen3-8b", **changes: Any) -> Path:
    return write_random_model(folder / variant, shape, variant, SMALL | changes)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("svsk")])
def test_svsk_variants_are_valid_checkpoints(tmp_path: Path, variant: str) -> None:
    folder = small(tmp_path, variant)
    assert validate_against_architecture(folder) == []
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.linears) == 2 * 7
    for _, linear in checkpoint.iter_linears():
        weight, base = dequantize(linear), dequantize(linear, with_sidecar=False)
        assert float(base.std()) == pytest.approx(STD, rel=0.1)
        assert float((weight - base).std()) == pytest.approx(0.1 * STD, rel=0.15)
        assert set(linear.codes.unique().tolist()) == set(range(-8, 8))
        assert linear.u is not None
        limit = 8 if linear.spec.factor_bits == 4 else 128
        assert (int(linear.u.min()), int(linear.u.max())) == (-limit, limit - 1)


@pytest.mark.parametrize(
    ("variant", "group", "bits"), [("svsk-g32-s8-r16", 32, 8), ("svsk-g16-s6-r16", 16, 6)]
)
def test_scales_in_two_levels_use_their_codes(
    tmp_path: Path, variant: str, group: int, bits: int
) -> None:
    checkpoint = Checkpoint(small(tmp_path, variant))
    assert checkpoint.hf_config["quantization_config"]["version"] == "1.1"
    for name, linear in checkpoint.iter_linears():
        assert linear.scale.shape == (linear.spec.n, linear.spec.k // group)
        stored = checkpoint.tensors.read(f"{name}.weight_scale")
        codes = unpack_scale_codes(stored, bits, linear.spec.k // group)
        top = (1 << bits - 1) - 1
        assert top // 2 < int(codes.max()) <= top
        # as many scales as codes allow, a third of the largest and up
        assert len(codes.unique()) > top // 3


def test_a_variant_that_the_kernels_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setitem(SHAPES, "qwen3-8b", SHAPES["qwen3-8b"] | SMALL)
    options = ["--layers", "1", *(f"--variant={name}" for name in ("bf16", "svsk-g16-s6-r16"))]
    asked: list[LayerSpec] = []

    def none_takes_groups_of_16(layer: LayerSpec) -> str | None:
        asked.append(layer)
        return "groups of 16, a made-up limit" if layer.group_size == 16 else None

    monkeypatch.setattr(CpuKernel, "obstacle", none_takes_groups_of_16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    written = CliRunner().invoke(random_model.app, ["qwen3-8b", str(tmp_path), *options])
    assert written.exit_code == 0, written.output
    reason = "model.layers.0.mlp.down_proj: groups of 16, a made-up limit"
    note = f"note: the fused kernels cannot run it on this machine: {reason}.\n"
    assert written.output.endswith(note)
    assert written.output.count("note:") == 1
    assert [(layer.dtype, layer.row_scaled) for layer in asked] == [(torch.bfloat16, True)]
    folder = tmp_path / "svsk-g16-s6-r16"
    refused = CliRunner().invoke(throughput.app, ["run", f"x={folder}"])
    assert refused.exit_code == 1
    assert (
        f"x={folder}: the fused kernels cannot run it on this machine: {reason}. End its label"
        in (refused.output)
    )


def test_the_first_layer_without_a_kernel_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(small(tmp_path, "svsk-g16-s6-r16"))
    where = torch.device("meta")
    assert fused_obstacle(checkpoint, where) == (
        "model.layers.0.mlp.down_proj: Triton has no backend for meta"
    )


def test_w4a16_and_dense_hold_the_same_linears(tmp_path: Path) -> None:
    dense, packed = ShardedReader(small(tmp_path, "bf16")), ShardedReader(small(tmp_path, "w4a16"))
    config = json.loads((tmp_path / "w4a16" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["group_size"] == 128
    assert {f"{name}.weight" for name in group["targets"]} | set(packed.names) >= set(dense.names)
    for name in group["targets"]:
        n, k = dense.read(f"{name}.weight").shape
        assert packed.read(f"{name}.weight_packed").shape == (n, k // 8)
        assert packed.read(f"{name}.weight_shape").tolist() == [n, k]
        assert packed.read(f"{name}.weight_scale").shape == (n, k // 128)
        assert packed.read(f"{name}.weight_scale").dtype == torch.bfloat16


def test_dense_variant_loads_and_its_logits_are_finite(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(small(tmp_path, "bf16", "qwen3-4b"))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.layers[1].mlp.up_proj.weight.detach().float().std()) == pytest.approx(
        STD, rel=0.1
    )
    assert bool(model(torch.arange(8)[None]).logits.isfinite().all())


def test_seed_decides(tmp_path: Path) -> None:
    changes = SMALL | {"num_hidden_layers": 1}
    name = "model.layers.0.mlp.up_proj.weight_packed"
    words = [
        ShardedReader(
            write_random_model(tmp_path / str(i), "qwen3-8b", "svsk-r16", changes, seed=seed)
        ).read(name)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])


def test_errors_name_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        SvskError, match="shape qwen3-9b: expected one of these: qwen3-4b, qwen3-8b"
    ):
        write_random_model(tmp_path / "x", "qwen3-9b")
    with pytest.raises(SvskError, match="variant w4: expected one of these: bf16, w4a16"):
        write_random_model(tmp_path / "x", "qwen3-8b", "w4")
    with pytest.raises(
        EvalError, match=r"down_proj: 192 columns are not a multiple of W4A16's group size 128"
    ):
        small(tmp_path, "w4a16", intermediate_size=192)
    assert not (tmp_path / "w4a16").exists()
    small(tmp_path, "bf16")
    with pytest.raises(SvskError, match="exists"):
        small(tmp_path, "bf16")


def test_command_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "qwen3-4b", SHAPES["qwen3-4b"] | SMALL)
    command = [
        "qwen3-4b",
        str(tmp_path),
        "--variant",
        "bf16",
        "--variant",
        "svsk-r16",
        "--layers",
        "1",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(Checkpoint(tmp_path / "svsk-r16").linears) == 7

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(random_model, "write_random_model", never)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert again.output.count("was there") == 2


def test_every_shape_and_variant_can_be_named() -> None:
    assert {shape.value for shape in Shape} == set(SHAPES)
    assert {variant.value for variant in Variant} == set(VARIANTS)
