# SPDX-License-Identifier: Apache-2.0
"""From a dense folder to a checkpoint: contents, determinism, interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration.held_out import held_out_last
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.precision import block_dtype
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.decoder_blocks import linear_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture
from svsk_offline.storage.layer_report import LayerReport
from svsk_vllm.format import Checkpoint, ShardedReader, SvskFormatError, dequantize
from tests.offline.folders import folder_bytes
from tests.support.format_builders import edit_json, edit_tensors
from tests.support.interruptions import stop_at_a_matrix
from tests.support.tiny_models import FAMILIES, write_dense


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_hessian_recipes(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe, recipe: str
) -> None:
    """The other recipes on the same inputs.

    Valid, repeatable, and closer to the outputs than ``published``.
    """
    changes = {
        "calibration": {"samples": 12, "seq_len": 64},
        "sidecar": {"rank": 4, "tile_m": 48, "tile_n": 96},
    }
    chosen = load_recipe(recipe).override(changes)
    if recipe == "best":  # more than one of each, as the recipe has; not four and three
        chosen = chosen.override({"alternating": {"rounds": 2, "polish": 2}})
    ours = quantize(tiny_qwen2, tmp_path / "a", chosen)
    quantize(tiny_qwen2, tmp_path / "b", chosen)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert validate_against_architecture(tmp_path / "a") == []
    quantize(tiny_qwen2, tmp_path / "published", tiny_recipe.override(changes))
    tokens = ModelSource(tiny_qwen2).tokenizer(
        "The statement consists of the keyword. " * 8, return_tensors="pt"
    )
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    divergence = []
    for folder in ("a", "published"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            reference, own = (m(**tokens).logits.log_softmax(-1) for m in (dense, model))
        divergence.append(float((reference.exp() * (reference - own)).sum(-1).mean()))
    assert divergence[0] < divergence[1]
    assert len(ours.layers) == 14


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoint_is_valid_and_close_to_the_model(
    tmp_path: Path, tiny_recipe: Recipe, family: str, dtype: torch.dtype
) -> None:
    dense = write_dense(tmp_path / "dense", family, dtype=dtype)
    result = quantize(dense, tmp_path / "out", tiny_recipe)
    assert validate_against_architecture(tmp_path / "out") == []
    checkpoint, source = Checkpoint(tmp_path / "out"), ShardedReader(dense)
    assert len(checkpoint.linears) == 14 == len(result.layers)
    for name, linear in checkpoint.iter_linears():
        assert linear.scale.dtype == dtype
        weight = source.read(f"{name}.weight").float()
        error = weight - dequantize(linear, with_sidecar=False)
        assert error.square().sum() < 0.02 * weight.square().sum()
    for layer in result.layers:
        assert layer.error < layer.base_error
    for name in checkpoint.dense_names:
        assert torch.equal(checkpoint.read_dense(name), source.read(name))
    stored = set(checkpoint.dense_names) | {f"{name}.weight" for name in checkpoint.linears}
    assert stored == set(source.names)


def test_reports_are_those_of_what_is_stored(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    """Reported errors, bits and SQNR are of the written tensors and the layer's real inputs."""
    result = quantize(tiny_llama, tmp_path / "out", tiny_recipe)
    inputs: dict[str, torch.Tensor] = {}
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    source = ModelSource(tiny_llama)
    args = tiny_recipe.calibration
    tokens = load_calibration("default", source.tokenizer, args.samples, args.seq_len, args.seed)
    for name, module in linear_modules(model):
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.__setitem__(name, given[0].flatten(0, 1))
        )
    chosen = held_out_last(tokens)[0].tokens[-1:]
    assert torch.equal(chosen, tokens.tokens[7:8] if args.samples > 7 else tokens.tokens[-1:])
    with torch.no_grad():
        model(chosen)
    checkpoint = Checkpoint(tmp_path / "out")
    for layer in result.layers:
        linear = checkpoint.read_linear(layer.name)
        weight = ShardedReader(tiny_llama).read(f"{layer.name}.weight").float()
        output, lost, base = (
            float((inputs[layer.name] @ matrix.T).square().mean())
            for matrix in (
                weight,
                weight - dequantize(linear),
                weight - dequantize(linear, with_sidecar=False),
            )
        )
        # Measured in bfloat16 where the processor multiplies it.
        rel = 1e-3 if block_dtype(torch.device("cpu")) == torch.float32 else 1e-2
        assert layer.error == pytest.approx(lost / output, rel=rel)
        assert layer.base_error == pytest.approx(base / output, rel=rel)
        assert layer.held_out_tokens == args.seq_len
        noise = (weight - dequantize(linear)).square().sum()
        assert layer.sqnr_db == pytest.approx(
            float(10 * torch.log10(weight.square().sum() / noise)), rel=1e-4
        )
        tensors = linear.to_tensors().values()
        assert layer.stored_bits == sum(
            tensor.numel() * tensor.element_size() * 8 for tensor in tensors
        )
    found = inspect_checkpoint(tmp_path / "out")
    assert found["bits_per_weight"] == pytest.approx(result.bits_per_weight)
    assert sum(row["count"] for row in found["groups"]) == 14


