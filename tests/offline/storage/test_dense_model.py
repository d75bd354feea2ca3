# SPDX-License-Identifier: Apache-2.0
"""A model folder is what transformers loads from it, whatever its names and its config say."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_eval.cli import app
from svsk_eval.text.models import load_model
from svsk_eval.text.scoring import evaluate
from svsk_kernels.errors import SvskError
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.hub import resolve_model
from svsk_offline.storage.inspection import validate_against_architecture
from svsk_offline.storage.model_loading import attention_arguments, read_model_config
from svsk_vllm.format import Checkpoint, ShardedReader, SvskFormatError
from tests.support.format_builders import edit_json
from tests.support.tiny_models import Family, write_dense

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def quick() -> Recipe:
    """Leaves embedding and head as they are read."""
    return load_recipe("fast").override(
        {
            "calibration": {"samples": 12, "seq_len": 64},
            "sidecar": {"rank": 2},
            "tables": {"head": "dense", "embedding": "dense"},
        }
    )


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy to change, its head tied by the config."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).state_dict()
    return state


def everything(source: ModelSource) -> dict[str, torch.Tensor]:
    """All parameters as the quantiser reads them."""
    name, blocks = source.blocks
    cpu = torch.device("cpu")
    state = {}
    for index, block in enumerate(blocks):
        source.load(block, f"{name}.{index}.", torch.float32, cpu)
        state |= {f"{name}.{index}.{key}": value for key, value in block.state_dict().items()}
    with source.loaded_outside(torch.float32, cpu):
        state |= {
            key: value.clone()
            for key, value in source.model.state_dict().items()
            if key not in state
        }
    return state


def assert_same(folder: Path) -> None:
    ours, theirs = everything(ModelSource(folder)), loaded(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}),
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
        lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
        lambda tensors: tensors.update(
            {name.removeprefix("model."): tensors.pop(name) for name in list(tensors)}
        ),
    ],
    ids=["untied by values", "second copy", "under the head's name", "names of the base model"],
)
def test_values_are_those_transformers_loads(
    model: Path, tmp_path: Path, quick: Recipe, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    change_tensors(model, change)
    assert_same(model)
    quantize(model, tmp_path / "out", quick)
    assert validate_against_architecture(tmp_path / "out") == []
    before, after = loaded(model), loaded(tmp_path / "out")
    for name in (HEAD, EMBEDDING):
        assert torch.equal(before[name], after[name])


def test_a_head_the_values_untie_is_untied_in_the_config(
    model: Path, tmp_path: Path, quick: Recipe
) -> None:
    """vLLM goes by the flag and would serve the embedding as the head."""
    change_tensors(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    quantize(model, tmp_path / "out", quick)
    assert Checkpoint(tmp_path / "out").hf_config["tie_word_embeddings"] is False
    edit_json(
        tmp_path / "out" / "config.json", lambda config: config.update(tie_word_embeddings=True)
    )
    (problem,) = validate_against_architecture(tmp_path / "out")
    assert problem.startswith(
        "lm_head.weight: differs from model.embed_tokens.weight, to which config.json ties it"
    )


def test_a_pair_under_the_heads_name_gets_the_embeddings(
    model: Path, tmp_path: Path, quick: Recipe
) -> None:
    """vLLM skips the head of a tied model when it loads."""
    change_tensors(model, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    quantize(model, tmp_path / "out", quick)
    names = Checkpoint(tmp_path / "out").dense_names
    assert EMBEDDING in names
    assert HEAD not in names


def test_a_single_file_beside_an_old_index_counts(model: Path) -> None:
    old = {
        name: torch.zeros_like(tensor)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(old, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(model)
    assert float(everything(ModelSource(model))[EMBEDDING].abs().sum()) > 0


def test_files_decide_which_tensors_there_are_not_the_index(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = list(tensors)
    for file, part in (("a", names[::2]), ("b", names[1::2])):
        save_file(
            {name: tensors[name] for name in part}, model / f"{file}.safetensors", {"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": {names[0]: "b.safetensors", names[1]: "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(model)


@pytest.mark.parametrize("recipe", ["fast", "published", "best"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", EMBEDDING]
)
def test_a_missing_tensor_is_found_before_any_work(
    model: Path, tmp_path: Path, recipe: str, name: str
) -> None:
    change_tensors(model, lambda tensors: tensors.pop(name))
    with pytest.raises(
        SvskError, match=f"no tensor {name}, which LlamaForCausalLM needs. Download or"
    ):
        quantize(model, tmp_path / "out", recipe)
    assert not (tmp_path / "out.partial").exists()


def test_a_shard_cut_short_is_found_before_any_work(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file(
            {n: tensors[n] for n, its in files.items() if its == file},
            model / file,
            {"format": "pt"},
        )
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with (model / "1.safetensors").open("r+b") as shard:
        shard.truncate((model / "1.safetensors").stat().st_size - 10)
    with pytest.raises(SvskFormatError, match=r"1\.safetensors: cannot be opened"):
        quantize(model, tmp_path / "out", "fast")
    (model / "1.safetensors").unlink()
    with pytest.raises(SvskFormatError, match=r"1\.safetensors: cannot be opened"):
        quantize(model, tmp_path / "out", "fast")


def test_two_tensors_for_one_parameter(model: Path) -> None:
    change_tensors(
        model, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1})
    )
    with pytest.raises(
        SvskError,
        match=r"norm\.weight both fill model\.norm\.weight of LlamaForCausalLM\. Remove the one",
    ):
        ModelSource(model).check()


def test_null_says_that_there_is_no_quantization_config(
    model: Path, tmp_path: Path, quick: Recipe
) -> None:
    edit_json(model / "config.json", lambda config: config.update(quantization_config=None))
    quantize(model, tmp_path / "out", quick)
    assert validate_against_architecture(tmp_path / "out") == []
    edit_json(model / "config.json", lambda config: config.update(quantization_config="gptq"))
    with pytest.raises(SvskError, match=r"is quantised already \(gptq\)"):
        ModelSource(model)


def test_a_config_no_model_can_be_built_from(model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(num_attention_heads=0))
    with pytest.raises(
        SvskError, match=r"cannot build a causal language model from its config\.json \("
    ):
        ModelSource(model).check()


def test_tensors_the_class_expects_to_be_left_over_travel(
    model: Path, tmp_path: Path, quick: Recipe
) -> None:
    """A part for drafting that transformers does not build and other programs do."""
    source = ModelSource(model)
    kind: Any = type(source.model)
    change_tensors(model, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(8, 8)}))
    with pytest.raises(SvskError, match=r"has no tensor mtp\.fc\.weight"):
        ModelSource(model).check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
        quantize(model, tmp_path / "out", quick)
        assert validate_against_architecture(tmp_path / "out") == []
    checkpoint = Checkpoint(tmp_path / "out")
    assert "mtp.fc.weight" in checkpoint.dense_names
    assert checkpoint.config.is_ignored("mtp.fc")


def test_soft_caps_are_computed(tmp_path: Path) -> None:
    """torch's attention leaves the cap out.

    The quantiser and every evaluation take the one that has it.
    """
    settings = {"head_dim": 32, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1}
    dense = write_dense(tmp_path / "dense", Family("gemma2", settings))
    (tmp_path / "text.txt").write_text(
        "A few words to be scored one after the other, 0123456789. " * 8
    )
    means: Any = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, attn_implementation="eager"
    )
    drops: Any = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected, other = means(tokens).logits, drops(tokens).logits
        assert not torch.allclose(expected, other, atol=0.1), (
            "the model does not tell the two apart"
        )
        assert torch.equal(load_model(dense, "float32", "cpu")(tokens).logits, expected)
    assert ModelSource(dense).model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert attention_arguments(means.config) == {"attn_implementation": "eager"}
    edit_json(dense / "config.json", lambda config: config.update(attn_logit_softcapping=None))
    assert attention_arguments(read_model_config(dense)) == {}


OWN_CONFIG = (
    "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
)
OWN_MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
Path(WITNESS).touch()
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for transformers' copies of models' code; one, as it is imported as a package."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


@pytest.fixture
def own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: None) -> Path:
    """A model with its own class, which leaves a file ``ran`` behind when it is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (model / "configuration_own.py").write_text(OWN_CONFIG)
    (model / "modeling_own.py").write_text(
        OWN_MODEL.replace("WITNESS", repr(str(tmp_path / "ran")))
    )
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    edit_json(model / "config.json", lambda config: config.update(own))
    return model


