# SPDX-License-Identifier: Apache-2.0
"""``svsk bench`` and ``svsk compare`` as commands.

What they write, when they exit with 1, what they refuse.
"""

import io
import json
import sys
from pathlib import Path

import pytest
from lm_eval.models.utils import normalize_gen_kwargs
from rich.console import Console
from typer.testing import CliRunner, Result

from svsk_eval.bench import command
from svsk_eval.bench.command import bench_with_progress, settings_of, shown_command
from svsk_eval.bench.options import BenchOptions
from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.report.schema import BenchReport, BenchSettings, load_report
from svsk_eval.task_data import DATA_VARIABLE
from tests.eval.report.reports import model_run, report, task_run
from tests.eval.task_data.benchmark_files import write_files
from tests.support.tiny_models import write_dense, write_random_svsk

TASKS = Path(__file__).parent / "bench_tasks"


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_random_svsk(write_dense(folder / "dense"), folder / "svsk")
    (folder / "text.txt").write_text("the rate of stones in a tin is not here. " * 40)
    return folder


def run(folder: Path, *more: object, variant: str | None = None) -> Result:
    return svsk(
        "bench",
        variant or f"variant={folder / 'svsk'}",
        "--reference",
        folder / "dense",
        "--engine",
        "hf",
        "--dtype",
        "float32",
        "--model-arg",
        "device=cpu",
        "--include-path",
        TASKS,
        "--work-dir",
        folder / "work",
        *more,
    )


@pytest.mark.usefixtures("forked")
def test_a_run_and_its_files(folder: Path) -> None:
    files = {
        "--json": folder / "a.json",
        "--markdown": folder / "a.md",
        "--html": folder / "a.html",
    }
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
    assert (
        load_report(folder / "b.json").models[1].tasks["mini_mc"]
        == report.models[1].tasks["mini_mc"]
    )
    assert load_report(folder / "b.json").models[1].text == report.models[1].text

    merged = svsk("compare", folder / "a.json", folder / "a.json", "--json", folder / "c.json")
    assert merged.exit_code == 0, merged.output
    assert json.loads((folder / "c.json").read_text())["kind"] == "svsk-bench-comparison"
    refused = svsk("compare", folder / "a.json", folder / "b.json")
    assert refused.exit_code == 1
    assert "error:" in refused.output


@pytest.mark.usefixtures("forked")
def test_instructions_are_scored_by_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
    settings = ["--gen-kwargs", "max_gen_toks=4", "--json", tmp_path / "a.json"]
    result = run(folder, "--tasks", "svsk_ifeval", *settings)
    assert result.exit_code == 0, result.output
    task = load_report(tmp_path / "a.json").models[1].tasks["svsk_ifeval"]
    assert task.primary == "prompt_level_strict_acc,none"
    # Four tokens are fewer than 20 words, and fewer than three sentences.
    assert task.scores == {
        "prompt_level_strict_acc,none": (1.0, 0.0),
        "prompt_level_loose_acc,none": (1.0, 0.0),
    }
    assert task.output_tokens is not None
    assert task.terminated is not None


@pytest.mark.parametrize("option", ["--json", "--markdown", "--html"])
def test_files_that_cannot_be_written_are_told_first(tmp_path: Path, option: str) -> None:
    for path in (tmp_path, tmp_path / "absent" / "out"):
        result = svsk("compare", "none.json", "none.json", option, path)
        assert result.exit_code == 1
        assert "cannot be written" in result.output


@pytest.mark.usefixtures("forked")
def test_the_gate(folder: Path) -> None:
    # The tiny models' answers are never right: a reference that scores 0 cannot be recovered.
    result = run(folder, "--tasks", "mini_gen", "--limit", 6, "--min-recovery", 0.98)
    assert result.exit_code == 1
    assert "below the minimum: variant, mini_gen: cannot be judged" in " ".join(
        result.output.split()
    )
    gate = ("--tasks", "mini_mc", "--limit", 6, "--min-recovery", 1)
    same = run(folder, *gate, variant=f"copy={folder / 'dense'}")
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--tasks", " , "],
            "--tasks ' , ': expected names separated by commas, such as svsk_smoke",
        ),
        (["--limit", 0], "--limit 0: expected 1 or more"),
        (["--engine", "tpu"], "--engine tpu: expected one of these: vllm, hf"),
        (["--text-engine", "hf,tpu", "--text", "x"], "--text-engine tpu: expected vllm or hf"),
        (["--gen-kwargs", "oops"], "--gen-kwargs oops: expected KEY=VALUE,KEY=VALUE"),
        (["--text", "none.txt"], "--text none.txt: no such file. Name a plain text"),
        (["--min-recovery", 1.5], "--min-recovery 1.5: expected a share"),
        (["--min-recovery", 0.0], "--min-recovery 0.0: expected a share"),
        (["--min-recovery", "nan"], "--min-recovery nan: expected a share"),
        (["--system-instruction", "be brief"], "--system-instruction needs --apply-chat-template"),
        (["--model-arg", "oops"], "--model-arg oops: expected name=value"),
        (["--html", "nowhere/a.html"], "--html nowhere/a.html: cannot be written"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: cannot be written"),
        (["--markdown", TASKS], f"--markdown {TASKS}: cannot be written"),
        (
            ["--gen-kwargs", "temperature=0.6"],
            "--gen-kwargs temperature=0.6 with do_sample absent: expected",
        ),
    ],
)
def test_refused(folder: Path, more: list[object], message: str) -> None:
    result = run(folder, *more)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def settings(gen_kwargs: str) -> BenchSettings:
    return settings_of(
        "svsk_smoke",
        engine="hf",
        limit=None,
        seed=1,
        gen_kwargs=gen_kwargs,
        apply_chat_template=False,
        system_instruction=None,
        model_args={},
    )


