# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, in the blocks that the rule gives for GPUs."""

import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.bench.layers import Part, random_layer
from svsk_kernels.gpu import launch
from svsk_kernels.gpu.choice import Choice, TuningError, choice_for, longest_step
from svsk_kernels.gpu.launch import counters
from svsk_kernels.gpu.predicted_time import GPUS
from svsk_kernels.gpu.rule import heuristic_choices
from tests.interpreter.layers import BOUNDS, activations

CPU = torch.device("cpu")
HALF = torch.float16


@pytest.mark.parametrize(
    ("parts", "k", "group_size", "row_scaled"),
    [
        ((Part(130, 16, 8, 64, 256),), 1024, 64, False),
        ((Part(70, 24, 8, 48, 96), Part(30)), 544, 32, False),
        ((Part(60),), 528, 16, False),
        ((Part(100, 8, 4, 0, 0),), 1040, 16, True),
    ],
    ids=["groups of 64", "odd tiles, groups of 32", "groups of 16", "two levels"],
)
@pytest.mark.parametrize("kernel", ["decode", "gemm"])
def test_joined_planes(
    kernel: str, parts: tuple[Part, ...], k: int, group_size: int, row_scaled: bool
) -> None:
    layer = random_layer(k, HALF, CPU, parts, group_size=group_size, row_scaled=row_scaled)
    step = min(32, longest_step(k, group_size, row_scaled))
    x, bias = activations(70, k, HALF), torch.randn(layer.spec.n).half()
    blocks = {"block_m": 64, "block_n": 128, "step": step, "num_warps": 8}
    split = 3 if kernel == "decode" else 1
    joined = Choice(kernel=kernel, join=True, split_k=split, **blocks)  # type: ignore[arg-type]
    apart = Choice(kernel=kernel, split_k=split, **blocks)  # type: ignore[arg-type]
    found = layer.run(x, joined, bias)
    assert relative_error(found, layer.expected(x, bias)) < BOUNDS[HALF]
    assert relative_error(found, layer.run(x, apart, bias).double()) < BOUNDS[HALF]
    assert counters.busy(CPU) == 0


@pytest.mark.parametrize("n", [130, 300])
@pytest.mark.parametrize("m", [70, 129])
def test_blocks_of_256_rows(n: int, m: int) -> None:
    """More rows and tokens than there are, in blocks whose sums are added in two parts."""
    layer = random_layer(544, HALF, CPU, [Part(n, 24, 8, 48, 96)], group_size=32)
    x, bias = activations(m, 544, HALF), torch.randn(n).half()
    tall = Choice(
        kernel="decode", block_m=128, block_n=256, step=16, split_k=3, num_warps=8, join=True
    )
    found = layer.run(x, tall, bias)
    assert relative_error(found, layer.expected(x, bias)) < BOUNDS[HALF]
    assert torch.equal(layer.run(x[:65], tall, bias), found[:65])
    assert counters.busy(CPU) == 0


def test_far_rows_are_copied_before_planes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(256, HALF, CPU, [Part(60)])
    wide = activations(65, 512, HALF)
    joined = Choice(kernel="gemm", block_m=64, block_n=128, step=32, join=True)
    near = layer.run(wide[:, :256], joined)
    strides = []
    original = launch.Call.of

    def seen(x: torch.Tensor, *tensors: torch.Tensor | None) -> launch.Call:
        strides.append(x.stride(0))
        return original(x, *tensors)

    monkeypatch.setattr(launch.Call, "of", seen)
    monkeypatch.setattr(launch, "_FARTHEST", 512 * 64)
    assert torch.equal(layer.run(wide[:, :256], joined), near)
    assert strides[-1] == 256


def test_few_tokens_are_not_joined() -> None:
    with pytest.raises(TuningError, match="decode joins planes from 64 on"):
        Choice(kernel="decode", block_m=16, join=True)


@pytest.mark.parametrize(
    ("gpu", "n", "k", "m"),
    [
        ("H100", 130, 2080, 70),
        ("H100", 130, 1056, 300),
        ("A100", 60, 1024, 129),
        ("L40S", 100, 576, 65),
        ("B200", 60, 1040, 65),
    ],
)
def test_choices_of_gpus_compute_the_product(gpu: str, n: int, k: int, m: int) -> None:
    layer = random_layer(k, HALF, CPU, [Part(n, 8, 8, 0, 0)], group_size=16)
    choice = choice_for(heuristic_choices(GPUS[gpu].gpu, n, k, 16), m)
    x = activations(m, k, HALF)
    assert relative_error(layer.run(x, choice), layer.expected(x)) < BOUNDS[HALF]
    assert counters.busy(CPU) == 0
