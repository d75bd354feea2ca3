# SPDX-License-Identifier: Apache-2.0
"""Models for the comparison of throughput, and what is reported.

Running vLLM is left to the benchmark itself.
"""

import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

import svsk_eval.speed.throughput as throughput
import svsk_eval.speed.throughput_labels as throughput_labels
from svsk_eval.errors import EvalError
from svsk_eval.speed.throughput import Speeds, measure, speeds_of, table_rows
from svsk_eval.speed.throughput_labels import Served, read_models
from svsk_eval.speed.throughput_server import Load, Server, serve
from tests.support.tiny_models import scheme, write_dense, write_random_svsk

LOAD = Load(input_len=16, tokens=10, batches=(1, 8), repeats=2)
PER_TOKEN = {"a": 0.5, "b": 0.25}


class Fake:
    """A server that takes 5 s for prompts and the model's time per token; keeps its requests."""

    asked: ClassVar[list[tuple[str, int, int]]] = []
    events: ClassVar[list[str]] = []

    def __init__(
        self, model: Path, load: Load, environment: Mapping[str, str], engine: Mapping[str, Any]
    ) -> None:
        self.name = model.name
        self.events.append(f"start {self.name} {environment['SVSK_KERNEL']} {dict(engine)}")

    def seconds(self, batch: int, tokens: int) -> float:
        self.asked.append((self.name, batch, tokens))
        return 5.0 + (tokens - 1) * PER_TOKEN[self.name]

    def close(self) -> None:
        self.events.append(f"stop {self.name}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(throughput, "Server", Fake)
    Fake.asked.clear()
    Fake.events.clear()
    return Fake


def served(**folders: str) -> dict[str, Served]:
    return {
        label: Served(Path(folder), {"SVSK_KERNEL": "fused"}) for label, folder in folders.items()
    }


def test_models_are_asked_in_turn_and_the_prompt_is_taken_off(fake: type[Fake]) -> None:
    speeds = measure(served(x="a", y="b"), LOAD)
    assert {label: {b: s.decode for b, s in rows.items()} for label, rows in speeds.items()} == {
        "x": {1: 2.0, 8: 16.0},
        "y": {1: 4.0, 8: 32.0},
    }
    assert speeds["x"][8].output == 8 * 11 / 10.0
    assert fake.asked[:4] == [("a", 1, 1), ("a", 1, 11), ("b", 1, 1), ("b", 1, 11)]
    assert len(fake.asked) == 2 * 2 * 2 * 3
    assert table_rows(speeds, LOAD, "decode") == [
        ["x", "2 (0.50x)", "16 (0.50x)"],
        ["y", "4 (1.00x)", "32 (1.00x)"],
    ]


def test_one_at_a_time_ends_a_process_before_the_next(fake: type[Fake]) -> None:
    done: list[str] = []
    speeds = measure(
        served(x="a", y="b"), LOAD, one_at_a_time=True, engine={"seed": 1}, done=done.append
    )
    assert [event.split()[:2] for event in fake.events] == [
        ["start", "a"],
        ["stop", "a"],
        ["start", "b"],
        ["stop", "b"],
    ]
    assert fake.events[0] == "start a fused {'seed': 1}"
    assert speeds["y"][1].decode == 4.0
    assert done == ["x", "y"]


def test_models_share_a_gpu(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_on_gpu", lambda: True)
    measure(served(x="a", y="b"), LOAD)
    assert fake.events[0] == "start a fused {'gpu_memory_utilization': 0.45}"
    fake.events.clear()
    measure(served(x="a", y="b"), LOAD, one_at_a_time=True)
    assert fake.events[0] == "start a fused {'gpu_memory_utilization': 0.9}"
    fake.events.clear()
    measure(served(x="a"), LOAD, engine={"gpu_memory_utilization": 0.3})
    assert fake.events[0] == "start a fused {'gpu_memory_utilization': 0.3}"
    with pytest.raises(
        EvalError, match="--engine-arg max_model_len: it follows from the other arguments"
    ):
        measure(served(x="a"), LOAD, engine={"max_model_len": 3})


def test_time_that_does_not_grow_with_tokens_is_an_error() -> None:
    assert speeds_of([1.0, 2.0, 1.0], [3.0, 4.0, 9.0], 4, LOAD) == Speeds(decode=20.0, output=11.0)
    with pytest.raises(EvalError, match=r"batch 4: 10 more tokens took -0\.5000 s more"):
        speeds_of([1.5], [1.0], 4, LOAD)


def test_decoding_is_measured_from_where_all_prompts_are_read(fake: type[Fake]) -> None:
    """16 requests of 64 tokens take 4 steps of 256: the shorter measurement has 4 tokens."""
    load = Load(input_len=64, tokens=20, batches=(1, 16), repeats=1, step_tokens=256)
    speeds = measure(served(x="a"), load)
    assert fake.asked == [("a", 1, 1), ("a", 1, 21)] * 2 + [("a", 16, 4), ("a", 16, 21)] * 2
    assert speeds["x"][16].decode == pytest.approx(16 / 0.5)
    with pytest.raises(
        EvalError, match=r"batch 64: 64 prompt tokens each take 16 steps of 256.*--tokens to 32"
    ):
        measure(served(x="a"), Load(64, 20, (64,), 1, 256))


def test_nothing_left_to_measure(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_on_gpu", lambda: True)
    speeds = {"x": {1: Speeds(1.0, 1.0)}}
    assert measure(served(x="a"), LOAD, speeds=speeds) is speeds
    assert not fake.events


def test_a_model_that_fails_leaves_the_others(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PER_TOKEN, "a", -1.0)
    speeds: dict[str, dict[int, Speeds]] = {}
    with pytest.raises(EvalError, match="x, batch 1: 10 more tokens"):
        measure(served(x="a", y="b"), LOAD, speeds=speeds)
    assert list(speeds) == ["y"]


def folders(tmp_path: Path) -> tuple[str, str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_a_run_goes_on_where_it_was_cut_off(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "COLUMNS", "1000"
    )  # wherever rich wraps, paths of any length are on one line
    a, b = folders(tmp_path)
    options = ["run", f"x@bfloat16={a}", f"y={b}", "--resume", "--one-at-a-time"]
    options += ["--tokens", "10", "--batches", "1,8"]
    options += ["--json", str(tmp_path / "f.json"), "--markdown", str(tmp_path / "f.md")]
    monkeypatch.setitem(PER_TOKEN, "b", -1.0)
    first = CliRunner().invoke(throughput.app, options)
    assert first.exit_code == 1
    assert "Raise --tokens" in first.output
    asked = {"max_num_batched_tokens": 512, "dtype": "bfloat16"}
    assert fake.events[0] == f"start a fused {asked}"
    monkeypatch.setitem(PER_TOKEN, "b", 0.25)
    fake.events.clear()
    second = CliRunner().invoke(throughput.app, options)
    assert second.exit_code == 0, second.output
    assert [event.split()[1] for event in fake.events] == ["b", "b"]
    assert "| x@bfloat16 | 2 (0.50x) | 16 (0.50x) |" in (tmp_path / "f.md").read_text()
    for more in (["--input-len", "17"], ["--engine-arg", "seed=2"]):
        changed = CliRunner().invoke(throughput.app, [*options, *more])
        assert changed.exit_code == 1
        assert "is asked for. Give the same, or another --json." in changed.output
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "MacheteLinearKernel")
    assert CliRunner().invoke(throughput.app, options).exit_code == 1


@pytest.mark.parametrize(
    ("options", "step"),
    [(["--input-len", "100"], 3200), (["--input-len", "512"], 8192), (["--tokens", "600"], 617)],
)
def test_a_step_is_as_long_as_the_prompts_need(
    fake: type[Fake], tmp_path: Path, options: list[str], step: int
) -> None:
    a, _ = folders(tmp_path)
    done = CliRunner().invoke(throughput.app, ["run", f"x={a}", *options])
    assert done.exit_code == 0, done.output
    assert fake.events[0] == f"start a fused {{'max_num_batched_tokens': {step}}}"


def test_labels_say_how_a_checkpoint_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or the kernels would be compiled here.
    monkeypatch.setattr(throughput_labels, "fused_obstacle", lambda checkpoint: None)
    schemes = {"default": scheme("Linear", rank=2)}
    dense = write_dense(tmp_path / "dense", "llama")
    checkpoint = write_random_svsk(dense, tmp_path / "svsk", schemes=schemes)
    labels = ("x", "x@int8", "x@int8@float32", "x@w4a16@bfloat16")
    models = read_models([f"{label}={checkpoint}" for label in labels], tmp_path)
    exact = {"SVSK_KERNEL": "fused", "SVSK_ACTIVATIONS": "exact"}
    int8 = exact | {"SVSK_ACTIVATIONS": "int8"}
    assert models["x"] == Served(checkpoint, exact)
    assert models["x@int8"] == Served(checkpoint, int8)
    assert models["x@int8@float32"] == Served(checkpoint, int8, {"dtype": "float32"})
    exported = models["x@w4a16@bfloat16"]
    assert (exported.environment, exported.engine) == (
        {"SVSK_KERNEL": "fused"},
        {"dtype": "bfloat16"},
    )
    quantization = json.loads((exported.folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    with pytest.raises(typer.BadParameter, match="at most one dtype and one of"):
        read_models([f"x@int8@split={checkpoint}"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "expected LABEL=FOLDER"),
        (["x={a}", "x={b}"], "given twice"),
        (["x={a}/nothing"], "holds no config.json"),
        (["x={a}", "--resume"], "--resume needs --json"),
        (["x@int4={a}"], "@int4 is none of @w4a16, @split, @int8, @float32"),
        (["x@int8={a}"], "@int8 is for SVSK folders, this is none"),
        (["x@float32@bfloat16={a}"], "expected at most one dtype and one of"),
    ],
)
def test_wrong_arguments(
    fake: type[Fake], tmp_path: Path, arguments: list[str], message: str
) -> None:
    a, b = folders(tmp_path)
    done = CliRunner().invoke(
        throughput.app, ["run", *(text.format(a=a, b=b) for text in arguments)]
    )
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not fake.events


def test_a_process_that_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="model: the vLLM process ended, see its output above"):
        Server(tmp_path / "model", LOAD, {"PYTHONHOME": str(tmp_path / "no-python")}, {})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            2,
            "dense: 3 requests of 16 tokens need room for 48 tokens in the cache, it has 32. Give",
        ),
        (3, "dense: a request ended before its 4 tokens"),
    ],
)
def test_what_would_not_be_the_speed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, message: str
) -> None:
    """A vLLM whose cache is too small, or whose requests end early."""

    class LLM:
        def __init__(self, **_: Any) -> None:
            cache = SimpleNamespace(num_gpu_blocks=blocks, block_size=16)
            config = SimpleNamespace(cache_config=cache)
            self.llm_engine = SimpleNamespace(vllm_config=config)

        def generate(self, prompts: list[Any], *_: Any, **__: Any) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])]) for _ in prompts]

    platform = SimpleNamespace(is_cpu=lambda: False)
    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 4\n"))
    dense = write_dense(tmp_path / "dense")
    engine = {"model": str(dense), "max_num_seqs": 3, "max_model_len": 16}
    read, write = os.pipe()
    try:
        with pytest.raises(EvalError, match=message):
            serve(json.dumps({"engine": engine, "input_len": 8}), write)
    finally:
        os.close(read)
        if blocks == 2:  # it was not opened as a file
            os.close(write)