def test_same_command_gives_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    quantize(tiny_llama, tmp_path / "a", tiny_recipe)
    quantize(tiny_llama, tmp_path / "b", tiny_recipe)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    changed = tiny_recipe.override({"calibration": {"seed": 1}})
    quantize(tiny_llama, tmp_path / "c", changed)
    assert folder_bytes(tmp_path / "a") != folder_bytes(tmp_path / "c")


def test_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    quantize(tiny_llama, tmp_path / "whole", tiny_recipe)

    class Killed(BaseException):
        pass

    def stop(report: LayerReport) -> None:
        if report.name.startswith("model.layers.1.mlp"):
            raise Killed

    with pytest.raises(Killed):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe, progress=Progress(layer=stop))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    redone: list[str] = []
    again = quantize(
        tiny_llama,
        tmp_path / "out",
        tiny_recipe,
        progress=Progress(layer=lambda report: redone.append(report.name)),
    )
    assert {name.split(".")[2] for name in redone} == {"1"}
    assert len(again.layers) == 14
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_run_with_other_inputs_is_refused(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    stop_at_a_matrix(tiny_llama, tmp_path / "out", tiny_recipe)
    other = tiny_recipe.override({"sidecar": {"rank": 2}})
    with pytest.raises(SvskError, match=r"out\.partial holds an unfinished run"):
        quantize(tiny_llama, tmp_path / "out", other)
    quantize(tiny_llama, tmp_path / "out", other, overwrite=True)
    assert {spec.rank for spec in Checkpoint(tmp_path / "out").linears.values()} == {2}


def test_existing_output_is_kept_unless_told(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    (tmp_path / "out").mkdir()
    quantize(tiny_llama, tmp_path / "out", tiny_recipe, overwrite=True)
    (tmp_path / "out" / "note").write_text("x")
    with pytest.raises(SvskError, match="--overwrite"):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe)
    assert (tmp_path / "out" / "note").exists()
    quantize(tiny_llama, tmp_path / "out", tiny_recipe, overwrite=True)
    assert not (tmp_path / "out" / "note").exists()
    assert validate_against_architecture(tmp_path / "out") == []


def test_restore_gives_what_transformers_loads(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe
) -> None:
    quantize(tiny_qwen2, tmp_path / "out", tiny_recipe)
    restore(tmp_path / "out", tmp_path / "dense")
    restored: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(restored(tokens).logits, loaded(tokens).logits)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    with pytest.raises(SvskError, match="--overwrite"):
        restore(tmp_path / "out", tmp_path / "dense")


@pytest.mark.parametrize(
    ("recipe", "group_size", "scale_bits"), [("published", 64, 6), ("fast", 32, 8), ("best", 16, 6)]
)
def test_scales_in_two_levels(
    tmp_path: Path, tiny_qwen2: Path, recipe: str, group_size: int, scale_bits: int
) -> None:
    """Valid, with the bits asked for, and the same weights in transformers as restored."""
    changes = {
        "weights": {"group_size": group_size, "scale_bits": scale_bits, "codebook": "quad8"},
        "calibration": {"samples": 12, "seq_len": 64},
        "sidecar": {"rank": 4},
    }
    out = tmp_path / "out"
    quantize(tiny_qwen2, out, load_recipe(recipe).without_budget().override(changes))
    assert validate_against_architecture(out) == []
    checkpoint = Checkpoint(out)
    assert checkpoint.config.version == "1.1"
    for weights in (spec.scheme.weights for spec in checkpoint.linears.values()):
        if weights.codebook == "int8":  # embedding and head
            continue
        assert (weights.group_size, weights.scale_bits) == (group_size, scale_bits)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    restored = ShardedReader(restore(out, tmp_path / "dense"))
    for name in checkpoint.linears:
        assert torch.equal(loaded[f"{name}.weight"], restored.read(f"{name}.weight"))


def test_ranks_over_128(tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe) -> None:
    """More than these matrices have: valid all the same, of the version that allows it."""
    out = tmp_path / "out"
    quantize(tiny_qwen2, out, tiny_recipe.override({"sidecar": {"rank": 130, "num_bits": 4}}))
    assert validate_against_architecture(out) == []
    checkpoint = Checkpoint(out)
    assert checkpoint.config.version == "1.1"
    assert {spec.rank for spec in checkpoint.linears.values()} == {130}
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    restored = ShardedReader(restore(out, tmp_path / "dense"))
    for name in checkpoint.linears:
        assert torch.equal(loaded[f"{name}.weight"], restored.read(f"{name}.weight"))


def test_ignored_modules_stay_dense(tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe.override(
        {"ignore": (r"re:.*\.down_proj$", "model.layers.0.self_attn.o_proj")}
    )
    quantize(tiny_llama, tmp_path / "out", recipe)
    checkpoint = Checkpoint(tmp_path / "out")
    # Of what recipes say for all models, what this one has: it has no router.
    assert checkpoint.config.ignore == (*recipe.ignore[1:], "lm_head")
    assert len(checkpoint.linears) == 11
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read_dense(name), ShardedReader(tiny_llama).read(name))
    assert validate_against_architecture(tmp_path / "out") == []
    edit_json(
        tmp_path / "out" / "config.json",
        lambda config: config["quantization_config"].update(ignore=["lm_head"]),
    )
    problems = validate_against_architecture(tmp_path / "out")
    assert len(problems) == 3
    assert all("stored as it was, but config.json quantises" in problem for problem in problems)


def test_input_features_that_do_not_fit_the_groups(tmp_path: Path, tiny_recipe: Recipe) -> None:
    settings = {**FAMILIES["llama"].settings, "hidden_size": 96, "intermediate_size": 128}
    dense = write_dense(tmp_path / "dense", type(FAMILIES["llama"])("llama", settings))
    with pytest.raises(
        SvskFormatError, match=r"q_proj: K = 96 .* group size 64; use group_size 32"
    ):
        quantize(dense, tmp_path / "out", tiny_recipe)
    assert not (tmp_path / "out.partial").exists()
    quantize(dense, tmp_path / "out", tiny_recipe.override({"weights": {"group_size": 32}}))
    assert validate_against_architecture(tmp_path / "out") == []


def test_changed_weights_are_not_mixed_into_an_unfinished_run(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    stop_at_a_matrix(model, tmp_path / "out", tiny_recipe)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # same size, other time
    with pytest.raises(SvskError, match="unfinished run of another model"):
        quantize(model, tmp_path / "out", tiny_recipe)


def test_second_copy_of_a_tied_head_is_left_out(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(model, change)
    quantize(model, tmp_path / "out", tiny_recipe)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors
    assert validate_against_architecture(tmp_path / "out") == []


def test_dense_tensors_are_in_the_declared_dtype(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    """Float32 tensors under a bfloat16 config would take twice the room, to be rounded anyway."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = {
        name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for dtype in ("bfloat16", "float16"):
        quantize(
            model, tmp_path / dtype, tiny_recipe, dtype="auto" if dtype == "bfloat16" else dtype
        )
        checkpoint = Checkpoint(tmp_path / dtype)
        stored = {name: checkpoint.read_dense(name) for name in checkpoint.dense_names}
        assert len(stored) > 3
        assert all(
            torch.equal(value, tensors[name].to(getattr(torch, dtype)))
            for name, value in stored.items()
        )
        assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
        assert validate_against_architecture(tmp_path / dtype) == []


@pytest.mark.parametrize("dropped", ["", "model."])
def test_what_the_class_wants_in_float32_stays(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    dropped: str,
) -> None:
    """Also under names of the folder that are not those of the class."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    stored = {name.removeprefix(dropped): tensor for name, tensor in tensors.items()}
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("transformers.LlamaForCausalLM._keep_in_fp32_modules_strict", {"norm"})
    # Llama's code does not convert what such norms give, as that of classes that have some does.
    monkeypatch.setattr("svsk_offline.run.block_dtype", lambda device: torch.float32)
    quantize(model, tmp_path / "out", tiny_recipe)
    norm = Checkpoint(tmp_path / "out").read_dense("model.norm.weight".removeprefix(dropped))
    assert torch.equal(norm, tensors["model.norm.weight"])


def test_activations_that_a_recipe_recommends(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    """They go into config.json, and change no tensor."""
    other = tiny_recipe.model_copy(update={"activations": "int8"})
    plain, said = (
        quantize(tiny_llama, tmp_path / out, recipe).folder
        for out, recipe in (("plain", tiny_recipe), ("said", other))
    )
    assert Checkpoint(said).config.activations == "int8"
    assert inspect_checkpoint(said)["activations"] == "int8"
    assert inspect_checkpoint(plain)["activations"] == "exact"
    for name, linear in Checkpoint(plain).iter_linears():
        stored, others = linear.to_tensors(), Checkpoint(said).read_linear(name).to_tensors()
        assert all(torch.equal(tensor, others[key]) for key, tensor in stored.items())
