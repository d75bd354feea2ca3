# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter: a row's bits do not depend on the rows beside it.

The interpreter computes a block's products with NumPy, so it tells whether launches, blocks, splits
and sums are the same for every number of tokens; not what tensor cores do within a block. NumPy's
float32 product may give a column other bits at another place of the block (OpenBLAS with AVX2):
here it is taken in float64, and rounded once.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.bench.layers import BenchLayer, Part, random_layer
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.codebook import Codebook
from svsk_kernels.gpu import invariant_product, tuning
from svsk_kernels.gpu import matmul_op as dispatch
from svsk_kernels.gpu.choice import Gpu
from svsk_kernels.gpu.int8_layer import Int8Kernel
from svsk_kernels.gpu.launch import counters
from svsk_kernels.gpu.matmul_op import SvskMatmul
from svsk_kernels.gpu.rule import invariant_choices
from svsk_kernels.gpu.tuning import Entry
from svsk_kernels.tile_grid import TileGrid
from tests.interpreter.layers import BOUNDS, activations

CPU = torch.device("cpu")
H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=90, processors=132)
A10 = Gpu(name="NVIDIA A10", capability=86, processors=72)
HALF = torch.float16
MOST = 70
TOKENS = (1, 16, 17, 33, 65)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are served as on an H100, which splits columns, and in slices of 64 tokens."""
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: H100)
    monkeypatch.setattr(dispatch, "_prepared", {})
    monkeypatch.setattr(invariant_product, "_SLICE", 64)
    product = np.matmul

    def rounded_once(left: Any, right: Any, dtype: Any = np.float32) -> Any:
        return product(left.astype(np.float64), right.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(np, "matmul", rounded_once)


def rows_that_differ(layer: BenchLayer, tokens: tuple[int, ...]) -> list[int]:
    """Numbers of tokens with which a row is another than among MOST, which are near float64."""
    x = activations(MOST, layer.spec.k, HALF)
    bias = torch.randn(layer.spec.n, generator=torch.Generator().manual_seed(1)).half()
    whole = layer.dispatched(x, bias)
    assert relative_error(whole, layer.expected(x, bias)) < BOUNDS[HALF]
    differ = [m for m in tokens if not torch.equal(layer.dispatched(x[:m], bias), whole[:m])]
    for first, count in ((MOST - 1, 1), (5, 40)):  # at other places in the batch
        found = layer.dispatched(x[first : first + count], bias)
        if not torch.equal(found, whole[first : first + count]):
            differ.append(count)
    assert counters.busy(CPU) == 0
    return differ


@pytest.mark.parametrize(
    ("parts", "k", "codebook", "group_size", "row_scaled"),
    [
        ((Part(60),), 1024, "int4", 64, False),
        ((Part(40, 32, 4, 0, 0), Part(20)), 1024, "quad8", 64, False),
        ((Part(60, 24, 8, 48, 96),), 544, "int4", 32, False),
        ((Part(40, 9, 8, 24, 40),), 352, "quad8", 32, False),  # tiles begin off 16
        ((Part(60, 16, 8, 0, 0),), 528, "quad8", 16, True),
        ((Part(60),), 528, "int4", 16, True),
    ],
    ids=["base", "sidecar", "tiles", "odd tiles", "two levels, sidecar", "two levels"],
)
def test_rows_are_equal_bit_for_bit(
    parts: tuple[Part, ...], k: int, codebook: Codebook, group_size: int, row_scaled: bool
) -> None:
    layer = random_layer(
        k, HALF, CPU, parts, codebook=codebook, group_size=group_size, row_scaled=row_scaled
    )
    assert rows_that_differ(layer.batch_invariant(), TOKENS) == []


def test_tiles_longer_than_a_job() -> None:
    layer = random_layer(4352, HALF, CPU, [Part(40, 20, 4, 0, 0)])
    assert layer.tiles.long
    assert rows_that_differ(layer.batch_invariant(), (1, 65)) == []


def test_it_has_to_be_asked_for() -> None:
    """Few tokens are scaled otherwise than many."""
    layer = random_layer(1040, HALF, CPU, [Part(40)], group_size=16)
    assert rows_that_differ(layer, (16, 33))


def test_columns_are_split_and_tokens_sliced() -> None:
    """What the tests above go through."""
    for k, group_size, row_scaled in ((1024, 64, False), (544, 32, False), (528, 16, True)):
        (choice,) = invariant_choices(H100, 60, k, group_size, row_scaled)
        assert choice.split_k > 1
        assert choice.block_m < MOST


@pytest.mark.parametrize(
    ("n", "k"), [(6144, 2560), (2560, 9728), (19456, 2560), (1280, 8192), (960, 576), (64, 32)]
)
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("row_scaled", [False, True])
@pytest.mark.parametrize("gpu", [H100, A10], ids=lambda gpu: gpu.name)
def test_one_choice_takes_any_number_of_tokens(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool
) -> None:
    choices = invariant_choices(gpu, n, k, group_size, row_scaled)
    Entry(n, k, group_size, choices, row_scaled)  # raises if it does not fit the layer
    assert [choice.max_m for choice in choices] == [None]


def test_measured_tables_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "load_table", lambda device: pytest.fail("was read"))
    invariant_choices(H100, 64, 256, 64)


def test_warm_up_runs_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warmed", set())
    layer = random_layer(128, HALF, CPU, [Part(40, 4, 8, 0, 0)]).batch_invariant()
    seen: list[int] = []
    monkeypatch.setattr(SvskMatmul, "__call__", lambda self, x, *_: seen.append(x.shape[0]))
    layer.matmul.warm_up(layer.tensors)
    assert seen == [1, 16, 17]


def test_heads_of_8_bits() -> None:
    linear = random_linear(
        TileGrid(70, 128, 0, 0), HALF, torch.Generator().manual_seed(0), codebook="int8"
    )
    stacked = stack_linears([linear], HALF)
    layer = stacked.module()
    kernel = Int8Kernel(replace(stacked.spec, batch_invariant=True), CPU)
    kernel.prepare(layer)
    x = activations(MOST, 128, HALF)
    whole = kernel(layer, x, None)
    for m in (1, 15, 16, 17, 33, 64, 65):
        assert torch.equal(kernel(layer, x[:m], None), whole[:m])
        assert torch.equal(kernel(layer, x[-m:], None), whole[-m:])
