# SPDX-License-Identifier: Apache-2.0
"""``--head`` and ``--embedding``: what is stored, how well, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming
from typer.testing import CliRunner

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner, load_calibration
from svsk_offline.calibration.head_input import collect_head_input
from svsk_offline.cli import app
from svsk_offline.pipeline import Progress, QuantizationResult, quantize
from svsk_offline.planning.tables import plan_tables
from svsk_offline.quantizers.eight_bits import round_to_eight_bits
from svsk_offline.quantizers.rounding import nearest_levels
from svsk_offline.recipe import Recipe, load_recipe, parse_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture
from svsk_vllm.format import Checkpoint, LinearSpec, ShardedReader, dequantize
from tests.offline.folders import folder_bytes
from tests.support.format_builders import edit_json, make_group
from tests.support.interruptions import stop_before_tables
from tests.support.tiny_models import Family, write_dense


def recipe_of(head: str, embedding: str = "auto", name: str = "fast") -> Recipe:
    return load_recipe(name).override(
        {
            "calibration": {"samples": 16, "seq_len": 64},
            "sidecar": {"rank": 2},
            "tables": {"head": head, "embedding": embedding},
        }
    )


def stored(folder: Path) -> dict[str, str]:
    """Codebooks of embedding and head, ``dense`` for one that is stored as it was."""
    checkpoint = Checkpoint(folder)
    found = {}
    for module in ("model.embed_tokens", "lm_head"):
        if module in checkpoint.linears:
            found[module] = checkpoint.linears[module].scheme.weights.codebook
        elif f"{module}.weight" in checkpoint.tensors:
            found[module] = "dense"
    return found


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(
    ("model", "head", "embedding", "expected", "tied"),
    [
        ("tiny_llama", "int8", "auto", {EMBEDDING: "int8"}, True),
        ("tiny_llama", "svsk", "auto", {EMBEDDING: "quad8"}, True),
        ("tiny_llama", "svsk", "int8", {EMBEDDING: "int8", HEAD: "quad8"}, False),
        ("tiny_llama", "dense", "auto", {EMBEDDING: "dense"}, None),
        ("tiny_qwen2", "int8", "auto", {EMBEDDING: "int8", HEAD: "int8"}, False),
        ("tiny_qwen2", "svsk", "auto", {EMBEDDING: "int8", HEAD: "quad8"}, False),
        ("tiny_qwen2", "int8", "dense", {EMBEDDING: "dense", HEAD: "int8"}, None),
        ("tiny_qwen2", "dense", "int8", {EMBEDDING: "int8", HEAD: "dense"}, False),
        ("tiny_qwen2", "dense", "dense", {EMBEDDING: "dense", HEAD: "dense"}, None),
        ("tiny_qwen2", "dense", "auto", {EMBEDDING: "int8", HEAD: "dense"}, False),
        ("tiny_qwen2", "auto", "auto", {EMBEDDING: "int8", HEAD: "int8"}, False),
        ("tiny_llama", "auto", "auto", {EMBEDDING: "int8"}, True),
        ("tiny_llama", "auto", "dense", {EMBEDDING: "dense"}, None),
        ("tiny_llama", "auto", "int8", {EMBEDDING: "int8"}, True),
    ],
)
def test_what_is_stored(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: str,
    head: str,
    embedding: str,
    expected: dict[str, str],
    tied: bool | None,
) -> None:
    out = tmp_path / "out"
    dense: Path = request.getfixturevalue(model)
    result = quantize(dense, out, recipe_of(head, embedding))
    assert validate_against_architecture(out) == []
    assert stored(out) == expected
    config = json.loads((out / "config.json").read_text())
    declared = config["quantization_config"].get("embedding")
    assert declared == (None if tied is None else {"module": EMBEDDING, "tied": tied})
    assert config["tie_word_embeddings"] == (model == "tiny_llama" and HEAD not in expected)
    assert {r.name for r in result.tables} == {k for k, v in expected.items() if v != "dense"}
    card = (out / "README.md").read_text()
    assert all((f"| {report.name.rpartition('.')[2]} | 1 |" in card) for report in result.tables)


def rows_of(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight: torch.Tensor = model.get_output_embeddings().weight.data
    return weight


def test_the_error_that_is_reported_is_that_of_the_logits(tmp_path: Path, tiny_qwen2: Path) -> None:
    """Measured again with the whole model on the samples held out."""
    recipe = recipe_of("svsk", name="fast")
    result = quantize(tiny_qwen2, tmp_path / "out", recipe)
    (report,) = [report for report in result.tables if report.name == HEAD]
    source = ModelSource(tiny_qwen2)
    texts = load_calibration("default", source.tokenizer, 16, 64, 0)
    held = texts.tokens[7::8]
    assert report.held_out_tokens == held.numel()
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    quantized = dequantize(Checkpoint(tmp_path / "out").read_linear(HEAD))
    inputs: list[torch.Tensor] = []
    dense.lm_head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        dense(input_ids=held)
    x, weight = inputs[0].flatten(0, 1), dense.lm_head.weight.data
    expected = (x @ (weight - quantized).T).square().sum() / (x @ weight.T).square().sum()
    # Blocks may run in bfloat16.
    assert report.error == pytest.approx(float(expected), rel=0.05)
    assert report.error < report.base_error


def test_the_head_is_fitted_to_its_input(tmp_path: Path, tiny_qwen2: Path) -> None:
    """Smaller errors of logits than plain rounding's of the same bits, which has no Hessian."""
    fitted = quantize(tiny_qwen2, tmp_path / "a", recipe_of("svsk"))
    (report,) = [report for report in fitted.tables if report.name == HEAD]
    source = ModelSource(tiny_qwen2)
    texts = load_calibration("default", source.tokenizer, 16, 64, 0)
    runner = BlockRunner(source, texts, torch.device("cpu"), torch.float32)
    for index, block in enumerate(source.blocks[1]):
        source.load(block, f"{source.blocks[0]}.{index}.", torch.float32, torch.device("cpu"))
        runner.advance(index, block)
        source.unload(block)
    moment = collect_head_input(runner, texts.tokens, full=True)[0].hessian
    weight = source.tensors.read("lm_head.weight").float()
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(2, keepdim=True) / 13.125
    rounded = (nearest_levels(groups / scale, "quad8") * scale).flatten(1)
    plain = float((((weight - rounded) @ moment) * (weight - rounded)).sum())
    unit = float(((weight @ moment) * weight).sum())
    assert report.base_error < 0.8 * plain / unit


