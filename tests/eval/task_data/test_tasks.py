# SPDX-License-Identifier: Apache-2.0
"""The task files: they load, they ask what lm-eval's own tasks ask, and lm-eval runs them."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import evaluate
import lm_eval.tasks
import pytest
import yaml
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from svsk_eval.errors import EvalError
from svsk_eval.task_data import DATA_VARIABLE, folder, task_manager, tasks_folder
from svsk_eval.task_data.documents import BENCHMARKS
from svsk_eval.task_data.instructions import check_instructions
from tests.eval.support import ROOT, load_task
from tests.eval.task_data.benchmark_files import IFEVAL, MBPP, hub_copies, use_hub, write_files
from tests.eval.task_data.stand_in import install_stand_in
from tests.support.tiny_models import write_dense, write_random_svsk

SOURCES = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "offline", "eval"))
THEIRS = Path(lm_eval.tasks.__file__).parent

GROUPS = {
    "svsk_code": ["svsk_humaneval", "svsk_mbpp"],
    "svsk_code_instruct": ["svsk_humaneval_instruct", "svsk_mbpp_instruct"],
    "svsk_reasoning": ["svsk_gsm8k", "svsk_arc_challenge", "svsk_hellaswag"],
    "svsk_smoke": [
        "svsk_smoke_facts",
        "svsk_smoke_python",
        "svsk_smoke_arithmetic",
        "svsk_smoke_copy",
    ],
}
GROUPED = [task for tasks in GROUPS.values() for task in tasks]
ALL = [*GROUPED, "svsk_ifeval"]
SAME_AS = {
    "svsk_humaneval": "humaneval/humaneval.yaml",
    "svsk_humaneval_instruct": "humaneval/humaneval_instruct.yaml",
    "svsk_mbpp": "mbpp/mbpp.yaml",
    "svsk_mbpp_instruct": "mbpp/mbpp_instruct.yaml",
    "svsk_gsm8k": "gsm8k/gsm8k.yaml",
    "svsk_arc_challenge": "arc/arc_challenge.yaml",
    "svsk_hellaswag": "hellaswag/hellaswag.yaml",
    "svsk_ifeval": "ifeval/ifeval.yaml",
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consent, and a sandbox for tests."""
    install_stand_in(monkeypatch)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval's own tasks load without a network.

    The hub's data is ours, their code metric is not fetched.
    """

    class NoMetric:
        def compute(self, **_: object) -> tuple[dict[str, float], None]:
            return {"pass@1": 0.0}, None

    monkeypatch.setattr(evaluate, "load", lambda name: NoMetric())
    copies = hub_copies()
    examples = _their_mbpp_examples()
    others = [row for row in MBPP if row["task_id"] in (1, 10)]
    copies["google-research-datasets/mbpp"]["prompt"] = Dataset.from_list(
        [others[0], *examples, others[1]]
    )
    use_hub(monkeypatch, copies)
    yield
    for name in [
        name
        for name in sys.modules
        if name.startswith("lm_eval.tasks.") and name.endswith(".utils")
    ]:
        del sys.modules[name]  # those that took their metric from the replaced evaluate


def _their_mbpp_examples() -> list[dict[str, Any]]:
    config = load_yaml(THEIRS / SAME_AS["svsk_mbpp"])
    samples = config["fewshot_config"]["samples"]()
    keys = MBPP[0].keys() - {"test_setup_code", "challenge_test_list"}
    return [
        {key: sample[key] for key in keys} | {"test_setup_code": "", "challenge_test_list": []}
        for sample in samples
    ]


def their_task(name: str) -> Any:
    """The task of lm-eval that ours stands for; its solved examples of GSM8K chosen as ours are."""
    if name == "svsk_ifeval":  # its file has NLTK download a model when it is loaded
        check_instructions({**IFEVAL[0]}, [""])
    config = load_yaml(THEIRS / SAME_AS[name])
    for key in ("tag", "dataset_kwargs"):
        config.pop(key, None)
    if name == "svsk_gsm8k":
        config["fewshot_config"] = {"sampler": "first_n"}
    return ConfigurableTask(config=config)


def requests(task: Any, *, chat: bool) -> list[list[tuple[Any, ...]]]:
    """All that the task sends to a model, per document.

    In a chat the template only marks who speaks.
    """

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        shown = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return shown + "<assistant>" * add_generation_prompt

    kwargs = (
        {"apply_chat_template": True, "chat_template": template, "fewshot_as_multiturn": True}
        if chat
        else {}
    )
    task.build_all_requests(rank=0, world_size=1, **kwargs)
    by_document: dict[int, list[tuple[Any, ...]]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance.arguments)
    return list(by_document.values())


class TestFiles:
    def test_groups_hold_their_tasks(self) -> None:
        manager = task_manager(include_defaults=False)
        assert manager.all_groups == sorted(GROUPS)
        assert manager.all_subtasks == sorted(ALL)
        for group, tasks in GROUPS.items():
            assert (
                yaml.safe_load((tasks_folder() / f"{group}.yaml").read_text(encoding="utf-8"))[
                    "task"
                ]
                == tasks
            )

    @pytest.mark.parametrize("group", GROUPS)
    def test_groups_load_beside_lm_evals_own_tasks(self, group: str, theirs: None) -> None:
        loaded = task_manager(include_defaults=False).load(group)
        assert list(loaded["tasks"]) == GROUPS[group]
        assert loaded["group_map"] == {group: GROUPS[group]}

    @pytest.mark.parametrize("name", ALL)
    def test_tasks_say_their_version_and_end(self, name: str, theirs: None) -> None:
        task = load_task(name)
        assert len(task.eval_docs) > 1
        assert task.VERSION == 1.0
        assert task.config.metadata["primary"].count(",") == 1
        if task.OUTPUT_TYPE == "generate_until":
            assert task.config.generation_kwargs["max_gen_toks"] > 0
            assert "until" in task.config.generation_kwargs
            assert task.config.generation_kwargs["do_sample"] is False
        assert task.config.unsafe_code is ("humaneval" in name or "mbpp" in name)

    def test_name_the_hubs_data_that_is_loaded(self) -> None:
        for name, benchmark in BENCHMARKS.items():
            config = load_yaml(tasks_folder() / f"svsk_{name}.yaml", resolve_func=False)
            names = (config["dataset_path"], config.get("dataset_name"))
            assert tuple(filter(None, names)) == benchmark.hub
            assert config["dataset_kwargs"] == {"benchmark": name}

    def test_importing_them_is_cheap(self) -> None:
        script = (
            "import sys, svsk_eval.task_data.code_tasks;"
            " print([m for m in ('datasets', 'torch', 'lm_eval') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": SOURCES},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[]"


class TestSameAsLmEval:
    @pytest.mark.parametrize("chat", [False, True])
    @pytest.mark.parametrize("name", SAME_AS)
    def test_prompts(self, name: str, chat: bool, theirs: None) -> None:
        ours, other = load_task(name), their_task(name)
        assert ours.config.num_fewshot == (other.config.num_fewshot or 0)
        prompts, expected = requests(ours, chat=chat), requests(other, chat=chat)
        assert len(prompts) > 1
        for mine, original in zip(prompts, expected, strict=True):
            if ours.OUTPUT_TYPE == "generate_until":
                assert mine[0][0] == original[0][0]
                assert mine[0][1]["until"] == original[0][1]["until"]
            else:
                assert mine == original

    @pytest.mark.parametrize("name", ["svsk_gsm8k", "svsk_arc_challenge", "svsk_hellaswag"])
    def test_metrics(self, name: str, theirs: None) -> None:
        ours, other = load_task(name).config, their_task(name).config
        assert (ours.metric_list, ours.filter_list) == (other.metric_list, other.filter_list)

    @pytest.mark.parametrize("name", SAME_AS)
    def test_local_files_give_the_prompts_of_the_hub(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_hub(monkeypatch, hub_copies())
        from_hub = requests(load_task(name), chat=False)
        monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
        assert requests(load_task(name), chat=False) == from_hub

    def test_few_shot_arc_takes_its_examples_from_the_training_split(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies = hub_copies()
        train = Dataset.from_list(
            [
                {**row, "question": f"Train {row['question']}"}
                for row in copies["allenai/ai2_arc"]["train"]
            ]
        )
        copies["allenai/ai2_arc"] = DatasetDict({**copies["allenai/ai2_arc"], "train": train})
        use_hub(monkeypatch, copies)
        task = load_task("svsk_arc_challenge")
        task.set_config(key="num_fewshot", value=1)
        task.set_fewshot_seed(0)
        assert all(
            text.startswith("Question: Train ") for ((text, _), *_) in requests(task, chat=False)
        )


def responses(task: Any, doc: dict[str, Any], *texts: str) -> dict[str, float]:
    """Score answers to a document through the task's filters and metrics.

    ``metric,filter`` to value.
    """
    instance = Instance(
        "generate_until", doc=doc, arguments=("", {}), idx=0, metadata=("task", 0, 1)
    )
    instance.resps = list(texts)
    scores = {}
    for ensemble in task._filters:
        ensemble.apply([instance])
        for metric, value in task.process_results(
            doc, [instance.filtered_resps[ensemble.name]]
        ).items():
            scores[f"{metric},{ensemble.name}"] = float(value)
    return scores


@pytest.mark.parametrize(
    ("gold", "answer", "strict", "flexible"),
    [
        ("1,234", "1200 and 34 is 1234.\n#### 1,234", 1, 1),
        ("1234", "In all $1,234.", 0, 1),
        ("18", "#### $18.00", 0, 0),  # lm-eval compares text: 18.00 is not 18
        ("18", "So she has $18.", 0, 1),
        ("-5", "#### -5", 1, 1),
        ("5", "#### -5", 0, 0),
        (
            "72",
            "#### 72\n\nQ 3",
            1,
            0,
        ),  # strict takes the first marked number, flexible the last of all
        ("72", "I do not know.", 0, 0),
        ("72", "", 0, 0),
        ("0.5", "It is 0.5", 0, 1),
        ("7", "7", 0, 1),
    ],
)
def test_gsm8k_reads_answers_as_lm_eval_does(
    gold: str, answer: str, strict: int, flexible: int, theirs: None
) -> None:
    doc = {"question": "How many?", "answer": f"Some steps.\n#### {gold}"}
    expected = {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}
    assert responses(load_task("svsk_gsm8k"), doc, answer) == expected
    assert responses(their_task("svsk_gsm8k"), doc, answer) == expected


@pytest.mark.parametrize("group", GROUPS)
def test_lm_eval_runs_the_group_and_reports_the_primary_metrics(group: str, theirs: None) -> None:
    results = simple_evaluate(
        model="dummy",
        tasks=[group],
        task_manager=task_manager(include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    assert results is not None
    for name in GROUPS[group]:
        primary = results["configs"][name]["metadata"]["primary"]
        assert 0 <= results["results"][name][primary] <= 1
        metric = primary.partition(",")[0]
        assert results["higher_is_better"][name][metric] is True
        assert all(sample[metric] in (0, 1) for sample in results["samples"][name])
    listed = yaml.safe_load((tasks_folder() / f"{group}.yaml").read_text(encoding="utf-8"))[
        "aggregate_metric_list"
    ]
    assert all(
        f"{each['metric']},{each['filter_list'][0]}" in results["results"][group] for each in listed
    )


class TestFolder:
    def test_is_beside_the_source_in_a_checkout(self) -> None:
        assert tasks_folder() == ROOT / "eval" / "tasks"

    def test_of_a_wheel_is_where_the_installer_put_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = tmp_path / "lib" / "site-packages"
        module = site / "svsk_eval" / "task_data" / "folder.py"
        shared = tmp_path / "share" / "svsk_vllm" / "tasks"
        monkeypatch.setattr(folder, "__file__", str(module))
        recorded = [
            PurePosixPath("svsk_eval/x.py"),
            PurePosixPath("../../share/svsk_vllm/tasks/svsk_smoke.yaml"),
        ]

        class Recorded(PurePosixPath):
            def locate(self) -> Path:
                return site / self

        monkeypatch.setattr(metadata, "files", lambda name: [Recorded(path) for path in recorded])
        with pytest.raises(
            EvalError, match=r"task files are in none of .*site-packages.*share/svsk_vllm/tasks"
        ):
            tasks_folder()
        shared.mkdir(parents=True)
        (shared / "svsk_smoke.yaml").touch()
        assert tasks_folder() == shared

    def test_every_file_is_shipped(self) -> None:
        shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
            "setuptools"
        ]["data-files"]
        patterns = {
            path
            for patterns in shipped.values()
            for pattern in patterns
            for path in ROOT.glob(pattern)
        }
        files = [
            path
            for path in (ROOT / "eval" / "tasks").rglob("*")
            if path.suffix in (".yaml", ".py", ".jsonl")
        ]
        assert {path for path in files if path.name != "make.py"} == patterns
        for target, patterns in shipped.items():
            part = target.removeprefix("share/svsk_vllm/tasks").strip("/")
            assert all(Path(pattern).parent == Path("eval/tasks") / part for pattern in patterns)


def test_the_hf_wrapper_runs_a_checkpoint_in_lm_evals_own_command_line(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", seed=0)
    write_random_svsk(tmp_path / "dense", tmp_path / "svsk")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "svsk_eval.lm_eval_hf",
            "run",
            "--model",
            "hf",
            "--device",
            "cpu",
            "--limit",
            "2",
            "--model_args",
            f"pretrained={tmp_path / 'svsk'},dtype=float32",
            "--tasks",
            "svsk_smoke_facts",
            "--include_path",
            str(tasks_folder()),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": SOURCES},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|svsk_smoke_facts|" in done.stdout
