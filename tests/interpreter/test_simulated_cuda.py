# SPDX-License-Identifier: Apache-2.0
"""Launchers and benchmark on a simulated GPU, the kernels in the interpreter.

Every tensor is where it must be.

What a GPU alone can do (graphs, streams, events) is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import svsk_kernels.gpu.folded_product as folded_product
import svsk_kernels.gpu.launch as launch
from svsk_kernel_tools.bench import correctness, runner, split, tune
from svsk_kernel_tools.bench.cases import Case, cases_for
from svsk_kernel_tools.bench.correctness import check_case, relative_error
from svsk_kernel_tools.bench.layers import Part, layer_of_shape, random_layer
from svsk_kernel_tools.bench.report import Report
from svsk_kernel_tools.bench.runner import FINISHED
from svsk_kernel_tools.bench.shapes import VARIANTS, Shape
from svsk_kernel_tools.bench.split import SplitLayer
from svsk_kernels.gpu import matmul_op as dispatch
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.rule import candidates
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.gpu.tuning import TuningTable, table_name
from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import LinearSpec
from tests.interpreter.test_bench import CPU, MACHINE, TINY, FakeTimer, bench
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer
from tests.support.simulated_cuda import GPU_NAME, on_gpu, simulated_cuda

GPU = torch.device("cuda", 0)
NAMES = ("shrink_kernel", "decode_kernel", "gemm_kernel", "fold_kernel")
LARGER = Case("all kernels", 256, (Part(64, 16, 8, 32, 128),), (40,), torch.float16, bias=True)


class OnGpuOnly:
    """Launches a kernel, whose tensors Triton would not take from the CPU."""

    def __init__(self, name: str, kernel: Any, launched: list[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            for number, arg in enumerate(args):
                if isinstance(arg, torch.Tensor) and not on_gpu(arg):
                    raise ValueError(
                        f"{self.name}: pointer argument {number} cannot be accessed from Triton"
                    )
            self.launched.append(self.name)
            return self.kernel[grid](*args, **options)

        return run


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    names: list[str] = []
    for name in NAMES:
        module = folded_product if name == "fold_kernel" else launch
        monkeypatch.setattr(module, name, OnGpuOnly(name, getattr(module, name), names))
    monkeypatch.setattr(dispatch, "_warmed", set())
    monkeypatch.setattr(dispatch, "_prepared", {})
    dispatch.gpu_of.cache_clear()
    with simulated_cuda({torch.ops.svsk.matmul.default: dispatch._matmul}):
        yield names
        assert launch.counters.busy(GPU) == 0
        launch.counters.forget(GPU)
    dispatch.gpu_of.cache_clear()


@pytest.mark.parametrize("case", [*cases_for(True, False), LARGER], ids=lambda case: case.name)
def test_checks_pass(monkeypatch: pytest.MonkeyPatch, launched: list[str], case: Case) -> None:
    monkeypatch.setattr(correctness._Trial, "gpu_problems", lambda *_: [])  # graphs and streams
    findings = list(check_case(case, torch.device("cuda")))
    assert [finding.problems for finding in findings] == [()] * len(findings)
    assert {"decode_kernel", *(NAMES if case is LARGER else ())} <= set(launched)


def test_a_layer_is_the_same_on_both_devices(launched: list[str]) -> None:
    parts = [Part(40, 16, 4, 24, 128), Part(10), Part(24, 8, 8, 16, 96)]
    ours, theirs = (
        random_layer(256, torch.float16, device, parts, codebook="quad8") for device in (GPU, CPU)
    )
    assert all(map(on_gpu, ours.copies(2)[1].tensors.values()))
    assert all(
        torch.equal(ours.tensors[name].cpu(), tensor) for name, tensor in theirs.tensors.items()
    )


def test_warm_up_launches_everything_once(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(dispatch, "choices_for", lambda *_: choices)
    gpu = dispatch.gpu_of(GPU)
    assert (gpu.name, gpu.capability, gpu.processors) == (GPU_NAME, 90, 132)
    known = {choice.kernel: choice for choice in candidates(gpu, 96, 128, 64)}
    limits = {"decode": 8, "gemm": 16, "fold": None}
    choices = [replace(known[kernel], max_m=limit) for kernel, limit in limits.items()]
    linear = random_linear(
        LinearSpec("m", 96, 128, make_group(rank=5, tile_m=40, tile_n=72), torch.float16), 0
    )
    spec, layer = loaded_layer(linear, torch.float16)
    layer.bias = torch.nn.Parameter(torch.arange(96).half(), requires_grad=False)
    layer.to("cuda")
    kernel = TritonKernel(spec, GPU)
    kernel.prepare(layer)
    assert set(launched) == set(NAMES)
    assert all(map(on_gpu, layer.parameters()))
    count, x = len(launched), torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half()
    expected = naive_matmul(x, linear.plain, layer.bias.cpu())
    assert relative_error(kernel(layer, x.cuda(), layer.bias).cpu(), expected) < 1e-3
    assert kernel(layer, x[:0].cuda(), None).device == GPU
    kernel.prepare(loaded_on_gpu(linear, layer.bias))
    assert len(launched) == count + 2, "such a layer was warmed up before"


def loaded_on_gpu(linear: Any, bias: torch.nn.Parameter) -> torch.nn.Module:
    layer = loaded_layer(linear, torch.float16)[1].to("cuda")
    layer.bias = bias
    return layer


def test_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Also with the split form, whose base is a product here."""
    monkeypatch.setattr(runner, "vllm_missing", lambda: None)
    weights: list[torch.Tensor] = []

    def tensors(
        codes: torch.Tensor, scale: torch.Tensor, group_size: int
    ) -> dict[str, torch.Tensor]:
        weights.append((codes.unflatten(1, (-1, group_size)) * scale.unsqueeze(-1)).flatten(1))
        return {"weight": weights[-1], "workspace": torch.zeros(1, device=codes.device)}

    monkeypatch.setattr(split, "_marlin_tensors", tensors)
    monkeypatch.setattr(split, "_marlin", lambda x, base, n, k: x @ base["weight"].T)
    report = Report(tmp_path / "bench.json", MACHINE)
    timing = bench(report, device=GPU, quick=True, tokens=(1, 17))
    assert timing.time_shapes([TINY], FakeTimer()) == FINISHED
    records = list(report.of_kind("time"))
    assert [record for record in records if "error" in record] == []
    assert sum(record["kernel"] == "split" for record in records) == 2 * 3
    assert not report.of_kind("note")
    assert set(launched) >= {"shrink_kernel", "decode_kernel", "gemm_kernel"}


