# SPDX-License-Identifier: Apache-2.0
"""The benchmark without a GPU.

Its checks in the interpreter, its arithmetic, timing and tuning with a fake timer.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from svsk_kernel_tools.bench import cases, correctness, runner, split, tune
from svsk_kernel_tools.bench.__main__ import app
from svsk_kernel_tools.bench.cases import Case, cases_for, checked_choices, forced_choice
from svsk_kernel_tools.bench.correctness import check_case, poisoned, relative_error
from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.grid import kernels_for
from svsk_kernel_tools.bench.layers import BenchLayer, Part, layer_of_shape, random_layer
from svsk_kernel_tools.bench.report import Report, markdown
from svsk_kernel_tools.bench.runner import FAILED, FINISHED, UNFINISHED, Bench, Settings
from svsk_kernel_tools.bench.shapes import (
    SHAPES,
    VARIANTS,
    Shape,
    Variant,
    bytes_dense,
    bytes_needed,
    find_shapes,
)
from svsk_kernel_tools.bench.split import SplitLayer
from svsk_kernel_tools.bench.timing import (
    Budget,
    Call,
    Sampler,
    Stats,
    copies_needed,
    launches_needed,
    measure,
)
from svsk_kernels.gpu.choice import Choice, Gpu, choice_for
from svsk_kernels.gpu.rule import heuristic_choices
from svsk_kernels.gpu.tuning import TuningTable, table_name
from svsk_kernels.naive import naive_matmul

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=90, processors=132)
MACHINE: dict[str, Any] = {"gpu": "none", "torch": "2", "triton": "3", "source": "0"}
TINY = Shape("tiny", 64, 128)
CPU = torch.device("cpu")


class FakeTimer:
    """Runs every call once, and makes up a time: later samplers are faster."""

    l2_bytes = 1000
    copy_gbs = 2000.0

    def __init__(self) -> None:
        self.made = 0

    def pool(self) -> Any:
        return None

    def sampler(self, calls: Sequence[Call], launches: int, pool: Any) -> Sampler:
        assert launches % len(calls) == 0
        for call in calls:
            call()
        self.made += 1
        us = 100.0 / self.made
        return lambda: us


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM for CPUs has no Marlin kernel, and takes long to import."""
    monkeypatch.setattr(runner, "vllm_missing", lambda: "not here")


def bench(
    report: Report, seconds: float | None = None, device: torch.device = CPU, **settings: Any
) -> Bench:
    """A run that says nothing."""
    return Bench(Settings(**settings), device, report, Budget(seconds), Console(quiet=True))