def copy_code(model: Path, out: Path) -> None:
    for path in model.glob("*.py"):
        shutil.copyfile(path, out / path.name)


def test_code_of_a_model_runs_only_when_told(own: Path, tmp_path: Path, quick: Recipe) -> None:
    (tmp_path / "text.txt").write_text("Some words to be scored. " * 20)
    for run in (
        lambda: quantize(own, tmp_path / "out", quick),
        lambda: ModelSource(own).check(),
        lambda: load_model(own),
        lambda: evaluate(own, None, tmp_path / "text.txt", 1, 16),
    ):
        with pytest.raises(
            SvskError, match=r"Python files of its own .* only with --trust-remote-code"
        ):
            run()
    assert not (tmp_path / "ran").exists()
    quantize(own, tmp_path / "out", quick, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    copy_code(own, tmp_path / "out")
    result = evaluate(tmp_path / "out", own, tmp_path / "text.txt", 1, 16, trust_remote_code=True)
    assert result.kl_mean is not None
    assert result.kl_mean < 0.5


def test_validate_runs_no_code_unless_told_and_says_what_it_left_out(
    own: Path, tmp_path: Path, quick: Recipe
) -> None:
    quantize(own, tmp_path / "out", quick, trust_remote_code=True)
    copy_code(own, tmp_path / "out")
    (tmp_path / "ran").unlink(missing_ok=True)
    told = CliRunner().invoke(app, ["validate", str(tmp_path / "out")])
    assert told.exit_code == 0
    assert "--trust-remote-code" in told.output
    assert "were not compared with that class" in told.output
    assert not (tmp_path / "ran").exists()
    trusted = CliRunner().invoke(app, ["validate", str(tmp_path / "out"), "--trust-remote-code"])
    assert trusted.exit_code == 0
    assert "not compared" not in trusted.output


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    from fnmatch import fnmatch

    asked: dict[str, list[str]] = {}

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model", trust_remote_code=trusted) == tmp_path

    def comes(file: str) -> bool:
        wanted, unwanted = (
            any(fnmatch(file, p) for p in asked[key]) for key in ("allow", "ignore")
        )
        return wanted and not unwanted

    for file in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "LICENSE",
        "README.md",
        "merges.txt",
        "generation_config.json",
        "preprocessor_config.json",
        "qwen.tiktoken",
        "NOTICE.txt",
    ):
        assert comes(file), file
    for file in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/config.json",
        "original/params.json",
        "model.gguf",
        "original/consolidated.00.pth",
        "model.fp16.safetensors",
        "tf_model.h5",
        "figures/plot.png",
    ):
        assert not comes(file), file
    assert comes("modeling_own.py") == trusted


