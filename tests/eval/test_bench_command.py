# SPDX-License-Identifier: Apache-2.0
"""``svsk bench`` and ``svsk compare`` as commands: what they write, when they exit with 1, what they refuse."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svsk_eval.bench.command import shown_command
from svsk_eval.bench.schema import load_report
from svsk_offline.cli import app
from tests.support.tiny_models import write_dense, write_random_svsk

TASKS = Path(__file__).parent / "bench_tasks"


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_random_svsk(write_dense(folder / "dense"), folder / "svsk")
    (folder / "text.txt").write_text("the rate of stones in a tin is not here. " * 40)
    return folder


def run(folder: Path, *more: object) -> Result:
    return svsk(
        "bench", f"variant={folder / 'svsk'}", "--reference", folder / "dense", "--engine", "hf", "--dtype", "float32",
        "--model-arg", "device=cpu", "--include-path", TASKS, "--work-dir", folder / "work", *more,
    )  # fmt: skip


def test_a_run_and_its_files(folder: Path) -> None:
    files = {"--json": folder / "a.json", "--markdown": folder / "a.md", "--html": folder / "a.html"}
    written = [part for option in files.items() for part in option]
    text = ["--text", folder / "text.txt", "--chunks", 3, "--seq-len", 64]
    result = run(folder, "--tasks", "mini_mc,mini_gen", "--limit", 6, *text, *written)
    assert result.exit_code == 0, result.output
    report = load_report(folder / "a.json")
    assert [run.label for run in report.models] == ["dense", "variant"]
    assert report.settings.limit == 6
    assert [len(task.doc_ids) for task in report.models[1].tasks.values()] == [6, 6]
    dense, variant = (run.text[0] for run in report.models)
    assert dense.kl_mean is None
    assert variant.kl_mean is not None
    assert variant.kl_mean > 0
    assert variant.delta_nll == pytest.approx(variant.nll - dense.nll, abs=1e-4)
    assert (dense.tokens, dense.chunks, dense.seq_len, dense.engine) == (3 * 63, 3, 64, "hf")
    for name in ("a.md", "a.html"):
        page = (folder / name).read_text()
        assert all(word in page for word in ("variant", "mini_mc", "mini_gen"))
    assert "mini_mc" in result.output

    again = run(folder, "--tasks", "mini_mc", "--limit", 6, "--json", folder / "b.json", *text)
    assert again.exit_code == 0, again.output
    assert load_report(folder / "b.json").models[1].tasks["mini_mc"] == report.models[1].tasks["mini_mc"]
    assert load_report(folder / "b.json").models[1].text == report.models[1].text

    merged = svsk("compare", folder / "a.json", folder / "a.json", "--json", folder / "c.json")
    assert merged.exit_code == 0, merged.output
    assert json.loads((folder / "c.json").read_text())["kind"] == "svsk-bench-comparison"
    refused = svsk("compare", folder / "a.json", folder / "b.json")
    assert refused.exit_code == 1
    assert "error:" in refused.output


def test_the_gate(folder: Path) -> None:
    # The tiny models' answers are never right: a reference that scores 0 cannot be recovered.
    result = run(folder, "--tasks", "mini_gen", "--limit", 6, "--min-recovery", 0.98)
    assert result.exit_code == 1
    assert "below the minimum: variant, mini_gen: cannot be judged" in " ".join(result.output.split())
    same = svsk(
        "bench", f"copy={folder / 'dense'}", "--reference", folder / "dense", "--engine", "hf", "--dtype", "float32",
        "--model-arg", "device=cpu", "--include-path", TASKS, "--work-dir", folder / "work", "--tasks", "mini_mc",
        "--limit", 6, "--min-recovery", 1,
    )  # fmt: skip
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", " , "], "--tasks ' , ': expected names"),
        (["--limit", 0], "--limit 0: expected 1 or more"),
        (["--engine", "tpu"], "--engine tpu: expected vllm or hf"),
        (["--text-engine", "hf,tpu", "--text", "x"], "--text-engine tpu: expected vllm or hf"),
        (["--text", "none.txt"], "--text none.txt: no such file"),
        (["--min-recovery", 1.5], "--min-recovery 1.5: expected a share"),
        (["--system-instruction", "be brief"], "--system-instruction needs --apply-chat-template"),
        (["--model-arg", "oops"], "--model-arg oops: expected name=value"),
        (["--html", "nowhere/a.html"], "--html nowhere/a.html: cannot be written"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json"),
    ],
)
def test_refused(folder: Path, more: list[object], message: str) -> None:
    result = run(folder, *more)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_the_shown_command_names_no_folders() -> None:
    assert shown_command(["bench", "a=/x/y/b", "/x/z", "Qwen/Qwen3-4B", "--json=../out/r.json", "--limit", "3"]) == (
        "svsk bench a=b z Qwen/Qwen3-4B --json=r.json --limit 3"
    )