def test_bench_needs_few_libraries() -> None:
    modules = "runner, __main__, split, tune"
    code = (
        "import sys\nclass No:\n    def find_spec(self, name, *rest):\n        if"
        " name.split('.')[0] in ('vllm', 'compressed_tensors', 'transformers', 'accelerate',"
        " 'scipy'):\n            raise ImportError(name)\nsys.meta_path.insert(0, No())\nfrom"
        f" svsk_kernel_tools.bench import {modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_command_line_checks_in_the_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "out" / "bench.json"
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--json",
        str(file),
        "--markdown",
        str(tmp_path / "bench.md"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == FINISHED, result.output
    assert "need a GPU" in result.output
    written = json.loads(file.read_text())
    assert {record["group"] for record in written["records"]} == {
        f"check/{case.name}" for case in cases_for(True, True)
    }
    assert written["machine"]["triton"]
    assert "checks: 35 of 35 passed" in (tmp_path / "bench.md").read_text()
    assert CliRunner().invoke(app, ["--device", "tpu9", "--json", str(file)]).exit_code == 2
    assert (
        CliRunner()
        .invoke(app, ["--device", "cpu", "--shape", "nope", "--json", str(file)])
        .exit_code
        == 2
    )


def test_failed_checks_are_reported_and_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(self: BenchLayer, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], self.spec.n)

    monkeypatch.setattr(BenchLayer, "run", unwritten)
    report = Report(None, MACHINE)
    assert bench(report).check(cases_for(True, True)) == FAILED
    problems = [problem for record in report.of_kind("check") for problem in record["problems"]]
    assert len({record["group"] for record in report.of_kind("check")}) == len(
        cases_for(True, True)
    )
    assert any("were not written" in problem for problem in problems)
    assert "failed: " in markdown(report)


def test_what_a_check_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(BenchLayer, "run", broken)
    result = CliRunner().invoke(app, ["--device", "cpu", "--json", str(tmp_path / "bench.json")])
    assert result.exit_code == FAILED
    assert "RuntimeError: no such instruction" in result.output
    assert "need a GPU" not in result.output
    assert json.loads((tmp_path / "bench.json").read_text())["records"][0]["error"] is None


def test_wrong_results_and_moving_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("small", 128, (Part(16),), (2,), torch.float16)
    original, counter = BenchLayer.run, itertools.count()

    def moving(self: BenchLayer, *args: Any, **options: Any) -> torch.Tensor:
        return original(self, *args, **options) * (1 + 2e-3 * (next(counter) % 2))

    monkeypatch.setattr(BenchLayer, "run", moving)
    assert "repeated runs differ" in [p for found in check_case(case, CPU) for p in found.problems]
    monkeypatch.setattr(correctness, "BOUNDS", {torch.float16: 1e-9})
    assert all("relative error" in found.problems[0] for found in check_case(case, CPU))


def test_poison_reaches_new_tensors_and_ends() -> None:
    with poisoned():
        assert torch.ones(1).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_exhausted_budget_stops_before_the_next_step() -> None:
    ticks = iter([0.0, 5.0, 11.0])
    budget = Budget(10, lambda: next(ticks))
    assert (budget.spent, budget.spent) == (False, True)
    assert bench(Report(None, MACHINE), seconds=0).check(cases_for(True, True)) == UNFINISHED


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_bytes_are_those_of_the_tensors(variant: Variant) -> None:
    shape = Shape("whole tiles", 1024, 2048)
    layer = layer_of_shape(shape, variant, torch.bfloat16, CPU)
    linear = layer.linears[0]
    stored = linear.codes.numel() // 2 + linear.scale.nbytes
    if linear.u is not None and linear.v is not None and linear.gain is not None:
        stored += (linear.u.numel() + linear.v.numel()) * variant.bits // 8 + linear.gain.nbytes
    assert bytes_needed(shape, variant, 0) == stored
    assert (
        bytes_needed(shape, variant, 3) - stored
        == bytes_dense(shape, 3) - bytes_dense(shape, 0)
        == 3 * 3072 * 2
    )


def test_bytes_of_a_known_shape() -> None:
    """6144 x 2560: 8.36 MB of base and 0.79 MB of sidecar."""
    assert bytes_needed(SHAPES[0], VARIANTS[1], 0) == pytest.approx(8.36e6, rel=1e-3)
    assert bytes_needed(SHAPES[0], VARIANTS[0], 0) - bytes_needed(
        SHAPES[0], VARIANTS[1], 0
    ) == pytest.approx(0.79e6, rel=5e-3)


def test_find_shapes() -> None:
    assert find_shapes(None) == list(SHAPES)
    assert find_shapes(["qwen3-4b.o"]) == [SHAPES[1]]


@pytest.mark.parametrize("quick", [False, True])
def test_cases_on_a_gpu(quick: bool) -> None:
    found = cases_for(False, quick)
    assert len({case.name for case in found}) == len(found)
    assert set(cases._QUICK) <= {case.name for case in found}
    ran = [
        (case, m, choice)
        for case in found
        for m in case.tokens
        for choice in checked_choices(case, H100, m)
    ]
    assert {choice.kernel for *_, choice in ran} == {"decode", "gemm", "fold"}
    assert any(
        choice.split_k > 1 and choice.pdl and case.name == "tiles longer than a job"
        for case, _, choice in ran
    )
    assert {shape.n for shape in SHAPES[: 2 if quick else 8]} <= {case.n for case in found}


def test_forced_choice_fits_the_tokens() -> None:
    assert forced_choice("decode", H100, 6144, 2560, 64, 5).block_m == 16
    assert forced_choice("decode", H100, 6144, 2560, 64, 20).block_m in (32, 64)
    assert forced_choice("decode", H100, 6144, 2560, 64, 500).block_m == 128
    assert forced_choice("gemm", H100, 6144, 2560, 64, 1).kernel == "gemm"
    assert kernels_for(1, "decode") == ["decode"]
    assert kernels_for(128, "gemm") == ["gemm", "decode", "fold"]


def test_copies_leave_the_cache_and_launches_take_them_equally() -> None:
    copies = copies_needed(9 << 20, 50 << 20)
    assert copies * 9 > 100 >= (copies - 1) * 9
    assert copies_needed(1 << 30, 50 << 20) == 2
    launches = launches_needed(9 << 20, 1e8, copies)
    assert launches % copies == 0
    assert 300 < launches < 600
    assert launches_needed(1 << 30, 1e12, 2) == 2


def test_measure_takes_turns_and_leaves_the_first_rounds_out() -> None:
    order: list[str] = []
    values = {"a": itertools.count(), "b": itertools.count(100)}

    def sampler(name: str) -> Sampler:
        def sample() -> float:
            order.append(name)
            return float(next(values[name]))

        return sample

    found = measure({name: sampler(name) for name in "ab"}, 5)
    assert order == ["a", "b"] * 7
    assert found["a"] == Stats(4.0, 3.0, 5.0)
    assert found["b"].us == 104.0


def test_the_report_is_whole_after_every_step_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    report = Report(file, MACHINE)
    for number in range(3):
        report.add(
            [{"kind": "check", "group": f"check/{number}", "problems": ["bad"] * (number == 2)}]
        )
        assert len(json.loads(file.read_text())["records"]) == number + 1
    assert not list(tmp_path.glob("*.partial"))
    resumed = Report(file, MACHINE, resume=True)
    assert [resumed.has(f"check/{number}") for number in range(3)] == [True, True, False]
    assert not Report(file, MACHINE).records
    with pytest.raises(BenchError, match="triton was 3, expected 4"):
        Report(file, MACHINE | {"triton": "4"}, resume=True)
    file.write_text("{")
    with pytest.raises(BenchError, match="Invalid JSON"):
        Report(file, MACHINE, resume=True)


def test_timing_with_a_fake_timer(tmp_path: Path) -> None:
    report = Report(tmp_path / "bench.json", MACHINE)
    timer = FakeTimer()
    assert bench(report, tokens=(1, 16)).time_shapes([TINY], timer) == FINISHED
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    timed = [record for record in records if record["kind"] == "time"]
    assert {record["m"] for record in timed} == {1, 16}
    assert {record["variant"] for record in timed} == {
        "bf16",
        *(variant.label for variant in VARIANTS),
    }
    cublas = next(record for record in timed if record["kernel"] == "cublas" and record["m"] == 1)
    usual = next(record for record in timed if record["dispatched"] and record["m"] == 1)
    base = next(r for r in timed if r["dispatched"] and r["m"] == 1 and r["variant"] == "int4-r0")
    assert usual["over_cublas"] == pytest.approx(cublas["us"] / usual["us"])
    assert usual["sidecar_overhead"] == pytest.approx(usual["us"] / base["us"] - 1)
    assert usual["gbs"] == pytest.approx(usual["bytes"] / usual["us"] / 1000)
    assert usual["of_copy"] == pytest.approx(usual["gbs"] / 2000)
    made = timer.made
    assert bench(report, seconds=0, tokens=(1, 16)).time_shapes([TINY], timer) == FINISHED
    assert timer.made == made, "what is in the report is not timed again"
    text = markdown(report)
    assert "| tiny | 1 | **decode** | 50.00 (50.00-50.00) |" in text
    assert "split (vLLM's Marlin" in text


def test_what_fails_is_reported_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of | shared memory")

    report = Report(None, MACHINE)
    monkeypatch.setattr(BenchLayer, "run", broken)
    assert bench(report, tokens=(1,)).time_shapes([TINY], FakeTimer()) == FINISHED
    assert [record["kernel"] for record in report.of_kind("time") if "us" in record] == ["cublas"]
    assert "failed: RuntimeError: out of / shared memory" in markdown(report)


@pytest.mark.parametrize("m", [16, 64, 128, 1024, 4096])
def test_choices_tried_are_valid_and_contain_the_rule(m: int) -> None:
    for shape in SHAPES:
        tried = tune.trial_choices(H100, shape.n, shape.k, 64, m)
        assert len(set(tried)) == len(tried) <= 50
        rule = choice_for(heuristic_choices(H100, shape.n, shape.k, 64), m)
        assert replace(rule, max_m=None) in tried
        for choice in (
            *tried,
            *tune.refined([c for c in tried if c.kernel == "decode"][:2], shape.k, H100),
        ):
            TuningTable.from_json(json.dumps(table_of(shape, choice)))
    sm_100 = Gpu(name="B200", capability=100, processors=148)
    assert max(choice.block_m for choice in tune.trial_choices(sm_100, 6144, 2560, 64, 512)) == 64


def table_of(shape: Shape, choice: Choice) -> dict[str, Any]:
    entry = {"n": shape.n, "k": shape.k, "group_size": 64, "choices": [asdict(choice)]}
    return {"device": "x", "triton": "3", "entries": [entry]}


def test_refined_choices_split_otherwise() -> None:
    choice = heuristic_choices(H100, 2560, 4096, 64)[0]
    found = tune.refined([choice], 4096, H100)
    assert {c.split_k for c in found} >= {1, 2, 4, 8}
    assert {c.pdl for c in found} == {True, False}


def test_select_finds_the_crossover() -> None:
    one, two = Choice(kernel="decode", split_k=1), Choice(kernel="decode", split_k=2)
    wide = Choice(kernel="decode", split_k=2, block_m=32)
    gemm, fold = Choice(kernel="gemm", block_m=128), Choice(kernel="fold")
    found = tune.select(
        {
            16: {one: 1.0, two: 1.1},
            32: {wide: 1.0, two: 2.0},
            64: {gemm: 3.0, two: 9.0},
            256: {gemm: 5.0, fold: 6.0},
            512: {gemm: 9.0, fold: 8.0},
            None: {fold: 30.0},
        }
    )
    assert [(c.kernel, c.max_m, c.split_k) for c in found] == [
        ("decode", 16, 1),
        ("decode", 32, 2),
        ("gemm", 256, 1),
        ("fold", None, 1),
    ]
    assert tune.select({16: {one: 1.0}})[-1] == fold
    with pytest.raises(BenchError, match="Nothing could be timed"):
        tune.select({16: {}})


def test_tuning_writes_a_table_that_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BUCKETS", (16, None))
    monkeypatch.setattr(tune, "_LAST_TOKENS", 20)
    few = [Choice(kernel="decode", block_n=rows, step=32) for rows in (32, 64)]
    monkeypatch.setattr(tune, "trial_choices", lambda *_: [*few, Choice(kernel="fold")])
    report = Report(tmp_path / "bench.json", MACHINE)
    tuner = bench(report, configs=tmp_path / "configs")
    layers = {"half": torch.float16}
    original = runner.layer_of_shape
    monkeypatch.setattr(
        runner, "layer_of_shape", lambda s, v, _, d: original(s, v, layers["half"], d)
    )
    assert tuner.tune_shapes([TINY], FakeTimer()) == FINISHED
    other = Shape("other", 32, 128)
    assert tuner.tune_shapes([other], FakeTimer()) == FINISHED
    table = TuningTable.from_json((tmp_path / "configs" / table_name("interpreter")).read_text())
    assert [(entry.n, entry.k) for entry in table.entries] == [(64, 128), (32, 128)]
    assert table.device == "interpreter"
    assert table.entries[0].choices[-1].max_m is None
    assert any(record.get("chosen") for record in report.of_kind("tune"))
    assert "## Chosen" in markdown(report)


def test_choices_that_fail_or_are_wrong_are_left_out() -> None:
    layer = layer_of_shape(TINY, VARIANTS[0], torch.float16, CPU)
    x = torch.randn(2, 128).half()
    choice = Choice(kernel="decode", step=32)
    wrong = tune._prepared([layer], x, choice, torch.zeros(2, 64).half() + 1, FakeTimer(), None)
    assert isinstance(wrong, str)
    assert "relative error" in wrong
    right = tune._prepared([layer], x, choice, layer.expected(x), FakeTimer(), None)
    assert not isinstance(right, str)


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        n_spills = 8

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: Compiled()

    kernel = Kernel()
    monkeypatch.setattr(tune.launch, "decode_kernel", kernel)
    with tune._spills("decode") as spills:
        tune.launch.decode_kernel[(1,)]()
    assert spills == [8]
    assert tune.launch.decode_kernel is kernel


@pytest.mark.parametrize(("n", "bits"), [(64, 8), (100, 8), (100, 4), (20, 8)])
def test_split_adds_the_sidecar_to_another_base(
    n: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row tiles of 32: whole ones, a ragged last one, and one that is cut."""
    layer = random_layer(256, torch.float16, CPU, [Part(n, 8, bits, 32, 128)])
    base = replace(layer.linears[0], u=None, v=None, gain=None)
    monkeypatch.setattr(split, "_marlin_tensors", lambda *_: {"workspace": torch.zeros(1)})
    monkeypatch.setattr(split, "_marlin", lambda x, *_: naive_matmul(x, base).half())
    made = SplitLayer.checked(layer)
    assert isinstance(made, SplitLayer)
    x = torch.randn(3, 256).half()
    assert relative_error(made.copy().run(x), layer.expected(x)) < 1e-3
    monkeypatch.setattr(split, "_marlin", lambda x, *_: naive_matmul(x, base).half() * 2)
    assert "relative error" in str(SplitLayer.checked(layer))
