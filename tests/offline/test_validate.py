# SPDX-License-Identifier: Apache-2.0
"""`svsk validate`, `inspect` and `restore` on folders that somebody else made.

No code runs, nothing grows.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_offline.export.dense import restore
from svsk_vllm.architecture import folder_check as architecture
from svsk_vllm.architecture.folder_check import checkpoint_problems
from svsk_vllm.format import SvskFormatError
from tests.support.tiny_models import write_dense, write_random_svsk

LLAMA = "LlamaForCausalLM"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validate")
    return write_random_svsk(write_dense(root / "dense", "llama"), root / "svsk")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "svsk"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


def test_no_code_of_the_folder_runs(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig, {LLAMA}\nclass"
        f" OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass Own({LLAMA}):\n    config_class ="
        " OwnConfig\n"
    )
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit(folder, lambda config: config.update(model_type="own", auto_map=maps))
    found = CliRunner().invoke(app, ["validate", str(folder)], input="y\n" * 5)
    assert found.exit_code == 0
    assert "not checked:" in found.output
    assert "only with --trust-remote-code" in found.output
    assert "y/N" not in found.output
    assert CliRunner().invoke(app, ["inspect", str(folder)], input="y\n").exit_code == 0
    restore(folder, tmp_path / "restored")
    assert not ran.exists()
    own_code = "svsk: its architecture is Python code in the folder, which runs only with"
    assert any(own_code in problem for problem in checkpoint_problems(folder, serving=False))
    assert not ran.exists()
    assert checkpoint_problems(folder, trust_remote_code=True, serving=False) == []
    assert ran.exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, too large for any model"),
        ("num_hidden_layers", 90_000, "config.json describes a model of more than"),
        ("vocab_size", 10**12, "vocab_size is 1000000000000, too large"),
        ("vocab_size", 2 * 10**9, "expects"),
        ("num_labels", 10**9, "num_labels is 1000000000, too large"),
        ("num_attention_heads", 0, "cannot build the architecture"),
        ("hidden_act", "no such thing", "cannot build the architecture"),
        ("rope_parameters", {"rope_type": "none"}, "cannot build the architecture"),
        ("model_type", "nothing", "cannot build the architecture"),
    ],
)
def test_a_config_that_describes_another_model(
    folder: Path, key: str, value: Any, message: str
) -> None:
    edit(folder, lambda config: config.update({key: value}))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = checkpoint_problems(folder)
    assert any(message in line for line in problems), problems
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # 512 MiB


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_integers_in_place_of_weights(folder: Path) -> None:
    change_tensor(folder, "model.embed_tokens.weight", torch.Tensor.int)
    assert any("embed_tokens.weight: torch.int32" in line for line in checkpoint_problems(folder))


def test_a_codebook_that_somebody_edits(folder: Path, tmp_path: Path) -> None:
    """The shapes are the same, the numbers are not."""

    def other_codebook(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["default"]["weights"]["codebook"] = "quad8"

    edit(folder, other_codebook)
    assert any("other codebooks" in line for line in checkpoint_problems(folder))
    with pytest.raises(SvskFormatError, match="other codebooks"):
        restore(folder, tmp_path / "restored")


def test_targets_that_mean_the_same(folder: Path) -> None:
    edit(
        folder,
        lambda config: config["quantization_config"].update(
            ignore=["lm_head", "re:.*no_such_layer"]
        ),
    )
    assert checkpoint_problems(folder, serving=False) == []


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:.*.*.*.*.*x", "re:[", "re:\x1b[2J"])
def test_patterns_that_take_for_ever(folder: Path, pattern: str) -> None:
    edit(folder, lambda config: config["quantization_config"].update(ignore=[pattern]))
    (problem,) = checkpoint_problems(folder)
    assert "ignore" in problem
    assert problem.isprintable()


def test_what_a_folder_says_of_itself_is_shown_as_it_is(folder: Path) -> None:
    producer = {"recipe": "[/bold]\x1b[2J", "svsk": "[red]", "calibration": {"a": "[link"}}
    edit(folder, lambda config: config["quantization_config"].update(producer=producer))
    found = CliRunner().invoke(app, ["inspect", str(folder)])
    assert found.exit_code == 0
    assert "[/bold]?[2J" in found.output
    assert "\x1b[2J" not in found.output


def test_loaders_check_a_folder_on_one_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose pool of threads has been used hangs when vLLM forks its engine from it."""
    threads, checked = [], architecture.validate_checkpoint

    def check(*args: Any, **kwargs: Any) -> list[str]:
        threads.append(torch.get_num_threads())
        return checked(*args, **kwargs)

    monkeypatch.setattr(architecture, "validate_checkpoint", check)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        architecture.require_sound(folder, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1]