def test_split_layer(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    layer = random_layer(256, torch.float16, GPU, [Part(100, 8, 4, 32, 128)])
    linear = layer.linears[0]
    base = replace(linear, u=None, v=None, gain=None)
    monkeypatch.setattr(
        split, "_marlin_tensors", lambda *_: {"workspace": torch.zeros(1, device=GPU)}
    )
    monkeypatch.setattr(split, "_marlin", lambda x, *_: naive_matmul(x, base).half())
    made = SplitLayer.checked(layer)
    assert isinstance(made, SplitLayer), made
    x = torch.randn(3, 256, device=GPU).half()
    assert relative_error(made.copy().run(x), layer.expected(x)) < 1e-3


def test_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(runner, "BUCKETS", (16, None))
    monkeypatch.setattr(tune, "_LAST_TOKENS", 20)
    few = [
        Choice(kernel="decode", block_n=64, step=32, split_k=2),
        Choice(kernel="gemm", block_m=32, step=32),
    ]
    monkeypatch.setattr(tune, "trial_choices", lambda *_: [*few, Choice(kernel="fold")])
    monkeypatch.setattr(
        runner, "layer_of_shape", lambda s, v, _, d: layer_of_shape(s, v, torch.float16, d)
    )
    report = Report(tmp_path / "bench.json", MACHINE)
    shape = Shape("tiny", 64, 512)
    tuning = bench(report, device=GPU, configs=tmp_path / "configs")
    assert tuning.tune_shapes([shape], FakeTimer()) == FINISHED
    assert [record for record in report.of_kind("tune") if "error" in record] == []
    table = TuningTable.from_json((tmp_path / "configs" / table_name(GPU_NAME)).read_text())
    assert table.device == GPU_NAME
    assert VARIANTS[0].rank == 16
    assert set(launched) == set(NAMES)
