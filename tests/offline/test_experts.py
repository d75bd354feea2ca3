# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: every expert fitted to its own tokens, and named as it is stored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, InputStatistics
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, QuantizationResult, quantize
from svsk_offline.planning.smoothing import plan_smoothing
from svsk_offline.recipe import Recipe, SmoothingArgs, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture
from svsk_vllm.architecture.experts import SeparateExperts
from svsk_vllm.format import Checkpoint, dequantize
from svsk_vllm.format.experts import (
    ExpertName,
    expert_layers,
    expert_problems,
    projection_pattern,
)
from tests.offline.test_architectures import kl, logits_of, run_by_blocks, sample_tokens
from tests.support.tiny_models import (
    EXPERT_FAMILIES,
    HYBRID_FAMILIES,
    Family,
    round_with_sidecar,
    scheme,
    write_dense,
    write_random_svsk,
)

CPU = torch.device("cpu")
ROUTERS = {
    "qwen2_moe": ["mlp.gate.weight (2)", "mlp.shared_expert_gate.weight (2)"],
    "mixtral": ["block_sparse_moe.gate.weight (2)"],
    "deepseek_v2": ["self_attn.kv_b_proj.weight (2)", "mlp.gate.weight (1)"],
    "deepseek_v3": ["self_attn.kv_b_proj.weight (2)", "mlp.gate.weight (1)"],
}
"""What stays dense in the blocks; of the others ``mlp.gate`` alone."""


def small(recipe: str = "fast", **changes: Any) -> Recipe:
    return load_recipe(recipe).override(
        {"calibration": {"samples": 16, "seq_len": 64}, "sidecar": {"rank": 2}, **changes}
    )


def run(dense: Path, out: Path, recipe: Recipe) -> tuple[QuantizationResult, list[str]]:
    said: list[str] = []
    result = quantize(dense, out, recipe, progress=Progress(message=said.append))
    return result, said


MORE = {
    "qwen3_next": HYBRID_FAMILIES["qwen3_next"],
    "glm4_moe": Family(
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}
    ),
}
"""Families that are stored by the same rules and served by no test."""
MIXTURES = {"qwen3_next": 4, **dict.fromkeys(("qwen3_moe", "qwen2_moe", "olmoe", "mixtral"), 2)}
"""Blocks with experts; one in the others, whose first block is dense."""