def bench_options(work: Path) -> BenchOptions:
    return BenchOptions(
        work_dir=work,
        dtype="float32",
        include_path=None,
        batch_size=1,
        consent=False,
        text=None,
        command="svsk bench",
    )


@pytest.mark.parametrize("more", ["", ",do_sample=false", ",do_sample=1", ",do_sample=None"])
def test_a_temperature_without_effect_is_refused(more: str) -> None:
    with pytest.raises(EvalError, match=r"Add it: --gen-kwargs do_sample=true,temperature=0\.6$"):
        settings(f"temperature=0.6{more}")
    # Why: lm-eval puts these settings over the task's, and its greedy wins.
    assert normalize_gen_kwargs({"do_sample": False, "temperature": 0.6})["temperature"] == 0


@pytest.mark.parametrize("value", ["hot", "-1", "nan", "inf", "None", ""])
def test_a_temperature_that_is_none(value: str) -> None:
    with pytest.raises(
        EvalError, match=r"--gen-kwargs temperature=.*: expected a number of 0 or more"
    ):
        settings(f"do_sample=true,temperature={value}")


def test_generation_settings() -> None:
    assert settings("do_sample=true,temperature=0.6").gen_kwargs == {
        "do_sample": True,
        "temperature": 0.6,
    }
    assert settings("temperature=0,max_gen_toks=8").gen_kwargs == {
        "temperature": 0,
        "max_gen_toks": 8,
    }


def test_the_json_file_is_written_whatever_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        model_run(label, [task_run(scores, "a")], size_bytes=1)
        for label, scores in (("x", (1, 0)), ("y", (1,)))
    ]
    measured = report(models)

    def ran(*_: object) -> BenchReport:
        return measured

    monkeypatch.setattr(command, "bench", ran)
    options = bench_options(tmp_path)
    files = {"json_file": tmp_path / "a.json", "markdown": tmp_path / "a.md", "html": None}
    with pytest.raises(EvalError, match="y: task a: its items differ from those of x"):
        bench_with_progress(
            Console(file=io.StringIO()), [], measured.settings, options, min_recovery=None, **files
        )
    assert load_report(tmp_path / "a.json") == measured
    assert not (tmp_path / "a.md").exists()


def test_a_page_whose_packages_are_absent_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in ("html", "page"):
        monkeypatch.delitem(sys.modules, f"svsk_eval.report.{name}", raising=False)
    options = bench_options(tmp_path)
    files = {"json_file": None, "markdown": None, "html": tmp_path / "a.html"}
    with pytest.raises(EvalError, match="needs the package jinja2"):
        bench_with_progress(
            Console(file=io.StringIO()), [], settings(""), options, min_recovery=None, **files
        )


def test_the_shown_command_names_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "b").mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    (tmp_path / "text.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = {
        "models/b": "b",
        "./models/b/": "b",
        "~/models/b": "b",
        "v=models/b": "v=b",
        f"v={tmp_path}/models/b": "v=b",
        f"{tmp_path}/a=b": "a=b",
        "--reference=v=models/b": "--reference=v=b",
        f"--model-arg=tokenizer={tmp_path}/models/b": "--model-arg=tokenizer=b",
    }
    for argument, shown in cases.items():
        assert shown_command(["bench", argument]) == f"svsk bench {shown}"
    made = [
        "--json",
        "/x/r.json",
        "--html=../out/r.html",
        "--markdown",
        "./r.md",
        "--work-dir",
        "~/w",
        "--text",
        "/x/t",
    ]
    assert (
        shown_command([*made, "--reference", "v=/x/q", "--include-path", "."])
        == "svsk --json r.json --html=r.html --markdown r.md --work-dir w --text t --reference v=q"
        " --include-path ."
    )


def test_the_shown_command_keeps_what_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        (
            "bench Qwen/Qwen3-4B --reference Qwen/Qwen3-4B-Base --limit"
            " 3 --system-instruction /no_think"
        ),
        "bench --system-instruction=/no_think --tasks svsk_smoke,mmlu",
        "bench --system-instruction /usr/bin",  # words, even if there is such a folder
        "bench --system-instruction=/usr/bin",
        "bench v=/absent/model --gen-kwargs do_sample=true,temperature=0.6,top_p=.95",
        "bench --json out/r.json",
    ):
        assert shown_command(arguments.split()) == f"svsk {arguments}"
    text = "x/" * 4000  # longer than any path
    assert shown_command(["--prompt", text]) == f"svsk --prompt {text}"
