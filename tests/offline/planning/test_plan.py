# SPDX-License-Identifier: Apache-2.0
"""Bit budgets, gradient weights and sequential calibration, through the whole pipeline."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.block_runner import scratch_tensor
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.planning.plan import Plan
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture
from svsk_offline.storage.layer_report import LayerReport
from svsk_vllm.format import Checkpoint, dequantize
from tests.offline.folders import folder_bytes
from tests.support.format_builders import make_group
from tests.support.tiny_models import FAMILIES, write_dense


@pytest.fixture
def hessian_recipe() -> Recipe:
    """Error feedback and a sidecar, on a handful of short samples; embedding and head dense."""
    return load_recipe("fast").override(
        {
            "tables": {"head": "dense", "embedding": "dense"},
            "calibration": {"samples": 24, "seq_len": 32},
            "sidecar": {"rank": 4, "tile_m": 0, "tile_n": 0},
        }
    )


@pytest.mark.parametrize("target", [4.3, 4.9])
def test_budget_is_kept_and_used(
    tmp_path: Path, tiny_qwen2: Path, hessian_recipe: Recipe, target: float
) -> None:
    recipe = hessian_recipe.override(
        {"allocation": {"target_bpw": target, "ranks": (0, 2, 4, 8, 16)}}
    )
    result = quantize(tiny_qwen2, tmp_path / "out", recipe)
    assert target - 0.1 < result.bits_per_weight <= target
    assert validate_against_architecture(tmp_path / "out") == []
    assert inspect_checkpoint(tmp_path / "out")["bits_per_weight"] == pytest.approx(
        result.bits_per_weight
    )
    linears = Checkpoint(tmp_path / "out").linears
    schemes = {(spec.rank, spec.group_size) for spec in linears.values()}
    assert len(schemes) > 1
    for index in range(2):
        names = [f"model.layers.{index}.self_attn.{p}_proj" for p in "qkv"]
        assert len({linears[name].group_size for name in names}) == 1
    quantize(tiny_qwen2, tmp_path / "again", recipe)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "again")


def test_losses_get_the_tokens_that_wide_matrices_need(
    tmp_path: Path, tiny_llama: Path, hessian_recipe: Recipe
) -> None:
    """More samples than asked for, as far as there are any, and that is said."""
    budget = {"target_bpw": 4.6, "ranks": (0, 4)}
    for samples, words in ((80, r"measured on \d\d samples instead of 2"), (30, "all there are")):
        said: list[str] = []
        quantize(
            tiny_llama,
            tmp_path / str(samples),
            hessian_recipe.override(
                {
                    "calibration": {"samples": samples},
                    "gradients": {"samples": 2},
                    "allocation": budget,
                }
            ),
            progress=Progress(message=said.append),
        )
        assert any(re.search(words, text) for text in said), said


def test_budget_too_small(tmp_path: Path, tiny_llama: Path, hessian_recipe: Recipe) -> None:
    with pytest.raises(SvskError, match=r"A target of 4\.1 bits per weight .* Raise the target"):
        quantize(
            tiny_llama,
            tmp_path / "out",
            hessian_recipe.override({"allocation": {"target_bpw": 4.1}}),
        )


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_gradient_weights_change_what_is_fitted(
    tmp_path: Path, tiny_llama: Path, hessian_recipe: Recipe, power: float, shared: bool
) -> None:
    quantize(tiny_llama, tmp_path / "plain", hessian_recipe)
    weighted = hessian_recipe.override(
        {
            "gradients": {"token_power": power, "row_power": power, "shared": shared},
        }
    )
    quantize(tiny_llama, tmp_path / "weighted", weighted)
    assert validate_against_architecture(tmp_path / "weighted") == []
    plain, other = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "weighted")
    for name in plain.linears:
        assert not torch.equal(
            dequantize(plain.read_linear(name)), dequantize(other.read_linear(name))
        )


def test_sequential_calibration_sees_the_quantized_blocks(
    tmp_path: Path, tiny_recipe: Recipe, hessian_recipe: Recipe
) -> None:
    """Block 1 comes out as if block 0 had been what was stored of it."""
    dense = write_dense(tmp_path / "dense", "llama", dtype=torch.float32)
    for recipe in (tiny_recipe, hessian_recipe):
        sequential = recipe.override({"calibration": {"sequential": True}})
        quantize(dense, tmp_path / "out", sequential, dtype="bfloat16", overwrite=True)
        checkpoint = Checkpoint(tmp_path / "out")
        replaced = tmp_path / "replaced"
        shutil.copytree(dense, replaced, dirs_exist_ok=True)
        tensors = load_file(dense / "model.safetensors")
        for name in checkpoint.linears:
            if name.startswith("model.layers.0."):
                tensors[f"{name}.weight"] = dequantize(checkpoint.read_linear(name))
        save_file(tensors, replaced / "model.safetensors", {"format": "pt"})
        rest = recipe.override({"ignore": (r"re:.*layers\.0\..*",)})
        quantize(replaced, tmp_path / "rest", rest, dtype="bfloat16", overwrite=True)
        other = Checkpoint(tmp_path / "rest")
        quantize(dense, tmp_path / "apart", recipe, dtype="bfloat16", overwrite=True)
        apart = Checkpoint(tmp_path / "apart")
        same = 0
        for name in other.linears:
            own = dequantize(checkpoint.read_linear(name))
            assert torch.equal(own, dequantize(other.read_linear(name)))
            same += torch.equal(own, dequantize(apart.read_linear(name)))
        assert len(other.linears) == 7
        assert same < 7


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"sequential": True}},
        {"alternating": {"aim": 1.0}, "gradients": {"token_power": 0.5}},
        {
            "gradients": {"token_power": 1.0},
            "allocation": {"target_bpw": 4.8, "ranks": (0, 2, 4, 8)},
        },
        {"gradients": {"token_power": 0.5, "shared": True, "samples": 2}},
    ],
)
def test_interrupted_runs_continue_to_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, hessian_recipe: Recipe, changes: dict[str, dict[str, object]]
) -> None:
    recipe = hessian_recipe.override(changes)
    quantize(tiny_llama, tmp_path / "whole", recipe)

    def stop(report: LayerReport) -> None:
        if report.name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", recipe, progress=Progress(layer=stop))
    messages: list[str] = []
    quantize(tiny_llama, tmp_path / "out", recipe, progress=Progress(message=messages.append))
    assert not any(message.startswith("Measuring") for message in messages)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_budget_on_features_that_fit_no_group(tmp_path: Path, hessian_recipe: Recipe) -> None:
    settings = {**FAMILIES["llama"].settings, "hidden_size": 96, "intermediate_size": 128}
    dense = write_dense(tmp_path / "dense", type(FAMILIES["llama"])("llama", settings))
    recipe = hessian_recipe.override(
        {"weights": {"group_size": 32}, "allocation": {"target_bpw": 5.0, "group_sizes": (64,)}}
    )
    with pytest.raises(
        SvskError,
        match=r"q_proj: K = 96 input features is a multiple of none of allocation\.group_sizes"
        r" \(64,\)\. Add a smaller one",
    ):
        quantize(dense, tmp_path / "out", recipe)
    quantize(
        dense,
        tmp_path / "out",
        recipe.override({"allocation": {"group_sizes": (64, 32), "ranks": (0, 2, 4)}}),
    )
    assert validate_against_architecture(tmp_path / "out") == []


def test_full_disk_is_an_error_with_a_remedy(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        SvskError, match=r"no room for 0\.0 GB of hidden states \(No space left on device\)"
    ):
        scratch_tensor((4, 8), torch.float32, 0, tmp_path)
    assert not any(tmp_path.iterdir())


def test_plan_survives_its_file(tmp_path: Path) -> None:
    tokens = torch.rand(2, 3)
    plan = Plan(
        {"a.b": make_group(rank=4), "a.c": make_group(rank=0)},
        {"a.b": tokens, "a.c": tokens},
        {"a.b": RowMetric(torch.rand(3), torch.rand(2, 3))},
    )
    plan.save(tmp_path / "plan.safetensors")
    found = Plan.load(tmp_path / "plan.safetensors")
    assert found.schemes == plan.schemes
    assert found.tokens.keys() == {"a.b", "a.c"}
    assert torch.equal(found.tokens["a.c"], tokens)
    # Or linears of one input would no longer share statistics.
    assert found.tokens["a.b"] is found.tokens["a.c"]
    assert torch.equal(found.rows["a.b"].own, plan.rows["a.b"].own)
    assert torch.equal(found.rows["a.b"].directions, plan.rows["a.b"].directions)
    assert [group.targets for group in found.groups().values()] == [("a.b",), ("a.c",)]
