# SPDX-License-Identifier: Apache-2.0
"""Figures that are measured go into the card of a checkpoint, and of nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from svsk_eval.cards import bench_rows, eval_rows, note_in_card
from svsk_offline.storage.card_figures import BEGIN, END, add_figures, shown_name
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_random_svsk


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Path) -> Path:
    folder = write_random_svsk(tiny_llama, tmp_path / "svsk")
    (folder / "README.md").write_text(f"---\ntags: [a]\n---\n# Name\n\n{BEGIN}\n{END}\n\nafter\n")
    return folder


def test_rows_are_added_and_replaced(checkpoint: Path) -> None:
    assert add_figures(checkpoint, {"one": "1.0", "two": "2.0"}) == checkpoint / "README.md"
    add_figures(checkpoint, {"two": "2.5", "three <b>|\x1b[31m\n": "3"})
    text = (checkpoint / "README.md").read_text()
    assert text.startswith("---\ntags: [a]\n---\n# Name\n")
    assert text.endswith("\n\nafter\n")
    section = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert section == [
        "## Measured",
        "",
        "| what | figures |",
        "| --- | --- |",
        "| one | 1.0 |",
        "| two | 2.5 |",
        "| three (b)/\N{REPLACEMENT CHARACTER}[31m | 3 |",
    ]


def test_a_card_without_the_place_gets_it_at_its_end(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# Old\n")
    add_figures(checkpoint, {"one": "1"})
    text = (checkpoint / "README.md").read_text()
    assert text.startswith(f"# Old\n\n{BEGIN}\n")
    assert "| one | 1 |" in text


def test_other_folders_are_left_alone(checkpoint: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert add_figures(checkpoint, {}) is None
    assert add_figures(tiny_llama, {"one": "1"}) is None
    assert add_figures(tmp_path / "nowhere", {"one": "1"}) is None
    (checkpoint / "README.md").unlink()
    assert add_figures(checkpoint, {"one": "1"}) is None
    (checkpoint / "README.md").write_bytes(b"\xff")
    assert add_figures(checkpoint, {"one": "1"}) is None
    edit_json(checkpoint / "config.json", lambda config: config.pop("quantization_config"))
    (checkpoint / "README.md").write_text("# Old\n")
    assert add_figures(checkpoint, {"one": "1"}) is None
    assert (checkpoint / "README.md").read_text() == "# Old\n"


def test_what_is_written_of_an_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "held out.txt"
    text.write_text("x")
    result: dict[str, Any] = {
        "engine": "hf",
        "dtype": "float32",
        "reference": str(tmp_path),
        "chunks": 4,
        "seq_len": 64,
        "kl_mean": 0.0104,
        "kl_mean_se": 0.0004,
        "delta_nll": 0.015,
        "delta_nll_se": None,
        "top1": 0.943,
        "nll": 2.0,
        "chat": {"prompts": 3, "kl": 0.5, "kl_se": 0.25, "delta_nll": 0.0, "top1": 1.0},
    }
    rows = eval_rows(result, text, Path("prompts.jsonl"))
    assert rows == {
        f"text held out.txt, 4 x 64 tokens, against {tmp_path.name} (hf, float32)": (
            "KL 0.0104 ± 0.0004, delta NLL 0.0150, top-1 0.9430"
        ),
        f"answers to prompts.jsonl, 3 prompts, against {tmp_path.name} (hf, float32)": (
            "KL 0.5000 ± 0.2500, delta NLL 0.0000, top-1 1.0000"
        ),
    }
    assert not any(str(tmp_path.parent) in row for row in rows)
    console = Console(record=True, width=200)
    note_in_card(console, str(checkpoint), rows)
    assert "0.0104 ± 0.0004" in (checkpoint / "README.md").read_text()
    assert "the figures are in" in console.export_text()


def test_what_is_written_of_tasks() -> None:
    estimate = SimpleNamespace(value=0.5, se=0.05)
    original = SimpleNamespace(value=0.625, se=None)
    score = SimpleNamespace(n=8, variant=estimate, reference=original)
    task = SimpleNamespace(task="facts", metric="acc", score=score)
    analysis: Any = SimpleNamespace(
        report=SimpleNamespace(
            settings=SimpleNamespace(engine="vllm"), models=[SimpleNamespace(model="org/name")]
        ),
        variants=[
            SimpleNamespace(label="other", tasks=()),
            SimpleNamespace(label="svsk", tasks=(task,)),
        ],
    )
    assert bench_rows(analysis, "svsk") == {
        "task facts, 8 items, against org/name (vllm)": ("acc 0.5000 ± 0.0500, the original 0.6250")
    }


def test_names_are_shown_without_folders(tmp_path: Path) -> None:
    assert shown_name("org/name") == "org/name"
    assert shown_name(str(tmp_path)) == tmp_path.name
    assert shown_name("/a/b/c") == "c"
