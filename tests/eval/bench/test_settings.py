# SPDX-License-Identifier: Apache-2.0
"""``svsk bench``: repeats that are sampled, chat templates, and whose answers are whose."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from svsk_eval.bench.fingerprint import (
    environment_settings,
    model_sources,
    source_files,
    source_hash,
    task_sources,
    text_sources,
)
from svsk_eval.bench.options import Candidate
from svsk_eval.bench.progress import Step
from svsk_eval.bench.repeats import mean_of_runs
from svsk_eval.bench.runner import bench, candidate
from svsk_eval.bench.work_folder import Surroundings
from svsk_eval.errors import EvalError
from svsk_eval.report.analysis import analyze
from svsk_kernels.errors import SvskError
from svsk_offline.storage.locks import LOCK_NAME, locked
from tests.eval.bench.test_runner import SETTINGS, options
from tests.eval.report.reports import task_run
from tests.support.tiny_models import write_dense

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
ONE = SETTINGS.model_copy(update={"tasks": ("mini_gen",), "limit": 3})

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("models") / "dense")


def test_sampled_repeats_and_the_same_model_twice(dense: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"tasks": ("mini_sampled",), "limit": 4})
    pair = [candidate(f"once={dense}"), candidate(f"twice={dense}")]
    report = bench(pair, settings, options(tmp_path, batch_size=3), lambda *_: None)
    journals = sorted(tmp_path.glob("*-answers-*/journal.jsonl"))
    assert (
        len(journals) == 2
    )  # a model against itself shows what chance does: its answers are drawn twice
    kept = [
        [json.loads(line)["answer"] for line in path.read_text().splitlines()] for path in journals
    ]
    assert {answer["text"] for answer in kept[0]} != {answer["text"] for answer in kept[1]}
    assert not {answer["seed"] for answer in kept[0]} & {answer["seed"] for answer in kept[1]}
    for run, answers in zip(report.models, kept, strict=True):
        task = run.tasks["mini_sampled"]
        assert len(answers) == 4 * 2
        assert len({answer["text"] for answer in answers}) > 4
        assert task.output_tokens is not None
        assert sum(task.output_tokens) * 2 == sum(answer["tokens"] for answer in answers)
        assert task.terminated is not None
        assert sum(task.terminated) * 2 == sum(answer["stopped"] for answer in answers)
    # The draws depend on the seed and the request, so the same run again is the same run.
    again = bench(pair[:1], settings, options(tmp_path / "again", batch_size=3), lambda *_: None)
    assert again.models[0].tasks == report.models[0].tasks


def test_several_answers_to_an_item(dense: Path, tmp_path: Path) -> None:
    drawn = {"do_sample": True, "temperature": 1.0}
    once = SETTINGS.model_copy(update={"limit": 4, "gen_kwargs": drawn})
    thrice = once.model_copy(update={"repeats": 3})
    model = [candidate(f"a={dense}")]
    single = bench(model, once, options(tmp_path), lambda *_: None).models[0]
    (journal,) = tmp_path.glob("a-answers-*/journal.jsonl")
    before = journal.read_text().splitlines()
    steps: list[Step] = []
    run = bench(model, thrice, options(tmp_path), lambda _, step: steps.append(step)).models[0]
    # The first answer to each item is the one there was, two more are drawn; choices are not asked
    # again.
    assert journal.read_text().splitlines()[: len(before)] == before
    answers = [json.loads(line)["answer"] for line in journal.read_text().splitlines()]
    texts = [answer for answer in answers if answer["kind"] == "generated"]
    assert len(answers) == len(before) + 2 * 4
    assert len({answer["text"] for answer in texts}) > 6
    assert None not in {answer["seed"] for answer in texts}
    last = [step for step in steps if step.what == "mini_gen"][-1]
    assert (last.done, last.known, last.kept, last.items) == (12, 12, 4, 4)
    generated, chosen = run.tasks["mini_gen"], run.tasks["mini_mc"]
    assert generated.repeats == 3
    assert chosen == single.tasks["mini_mc"]
    assert generated.output_tokens is not None
    assert sum(generated.output_tokens) * 3 == pytest.approx(sum(a["tokens"] for a in texts))
    assert generated.item_hashes == single.tasks["mini_gen"].item_hashes
    again = bench(model, thrice, options(tmp_path / "new"), lambda *_: None).models[0]
    assert [len(scores) for scores in again.tasks["mini_gen"].repeat_scores or ()] == [3] * 4


@pytest.mark.parametrize(
    ("task", "gen_kwargs", "message"),
    [
        ("mini_gen", {}, "the answers of mini_gen are greedy, .* --gen-kwargs do_sample=true"),
        ("mini_mc", {}, r"none of mini_mc generates answers\."),
        ("mini_gen", {"do_sample": True, "seed": 5}, "mini_gen draws with seed=5, .* Leave it out"),
        ("mini_sampled", {}, "mini_sampled draws 2 answers to an item by itself"),
    ],
)
def test_several_answers_that_make_no_sense(
    task: str, gen_kwargs: dict[str, object], message: str, dense: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(
        update={"tasks": (task,), "repeats": 4, "gen_kwargs": gen_kwargs}
    )
    with pytest.raises(EvalError, match=f"--repeats 4: {message}"):
        bench([candidate(str(dense))], settings, options(tmp_path), lambda *_: None)


def test_the_mean_of_several_answers() -> None:
    fields = {"item_hashes": ("x", "y"), "terminated": (1.0, 0.0), "output_tokens": (2.0, 9.0)}
    first = task_run((1.0, 0.0), **fields)
    second = task_run((0.0, 0.0), **(fields | {"output_tokens": (4.0, 9.0)}))
    mean = mean_of_runs([first, second])
    assert mean.scores == {"exact_match,none": (0.5, 0.0)}
    assert mean.repeat_scores == ((1.0, 0.0), (0.0, 0.0))
    assert (mean.output_tokens, mean.terminated) == ((3.0, 9.0), (1.0, 0.0))
    assert mean_of_runs([first]) == first
    chosen = task_run((1.0, 0.0))
    assert mean_of_runs([chosen, chosen]).output_tokens is None


def test_answers_belong_to_a_model_and_not_to_its_label(dense: Path, tmp_path: Path) -> None:
    bench([candidate(f"a={dense}")], ONE, options(tmp_path), lambda *_: None)
    (journal,) = tmp_path.glob("a-answers-*/journal.jsonl")
    before = journal.read_bytes()
    bench([candidate(f"b={dense}")], ONE, options(tmp_path), lambda *_: None)
    assert [path.parent.name[0] for path in tmp_path.glob("*/journal.jsonl")] == ["a"]
    assert journal.read_bytes() == before


def test_answers_of_another_machine_are_taken_on_purpose_only(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, here = [candidate(f"a={dense}")], Surroundings.here()
    own = bench(model, ONE, options(tmp_path / "copied"), lambda *_: None).models[0]
    (journal,) = tmp_path.glob("copied/*/journal.jsonl")
    before = journal.read_bytes()
    there = here.model_copy(update={"hardware": "1 x H100", "versions": {"vllm": "0.31"}})
    monkeypatch.setattr(Surroundings, "here", lambda: there)
    shutil.copytree(tmp_path / "copied", tmp_path / "merged")
    more = ONE.model_copy(update={"limit": 5})
    notes: list[str] = []

    def note(label: str, step: Step) -> None:
        notes.extend([f"{label}: {step.what}"] if step.what.startswith("note: ") else [])

    refused = bench(model, more, options(tmp_path / "copied"), note).models[0]
    assert len(notes) == 1
    assert (
        f"a: note: 3 answers in {journal.parent.name} were made with {here.hardware}, " in notes[0]
    )
    assert notes[0].endswith(", and are not used; --merge-answers takes them")
    assert refused.tasks["mini_gen"].elsewhere == {}
    assert journal.read_bytes() == before
    assert len(list(tmp_path.glob("copied/*/journal.jsonl"))) == 2

    notes.clear()
    merging = options(tmp_path / "merged", merge_answers=True)
    report = bench(model, more, merging, note)
    assert notes[0].endswith(", and are merged")
    merged = report.models[0].tasks["mini_gen"]
    (origin,) = merged.elsewhere
    assert origin == there_is_unlike(here, there)
    assert merged.elsewhere[origin] == 3
    assert report.models[0].generation is not None
    assert report.models[0].generation.tokens == sum((merged.output_tokens or ())[3:])
    assert merged.scores["exact_match,none"][:3] == own.tasks["mini_gen"].scores["exact_match,none"]
    assert f"Some answers were made with {origin}, and merged on purpose. (a, mini_gen: 3)" in (
        analyze(report).all_notes()
    )
    # what was merged once is in the journal, and stays what it is
    again = bench(model, ONE, options(tmp_path / "merged"), lambda *_: None).models[0]
    assert again.tasks["mini_gen"].elsewhere == {origin: 3}


def there_is_unlike(here: Surroundings, there: Surroundings) -> str:
    versions = [
        f"{name} {here.versions.get(name, 'absent')}"
        for name in sorted({*here.versions, "vllm"})
        if here.versions.get(name) != there.versions.get(name)
    ]
    return ", ".join([here.hardware, *versions])


def test_what_is_different_elsewhere() -> None:
    here = Surroundings(code="0" * 64, environment={}, hardware="2 cores", versions={"vllm": "1"})
    assert here.unlike(here) == ""
    there = here.model_copy(update={"code": "f" * 64, "environment": {"SVSK_KERNEL": "split"}})
    assert there.unlike(here) == (
        "SVSK_KERNEL split, another version of svsk-vllm's own code (ffffffff)"
    )
    assert here.unlike(there).startswith("SVSK_KERNEL absent, another version")
    assert here.unlike(here.model_copy(update={"hardware": "1 x H100"})) == "2 cores"


def test_chat_templates(dense: Path, tmp_path: Path) -> None:
    chat = ONE.model_copy(
        update={
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "system_instruction": "Be brief.",
        }
    )
    folders = [shutil.copytree(dense, tmp_path / name) for name in ("one", "same", "other")]
    for folder, template in zip(
        folders, (TEMPLATE, TEMPLATE, TEMPLATE.replace("[", "<")), strict=True
    ):
        (folder / "chat_template.jinja").write_text(template)
    one, same, other = (candidate(str(folder)) for folder in folders)
    report = bench([one, same], chat, options(tmp_path / "work"), lambda *_: None)
    plain = bench([one], ONE, options(tmp_path / "work"), lambda *_: None)
    hashes = [run.tasks["mini_gen"].item_hashes for run in (*report.models, *plain.models)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]
    with pytest.raises(EvalError, match=r"other.*chat template"):
        bench([one, other], chat, options(tmp_path / "work"), lambda *_: None)


def test_the_variable_of_lm_eval_is_no_consent(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one"}
    row |= {
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("SVSK_DATA", str(tmp_path))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    settings = SETTINGS.model_copy(update={"tasks": ("svsk_humaneval",)})
    with pytest.raises(
        EvalError, match=r"svsk_humaneval runs code .* add --confirm-run-unsafe-code"
    ):
        bench([candidate(str(dense))], settings, options(tmp_path / "work"), lambda *_: None)


def test_one_run_at_a_time(dense: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path / LOCK_NAME, tmp_path),
        pytest.raises(SvskError, match="another run is under way there"),
    ):
        bench([candidate(str(dense))], ONE, options(tmp_path), lambda *_: None)


def test_a_folder_may_have_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert candidate(str(folder)) == Candidate("lr=0.1", str(folder))
    assert candidate(f"x={folder}") == Candidate("x", str(folder))


def test_sources_and_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_hash([tmp_path])
    (tmp_path / "notes.txt").write_text("not a source")
    assert source_hash([tmp_path]) == first
    (tmp_path / "b.yaml").write_text("task: b\n")
    second = source_hash([tmp_path])
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len({first, second, source_hash([tmp_path])}) == 3
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    settings = environment_settings()
    assert settings["SVSK_KERNEL"] == "reference"
    assert "VLLM_LOGGING_LEVEL" not in settings


def test_what_only_shows_results_or_serves_developers_is_no_source() -> None:
    """A change there keeps the answers and scores of a run."""
    paths = [*model_sources(), *task_sources(None), *text_sources()]
    files = {path.as_posix() for _, path in source_files(paths)}
    assert all(Path(path).is_file() for path in paths if path.suffix)
    for part in ("report/", "speed/", "tune/", "svsk_kernel_tools/", "console.py", "make.py"):
        assert not [path for path in files if part in path]
    for part in (
        "svsk_kernels/naive.py",
        "svsk_vllm/format/packing.py",
        "task_data/code_tasks.py",
        "sandbox/child.py",
        "tasks/svsk_gsm8k.yaml",
        "tasks/data/facts.jsonl",
        "bench/worker.py",
        "bench/vllm_engine.py",
        "text/metrics.py",
    ):
        assert [path for path in files if path.endswith(part)], part


def test_other_task_files_are_other_scores(dense: Path, tmp_path: Path) -> None:
    tasks = shutil.copytree(options(tmp_path).include_path or Path(), tmp_path / "tasks")
    settings = ONE.model_copy(update={"tasks": ("mini_gen",)})
    here = replace(options(tmp_path / "work"), include_path=tasks)
    first = (
        bench([candidate(str(dense))], settings, here, lambda *_: None).models[0].tasks["mini_gen"]
    )
    journal = next((tmp_path / "work").glob("*/journal.jsonl")).read_bytes()
    # What the metric sees changes, the prompts do not: the answers stay, the scores are new.
    yaml = tasks / "mini_gen.yaml"
    yaml.write_text(
        yaml.read_text().replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{answer}}0"')
    )
    second = (
        bench([candidate(str(dense))], settings, here, lambda *_: None).models[0].tasks["mini_gen"]
    )
    assert next((tmp_path / "work").glob("*/journal.jsonl")).read_bytes() == journal
    assert second.item_hashes != first.item_hashes