def test_eight_bits_are_the_nearest(tiny_qwen2: Path) -> None:
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4, 32:64] = 1e-45  # too small for any scale
    spec = LinearSpec("m", 300, 96, make_group(codebook="int8", group_size=32))
    linear = round_to_eight_bits(weight, spec)
    error = (dequantize(linear) - weight).unflatten(1, (-1, 32)).abs().amax(2)
    # Half a step, and what the rounding of the scale to bfloat16 takes off the largest code.
    assert bool((error <= linear.scale.float() * 0.8 + 1e-44).all())
    typical = (dequantize(linear) - weight).square().mean() / weight.square().mean()
    assert float(typical) < 6e-5


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.zeros(4, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(SvskError, match=r"m\.weight: holds values that are not finite"):
        round_to_eight_bits(weight, LinearSpec("m", 4, 64, make_group(codebook="int8")))


def test_an_interrupted_run_writes_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    whole = quantize(tiny_llama, tmp_path / "a", recipe_of("svsk"))
    stop_before_tables(tiny_llama, tmp_path / "b", recipe_of("svsk"))
    again = quantize(tiny_llama, tmp_path / "b", recipe_of("svsk"))
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert [r.error for r in again.tables] == [r.error for r in whole.tables]


def test_bits_of_the_blocks_and_of_the_file(tmp_path: Path, tiny_llama: Path) -> None:
    def bits(head: str) -> tuple[QuantizationResult, dict[str, Any]]:
        folder = tmp_path / head
        return quantize(tiny_llama, folder, recipe_of(head)), inspect_checkpoint(folder)

    (result, eight), (_, dense) = bits("int8"), bits("dense")
    assert eight["bits_per_weight"] == dense["bits_per_weight"] == result.bits_per_weight
    assert eight["bits_per_weight_of_all"] < dense["bits_per_weight_of_all"] - 0.5
    (row,) = [row for row in eight["groups"] if row["kind"] == "embed_tokens"]
    assert row["bits_per_weight"] == 8.25
    assert (row["shape"], row["codebook"]) == ([320, 128], "int8")


def budget(target: float, *, includes: bool) -> Recipe:
    return recipe_of("svsk", name="best").override(
        {
            "alternating": {"rounds": 1, "polish": 0},
            "allocation": {
                "target_bpw": target,
                "ranks": (0, 2, 4, 8, 12, 16),
                "includes": ("head",) if includes else (),
            },
        }
    )


def test_a_budget_may_include_the_head(tmp_path: Path, tiny_qwen2: Path) -> None:
    apart = quantize(tiny_qwen2, tmp_path / "a", budget(5.2, includes=False))
    within = quantize(tiny_qwen2, tmp_path / "b", budget(5.2, includes=True))
    (head,) = [report for report in within.tables if report.name == HEAD]
    assert head.bits_per_weight > 5.5, "nothing to make up for"
    everything = [*within.layers, head]
    total = sum(report.stored_bits for report in everything)
    weights = sum(report.num_weights for report in everything)
    assert 5.1 < total / weights <= 5.2
    assert within.bits_per_weight < apart.bits_per_weight <= 5.2


@pytest.mark.parametrize(
    ("head", "embedding", "message"),
    [
        ("int8", "dense", "--head int8 --embedding dense: embedding and head of .* are one matrix"),
        ("dense", "int8", "Leave --embedding out, or say --embedding dense"),
    ],
)
def test_one_matrix_is_not_stored_in_two_ways(
    tmp_path: Path, tiny_llama: Path, head: str, embedding: str, message: str
) -> None:
    with pytest.raises(SvskError, match=message):
        quantize(tiny_llama, tmp_path / "out", recipe_of(head, embedding))


def test_a_tied_head_that_loaders_would_take_for_the_embedding(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose rules for names leave none for a head that is stored apart."""
    rules = [WeightRenaming("^lm_head.weight$", "model.embed_tokens.weight")]
    known = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: rules if kind == "llama" else known(kind),
    )
    with pytest.raises(
        SvskError,
        match=r"the head is tied to model\.embed_tokens\.weight and has no name of its own",
    ):
        told(tiny_llama, recipe_of("svsk", "int8"))


def test_a_pattern_that_ignores_the_head_contradicts_it(tmp_path: Path, tiny_qwen2: Path) -> None:
    recipe = recipe_of("int8").override({"ignore": ("re:lm_h",)})
    with pytest.raises(SvskError, match="--ignore re:lm_h: matches lm_head, which --head and"):
        quantize(tiny_qwen2, tmp_path / "out", recipe)


def told(folder: Path, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Names of the tables that are quantised, and what is said of the others."""
    said: list[str] = []
    plan = plan_tables(ModelSource(folder), recipe, torch.bfloat16, said.append)
    return [table.spec.name for table in plan.tables], said


def not_finite(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"][1, 2] = float("inf")
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})


def of_a_class_that_reads_it(dense: Path) -> None:
    edit_json(dense / "config.json", lambda config: config.update(architectures=["ChatGLMModel"]))


@pytest.mark.parametrize(
    ("change", "reason", "quantised"),
    [
        (not_finite, "lm_head.weight holds values that are not finite", [EMBEDDING]),
        (of_a_class_that_reads_it, "vLLM .* reads its dense weight in ChatGLMModel", []),
    ],
)
def test_what_cannot_be_quantised_stays_dense_unless_it_was_asked_for(
    tmp_path: Path,
    tiny_qwen2: Path,
    change: Callable[[Path], None],
    reason: str,
    quantised: list[str],
) -> None:
    dense = Path(shutil.copytree(tiny_qwen2, tmp_path / "dense"))
    change(dense)
    names, said = told(dense, load_recipe("fast"))
    assert names == quantised
    assert re.fullmatch(f"The output head stays dense: {reason}[.]", said[-1])
    for head in ("int8", "svsk"):
        with pytest.raises(SvskError, match=f"--head {head}: cannot be stored so: {reason}. Say"):
            told(dense, recipe_of(head, "dense"))


def test_a_table_of_a_width_that_no_group_divides_stays_dense(tmp_path: Path) -> None:
    """OPT's may be narrower than its blocks; embedding and head are one."""
    settings = {"word_embed_proj_dim": 40, "ffn_dim": 256, "do_layer_norm_before": False}
    dense = write_dense(tmp_path / "dense", Family("opt", settings))
    said: list[str] = []
    recipe = recipe_of("auto")
    quantize(dense, tmp_path / "out", recipe, progress=Progress(message=said.append))
    assert validate_against_architecture(tmp_path / "out") == []
    assert Checkpoint(tmp_path / "out").config.embedding is None
    reason = "decoder.embed_tokens.weight has 40 columns, which are not a multiple of 16"
    assert any(f"The output head stays dense: model.{reason}." in line for line in said)
    for option in ("head", "embedding"):
        asked = recipe.override({"tables": {option: "int8"}})
        with pytest.raises(
            SvskError, match=rf"--{option} int8: cannot be stored so: model\.{reason}"
        ):
            quantize(dense, tmp_path / "again", asked)


@pytest.mark.parametrize(
    ("model", "entry", "quantised"),
    [
        ("tiny_qwen2", "lm_head", [EMBEDDING]),
        ("tiny_qwen2", "re:lm_h", [EMBEDDING]),
        ("tiny_qwen2", "re:.*embed", [HEAD]),
        ("tiny_llama", "lm_head", []),
        ("tiny_llama", EMBEDDING, []),
    ],
)
def test_a_table_on_the_ignore_list_stays_dense(
    request: pytest.FixtureRequest, model: str, entry: str, quantised: list[str]
) -> None:
    dense: Path = request.getfixturevalue(model)
    recipe = recipe_of("auto").override({"ignore": (entry,)})
    names, said = told(dense, recipe)
    assert names == quantised
    assert f"stays dense: {entry} is on the ignore list." in said[-1]


def test_a_head_with_a_bias_is_quantised(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "phi")
    result = quantize(dense, tmp_path / "out", recipe_of("auto"))
    assert [report.name for report in result.tables] == [EMBEDDING, HEAD]
    bias = "lm_head.bias"
    kept = Checkpoint(tmp_path / "out").read_dense(bias)
    assert torch.equal(kept, ShardedReader(dense).read(bias))
    assert validate_against_architecture(tmp_path / "out") == []


def test_a_budget_without_a_quantised_head_does_not_include_it(
    tmp_path: Path, tiny_qwen2: Path
) -> None:
    recipe = budget(5.0, includes=True).override({"tables": {"head": "dense"}})
    with pytest.raises(SvskError, match="--budget-includes head: the head stays dense"):
        quantize(tiny_qwen2, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--head", "int4"],
            "--head int4: expected one of these: auto, int8, mixed-int8, svsk",
        ),
        (
            ["--embedding", "svsk"],
            "--embedding svsk: expected one of these: auto, int8",
        ),
        (["--recipe", "fast", "--budget-includes", "head"], "there is no bit budget"),
        (["--budget-includes", "x"], "allocation.includes.0: expected head, got 'x'"),
        (["--codebook", "int8"], "--codebook int8: expected one of these: int4, quad8."),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, tiny_llama: Path, arguments: list[str], message: str
) -> None:
    command = ["quantize", str(tiny_llama), str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_linears_of_eight_bits_are_no_recipe() -> None:
    raw = {
        "name": "x",
        "method": "published",
        "weights": {"num_bits": 8, "codebook": "int8"},
        "sidecar": {"rank": 0},
    }
    with pytest.raises(SvskError, match=r"codebook int8 has 8 bits, which only tables\.head"):
        parse_recipe(raw, "x.yaml")


def test_a_rank_without_effect_is_refused() -> None:
    with pytest.raises(SvskError, match=r"tables\.rank: no effect with tables\.head int8"):
        parse_recipe(
            {"name": "x", "method": "published", "tables": {"head": "int8", "rank": 4}}, "x"
        )


def test_values_that_differ_though_the_config_ties_them_are_two(
    tmp_path: Path, tiny_qwen2: Path
) -> None:
    dense = Path(shutil.copytree(tiny_qwen2, tmp_path / "dense"))
    edit_json(dense / "config.json", lambda config: config.update(tie_word_embeddings=True))
    plan = plan_tables(ModelSource(dense), recipe_of("int8"), torch.bfloat16)
    assert [table.spec.name for table in plan.tables] == [EMBEDDING, HEAD]
    assert not plan.tied