def test_reader_by_headers_and_by_index(model: Path) -> None:
    """The checkpoint reader goes on trusting the index, which validate compares with the shards."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    name = next(iter(tensors))
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: "a.safetensors"}})
    )
    assert ShardedReader(model).names == [name]
    assert set(ShardedReader(model, by_headers=True).names) == set(tensors)


def test_weights_under_another_name_are_not_taken(model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(transformers_weights="w.bin"))
    with pytest.raises(SvskError, match=r"config\.json names w\.bin as the weights to load\. Supp"):
        ModelSource(model)


def test_a_folder_without_a_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SvskError, match=r"model: has no usable tokenizer \(.*Copy the tokenizer"):
        _ = ModelSource(model).tokenizer


def test_a_package_that_a_models_own_code_needs(own: Path) -> None:
    code = own / "modeling_own.py"
    code.write_text(f"import a_package_of_next_year\n{code.read_text()}")
    # In a process of its own: transformers keeps the classes of code that it has run.
    command = [sys.executable, "-m", "svsk_offline", "quantize", own, own.with_name("out")]
    run = subprocess.run(
        [*map(str, command), "--trust-remote-code"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    said = " ".join(run.stderr.split())
    assert "model: its model class needs a package that is not installed (" in said
    assert "a_package_of_next_year" in said


def test_a_model_whose_blocks_hold_no_linears(tmp_path: Path) -> None:
    """GPT-2 has modules of its own in their place."""
    dense = write_dense(tmp_path / "gpt2", Family("gpt2"))
    message = (
        "gpt2: found no list of 2 decoder blocks with nn.Linear layers in GPT2LMHeadModel. Supp"
    )
    with pytest.raises(SvskError, match=message):
        _ = ModelSource(dense).blocks


def test_a_matrix_of_two_linears_is_not_quantised(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that ties them, of which the folder holds one."""
    gate, up = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    change_tensors(model, lambda tensors: tensors.pop(f"{gate}.weight"))
    kind: Any = type(ModelSource(model).model)
    tied = {**kind._tied_weights_keys, f"{gate}.weight": f"{up}.weight"}
    monkeypatch.setattr(kind, "_tied_weights_keys", tied)
    source = ModelSource(model)
    message = f"{up}.weight and {gate}.weight|{gate}.weight and {up}.weight"
    with pytest.raises(SvskError, match=f"(?:{message}) are one matrix, which cannot be quantised"):
        source.check_quantizable(up)