@pytest.mark.parametrize("name", [*EXPERT_FAMILIES, *MORE])
def test_experts_apart_are_the_model(tmp_path: Path, name: str) -> None:
    dense = write_dense(tmp_path / "dense", (EXPERT_FAMILIES | MORE)[name])
    source = ModelSource(dense)
    apart = [m for m in source.model.modules() if isinstance(m, SeparateExperts)]
    assert len(apart) == MIXTURES.get(name, 1)
    expected = logits_of(dense, attn_implementation="eager", experts_implementation="eager")
    torch.testing.assert_close(run_by_blocks(source), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_quantised_checked_and_restored(tmp_path: Path, family: str) -> None:
    """Better than plain rounding, with routers dense and said so before anything starts."""
    dense = write_dense(tmp_path / "dense", family)
    recipe = small(sidecar={"rank": 0}, weights={"codebook": "int4"})
    _, said = run(dense, tmp_path / "out", recipe)
    stays = next(i for i, text in enumerate(said) if text.startswith("Stay dense in the blocks"))
    assert stays < next(i for i, text in enumerate(said) if text.startswith("Calibration:"))
    kinds = ", ".join(
        f"model.layers.*.{name}" for name in ROUTERS.get(family, ["mlp.gate.weight (2)"])
    )
    assert said[stays] == f"Stay dense in the blocks: {kinds}"

    assert validate_against_architecture(tmp_path / "out") == []
    checkpoint = Checkpoint(tmp_path / "out")
    stored = {name for name in ModelSource(dense).tensors.names if ".experts." in name}
    assert stored == {f"{name}.weight" for name in checkpoint.linears if ".experts." in name}
    restored = logits_of(restore(tmp_path / "out", tmp_path / "restored"))

    expected = logits_of(dense)
    rounded = tmp_path / "rounded"
    write_rounded(dense, rounded, set(checkpoint.linears))
    assert 0 < kl(expected, restored) < kl(expected, logits_of(rounded))


def write_rounded(dense: Path, out: Path, names: set[str]) -> None:
    """The model with these linears rounded to the nearest of 4 bits."""
    out.mkdir()
    for path in dense.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(dense / "model.safetensors")
    for name in names & {key.removesuffix(".weight") for key in tensors}:
        weight = tensors[f"{name}.weight"]
        plain = round_with_sidecar(name, weight, scheme("Linear"), torch.Generator())
        tensors[f"{name}.weight"] = dequantize(plain).to(weight.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def write_with_an_idle_expert(folder: Path) -> Path:
    """Expert 5 is the mean of two others, each of which there is twice: two are always ahead."""
    dense = write_dense(folder, "qwen3_moe")
    tensors = load_file(dense / "model.safetensors")
    for layer in (0, 1):
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        router[3], router[4] = router[0], router[1]
        router[5] = (router[0] + router[1]) / 2
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    return dense


@pytest.mark.parametrize(
    "recipe",
    [
        small(),
        small("published"),
        small(
            "best",
            sidecar={},
            allocation={"ranks": (0, 2)},
            # In the dense model alone it is certain that none is routed there.
            alternating={"rounds": 1, "aim": 0.0},
            gradients={"token_power": 0.5},
        ),
    ],
    ids=["fast", "published", "best"],
)
def test_an_expert_that_no_token_reaches(tmp_path: Path, recipe: Recipe) -> None:
    dense = write_with_an_idle_expert(tmp_path / "dense")
    result, said = run(dense, tmp_path / "out", recipe)
    idle = [layer for layer in result.layers if ".experts.5." in layer.name]
    assert [layer.routed_tokens for layer in idle] == [0] * 6
    assert [layer.error for layer in idle] == [None] * 6
    others = [layer for layer in result.layers if layer not in idle]
    assert all(layer.error is not None and layer.error < 0.1 for layer in others)

    card = (tmp_path / "out" / "README.md").read_text()
    for layer in (0, 1):
        line = f"model.layers.{layer}.mlp.experts: "
        thin = next(row for row in said[-1].splitlines() if line in row).strip()
        assert "5 (0)" in thin
        assert f"- {thin}\n" in card
    assert validate_against_architecture(tmp_path / "out") == []
    stored = ModelSource(dense).tensors
    for name, linear in Checkpoint(tmp_path / "out").iter_linears():
        if ".experts.5." in name:
            weight = stored.read(f"{name}.weight").float()
            error = (dequantize(linear) - weight).square().mean() / weight.square().mean()
            assert float(error) < 0.03, name


def test_statistics_are_those_of_the_routed_tokens(tmp_path: Path) -> None:
    """Of thick ones exactly; a thin one is filled up to K tokens from all."""
    source = ModelSource(write_dense(tmp_path / "dense", "qwen3_moe"))
    tokens = sample_tokens(24, 16)
    runner = BlockRunner(source, CalibrationSet(tokens, "random", ""), CPU, torch.float32)
    name, blocks = source.blocks
    block: Any = blocks[0]
    source.load(block, f"{name}.0.", torch.float32, CPU)
    given: list[torch.Tensor] = []
    block.mlp.experts.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    weights = torch.rand(24, 16, generator=torch.Generator().manual_seed(2)) + 0.1
    by_name = {key: weights for key, _, _ in source.linears(0)}
    statistics = runner.collect(0, block, full=True, weights=by_name, advance=False)

    rows = torch.cat(given[::3])
    chosen = torch.cat(given[1::3])
    counts, flat = [], weights.flatten()
    whole = sum(weighted(rows[(chosen == e).any(1)], flat[(chosen == e).any(1)]) for e in range(8))
    pool = whole / sum(float(flat[(chosen == e).any(1)].sum()) for e in range(8))
    for expert in range(8):
        mine = (chosen == expert).any(1)
        found = statistics[f"mlp.experts.{expert}.gate_proj"]
        assert found is statistics[f"mlp.experts.{expert}.up_proj"]
        assert found.tokens == int(mine.sum())
        counts.append(found.tokens)
        own = weighted(rows[mine], flat[mine]) / flat[mine].sum()
        share = min(found.tokens / 128, 1.0)
        expected = share * own + (1 - share) * pool
        torch.testing.assert_close(found.hessian, expected, rtol=1e-4, atol=1e-5)
    assert min(counts) < 128 <= max(counts), "the test needs thin experts and others"


def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (rows * weights.unsqueeze(1)).T @ rows


def test_filling_up_after_the_hessian_was_read_is_an_error() -> None:
    one, other = (InputStatistics(4, CPU, full=True) for _ in range(2))
    one.add(torch.randn(2, 4))
    other.add(torch.randn(3, 4))
    pool = one.empty()
    for statistics in (one, other):
        pool.take_in(statistics)
    assert pool.tokens == 5
    _ = one.hessian
    with pytest.raises(ValueError, match="has been read"):
        pool.take_in(one)
    with pytest.raises(ValueError, match="has been read"):
        one.fill_up(pool, 4)


def test_a_budget_gives_the_experts_of_a_layer_one_scheme(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "mixtral")
    recipe = small(
        "best", sidecar={}, allocation={"ranks": (0, 2, 8)}, alternating={"rounds": 1, "polish": 1}
    )
    result, _ = run(dense, tmp_path / "out", recipe)
    assert result.bits_per_weight <= 4.45
    checkpoint = Checkpoint(tmp_path / "out")
    schemes = {name: spec.scheme for name, spec in checkpoint.linears.items()}
    assert expert_problems(dict(schemes)) == []
    for (layer, projection), names in expert_layers(schemes).items():
        assert len(names) == 4
        assert projection_pattern(layer, projection) in schemes[names[0]].targets
    listed = json.dumps(checkpoint.config.to_dict()["config_groups"])
    assert "experts.0" not in listed, "each expert is not named for itself"


def test_some_experts_alone_are_not_quantised(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3_moe")
    recipe = small(ignore=(r"re:.*experts\.3\..*",))
    with pytest.raises(SvskError, match=r"experts\.0\.gate_proj and .*experts\.3\.gate_proj"):
        quantize(dense, tmp_path / "out", recipe)
    recipe = small(ignore=(r"re:.*experts\.\d+\.down_proj",))
    with pytest.raises(SvskError, match="down_proj of its experts is not quantised"):
        quantize(dense, tmp_path / "out", recipe)
    _, said = run(dense, tmp_path / "out", small(ignore=(r"re:.*experts\..*",)))
    assert "model.layers.*.mlp.experts.*.down_proj.weight (16)" in "".join(said)


@pytest.mark.parametrize(
    ("family", "parameter"),
    [
        (Family("granitemoe", {"num_local_experts": 4}), "block_sparse_moe.experts.gate_up_proj"),
        (
            Family("gpt_oss", {"num_local_experts": 4, "head_dim": 32}),
            "mlp.experts.gate_up_proj",
        ),
    ],
    ids=["granitemoe", "gpt_oss"],
)
def test_stacks_on_disk_are_refused_as_what_they_are(
    tmp_path: Path, family: Family, parameter: str
) -> None:
    dense = write_dense(tmp_path / "dense", family)
    with pytest.raises(SvskError, match=rf"{parameter} is a stack of expert matrices.*one by one"):
        quantize(dense, tmp_path / "out", small())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    """In the model that is quantised, and in the checkpoint that is checked."""
    dense = write_dense(tmp_path / "dense", "qwen3_moe")
    gone = "model.layers.1.mlp.experts.6.up_proj"
    quantize(dense, tmp_path / "out", small())
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(shard)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file(kept, shard, metadata)
    problems = validate_against_architecture(tmp_path / "out")
    assert any(f"{gone}.weight: missing" in problem for problem in problems), problems

    tensors = load_file(dense / "model.safetensors")
    del tensors[f"{gone}.weight"]
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(SvskError, match=f"no tensor {gone}.weight"):
        quantize(dense, tmp_path / "again", small())


def test_smoothing_leaves_the_mixture_the_same(tmp_path: Path) -> None:
    """up is folded into each down; the norm, which the router reads too, is left alone."""
    source = ModelSource(write_dense(tmp_path / "dense", "qwen2_moe", dtype=torch.float32))
    texts = CalibrationSet(sample_tokens(8, 24), "random", "")
    found = plan_smoothing(source, texts, SmoothingArgs(alpha=0.7), CPU, tmp_path)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        for expert in range(4):
            assert f"{prefix}.mlp.experts.{expert}.down_proj.weight" in found.fold
        assert f"{prefix}.post_attention_layernorm.weight" not in found.fold
        assert f"{prefix}.input_layernorm.weight" in found.fold
    assert torch.equal(run_by_blocks(source.folded(found.fold)), run_by_blocks(source))


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("gguf", "mixtures of experts are not exported to GGUF.*--to dense"),
        ("compressed-tensors", "is an expert, whose layout.*--to dense"),
    ],
)
def test_inspected_and_not_exported_where_stacks_are_needed(
    tmp_path: Path, to: str, message: str
) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3_moe")
    folder = write_random_svsk(
        dense,
        tmp_path / "svsk",
        schemes={"all": scheme("Linear")},
        linears=set(ModelSource(dense).block_linears()),
    )
    (gate,) = (r for r in inspect_checkpoint(folder)["groups"] if r["kind"] == "gate_proj")
    assert (gate["count"], gate["shape"]) == (16, [64, 128])
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    result = CliRunner().invoke(app, ["export", str(folder), str(out), "--to", to])
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split()))
    assert not out.exists()


def test_schemes_are_compared_by_what_is_stored() -> None:
    names = [f"model.layers.0.mlp.experts.{n}.{p}" for n in (0, 1) for p in ("gate_proj", "w2")]
    alike = {name: scheme(name, rank=2) for name in names}  # a group for each
    assert expert_problems(dict(alike)) == []
    (problem,) = expert_problems({**alike, names[2]: scheme(names[2], rank=4)})
    assert f"{names[0]} and {names[2]}" in problem


def test_names_of_experts() -> None:
    found = ExpertName.of("model.layers.3.block_sparse_moe.experts.17.w3")
    assert found == ExpertName("model.layers.3.block_sparse_moe.experts", 17, "w3")
    assert ExpertName.of("model.layers.3.mlp.shared_experts.up_proj") is None
    assert ExpertName.of("model.layers.3.mlp.experts.17") is None
