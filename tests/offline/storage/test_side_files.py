# SPDX-License-Identifier: Apache-2.0
"""What travels with the weights, and what the model card says of the model it is made from."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.inspection import inspect_checkpoint
from svsk_offline.storage.model_card import Origin
from tests.support.format_builders import edit_json

CARD = """---
license: other
license_name: mine
license_link: LICENSE
language: [en, fr]
base_model: org/before
tags: [chat, vllm]
---
# A model
"""
TRAVEL = (
    "LICENSE",
    "merges.txt",
    "additional_chat_templates/tool.jinja",
    "vocab.tiktoken",
    "linked.txt",
    "deep/b.yaml",
)
STAY = (
    "pytorch_model.bin",
    "model.gguf",
    "tf_model.H5",
    "onnx/model.onnx",
    "pytorch_model.bin.index.json",
    ".git/HEAD",
    "runs/events.out.tfevents.1",
    "checkpoint-500/trainer_state.json",
    "adapter_config.json",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with everything that a folder may hold besides its weights."""
    folder = tmp_path_factory.mktemp("side") / "model"
    shutil.copytree(tiny_llama, folder)
    for name in (*TRAVEL, *STAY, "modeling_own.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "linked.txt":
            (folder / name).write_text(name)
    blob = folder.parent / "blob"
    blob.write_text("linked.txt")
    (folder / "linked.txt").symlink_to(blob)
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "README.md").write_text(CARD)
    os.mkfifo(folder / "pipe")
    return folder


def test_everything_but_weights_travels(tmp_path: Path, model: Path, tiny_recipe: Recipe) -> None:
    said: list[str] = []
    out = quantize(
        model, tmp_path / "out", tiny_recipe, progress=Progress(message=said.append)
    ).folder
    restored = restore(out, tmp_path / "restored")
    for folder in (out, restored):
        assert {name: (folder / name).read_text() for name in TRAVEL} == {
            name: name for name in TRAVEL
        }
        assert not [
            name for name in (*STAY, "modeling_own.py", "pipe") if os.path.lexists(folder / name)
        ]
        assert not (folder / "linked.txt").is_symlink()
    assert len([text for text in said if "pipe: is a FIFO" in text and "left out" in text]) == 1
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "mine",
        "LICENSE",
    )
    assert data["language"] == ["en", "fr"]
    assert (data["base_model"], data["base_model_relation"]) == (["org/before"], "quantized")
    assert data["tags"] == ["svsk", "quantized", "vllm", "chat"]
    assert card.text.strip().startswith("# model, quantised with SVSK\n\n4-bit weights")
    assert "Stock transformers does not know these weights: `import svsk_vllm.hf`" in card.text
    found = inspect_checkpoint(out)
    assert f"**{found['bits_per_weight']:.3f} bits per weight**" in card.text
    assert f"{found['bits_per_weight_of_all']:.3f} over all weights" in card.text
    assert str(tmp_path) not in card.content


def test_origin(tmp_path: Path, tiny_llama: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    shutil.copytree(tiny_llama, snapshot)
    (snapshot / "README.md").write_text(CARD)
    found = Origin.of(snapshot)
    assert (found.name, found.base_model, found.carried["license"]) == (
        "org/name",
        ("org/name",),
        "other",
    )
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    assert Origin.of(snapshot).carried == {}
    local = tmp_path / "local"
    shutil.copytree(tiny_llama, local)
    assert Origin.of(local) == Origin("local", (), {})
    for path, known in (("org/other", ("org/other",)), ("/home/me/run", ()), (3, ())):
        edit_json(
            local / "config.json", lambda config, path=path: config.update(_name_or_path=path)
        )
        assert Origin.of(local).base_model == known
