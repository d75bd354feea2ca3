# SPDX-License-Identifier: Apache-2.0
"""The kernel for CPUs: a row's bits do not depend on the rows beside it, where that is asked."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch

from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.codebook import Codebook
from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.processor import instructions_for
from svsk_kernels.experts_op import ExpertsKernel, register_experts
from svsk_kernels.tile_grid import TileGrid
from tests.support.cpu_paths import PATHS, PATHS_HERE

if obstacle := cpu_ops_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Stored:
    """How a layer is stored, and its activations multiplied."""

    codebook: Codebook = "int4"
    rank: int = 0
    tile: tuple[int, int] = (0, 0)
    group_size: int = 64
    row_scaled: bool = False
    activations: Literal["exact", "int8"] = "exact"


LAYERS = {
    "int4": Stored(),
    "quad8 with a sidecar": Stored("quad8", 20),
    "int4 in tiles": Stored("int4", 9, (40, 100)),
    "quad8, scales of two levels": Stored("quad8", 8, group_size=16, row_scaled=True),
    "8 bits": Stored("int8"),
    "activations of 8 bits": Stored("quad8", 16, (40, 100), 32, True, "int8"),
}


def layer_of(
    stored: Stored, dtype: torch.dtype, path: str, n: int, k: int, invariant: bool, seed: int = 0
) -> tuple[CpuKernel, torch.nn.Module]:
    if path == "avx512_bf16" and dtype == torch.float32:
        pytest.skip("that path takes no float32")
    linear = random_linear(
        TileGrid(n, k, *stored.tile),
        dtype,
        torch.Generator().manual_seed(seed),
        codebook=stored.codebook,
        group_size=stored.group_size,
        rank=stored.rank,
        row_scaled=stored.row_scaled,
    )
    stacked = stack_linears([linear], dtype)
    kernel = CpuKernel(replace(stacked.spec, batch_invariant=invariant), stored.activations)
    kernel.instructions = path
    layer = stacked.module()
    kernel.prepare(layer)
    return kernel, layer


def rows_that_differ(kernel: CpuKernel, layer: torch.nn.Module, k: int, most: int) -> set[int]:
    """The numbers of rows with which some row is another than among ``most``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(most, k, generator=generator).to(kernel.spec.dtype)
    bias = torch.randn(kernel.spec.n, generator=generator).to(kernel.spec.dtype)
    whole = kernel(layer, x, bias)
    differ = {m for m in range(most) if not torch.equal(kernel(layer, x[:m], bias), whole[:m])}
    for first in range(0, most, 7):  # as the first of others
        if not torch.equal(kernel(layer, x[first : first + 3], bias), whole[first : first + 3]):
            differ.add(3)
    return differ


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_equal_bit_for_bit(name: str, dtype: torch.dtype, path: str) -> None:
    kernel, layer = layer_of(LAYERS[name], dtype, path, 75, 192, True)
    assert kernel.label.endswith(", batch invariant")
    assert rows_that_differ(kernel, layer, 192, 66) == set()


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_do_not_fit_the_cache_together(path: str) -> None:
    """Rows are cut into chunks, of which the last may be any number."""
    kernel, layer = layer_of(LAYERS["quad8 with a sidecar"], torch.float16, path, 16, 16384, True)
    assert rows_that_differ(kernel, layer, 16384, 40) == set()


@pytest.mark.parametrize("path", PATHS_HERE)
def test_it_has_to_be_asked_for(path: str) -> None:
    """Few rows are multiplied in another order, which is faster."""
    dtype = torch.float16 if path == "avx512_bf16" else torch.float32  # bfloat16 would hide it
    kernel, layer = layer_of(LAYERS["int4"], dtype, path, 75, 2048, False)
    assert rows_that_differ(kernel, layer, 2048, 66)


def test_the_number_of_rows_is_the_one_given() -> None:
    kernel, layer = layer_of(LAYERS["int4"], torch.bfloat16, PATHS_HERE[-1], 75, 192, True)
    for m in (0, 1, 5):
        y = kernel(layer, torch.ones(m, 192, dtype=torch.bfloat16), None)
        assert y.shape == (m, 75)
        assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype) -> None:
    """An expert gets any number of rows; a row's sum goes through its experts in order."""
    count, width, inner, path = 5, 128, 96, instructions_for(dtype)
    stored = Stored("quad8", 6, group_size=32)
    halves = []
    for n, k in ((2 * inner, width), (width, inner)):
        made = [layer_of(stored, dtype, path, n, k, True, seed) for seed in range(count)]
        names = tuple(name for name, _ in made[0][1].named_parameters())
        stacks = [torch.stack([getattr(layer, name).data for _, layer in made]) for name in names]
        halves.append((made[0][0], names, stacks))
    (gate_up, first, w13), (down, second, w2) = halves
    kernel = ExpertsKernel(gate_up, down, (first, second), lambda both: both[:, :inner].relu())
    key = register_experts(kernel, (gate_up.spec, down.spec), "relu")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, width, generator=generator).to(dtype)
    weights, ids = torch.rand(30, count, generator=generator).topk(3, dim=1)
    whole = torch.ops.svsk.experts(x, weights, ids, None, w13, w2, key)
    assert whole.abs().max() > 0
    for m in range(1, 30):
        found = torch.ops.svsk.experts(x[-m:], weights[-m:], ids[-m:], None, w13, w2, key)
        assert torch.equal(found, whole[-m:])
