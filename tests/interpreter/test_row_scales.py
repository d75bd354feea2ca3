# SPDX-License-Identifier: Apache-2.0
"""Scales of two levels, and groups of 16, in the interpreter, against the float64 reference."""

import dataclasses
from typing import Any

import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.bench.layers import BenchLayer, Part, random_layer
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.codebook import Codebook, code_values
from svsk_kernels.gpu.choice import Choice, Gpu, TuningError, longest_step
from svsk_kernels.gpu.folded_product import fold
from svsk_kernels.gpu.launch import counters
from svsk_kernels.gpu.repack_base import ROW_PAD, pack_scale_codes, plane_length
from svsk_kernels.gpu.rule import heuristic_choices
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.gpu.tuning import Entry, TuningTable
from svsk_kernels.layer_kernel import LayerSpec
from svsk_kernels.naive import PlainLinear, naive_matmul
from svsk_kernels.tile_grid import TileGrid
from tests.interpreter.layers import BOUNDS, activations
from tests.support.unpack_gpu import unpack_scale_codes

CPU = torch.device("cpu")
HALF = torch.float16
GROUPS = (16, 32, 64)

# rows, columns, parts: padded rows and columns, planes of 64, 32 and 16, odd tiles
SHAPES: dict[str, tuple[int, tuple[Part, ...]]] = {
    "no sidecar": (256, (Part(70),)),
    "rank 32 of 4 bits": (512, (Part(130, 32, 4, 64, 256),)),
    "planes of 16, odd tiles": (576, (Part(33, 24, 8, 16, 200),)),
    "planes of 32, padded columns": (320, (Part(7, 8, 8, 0, 0), Part(50), Part(20, 4, 4, 8, 56))),
}


def layer_of(
    name: str, group_size: int, codebook: Codebook, dtype: torch.dtype = HALF, **settings: Any
) -> BenchLayer:
    k, parts = SHAPES[name]
    layer = {"row_scaled": True, **settings}
    return random_layer(k, dtype, CPU, parts, codebook=codebook, group_size=group_size, **layer)


def choice_of(layer: BenchLayer, kernel: str, **blocks: Any) -> Choice:
    spec = layer.spec
    step = longest_step(spec.k, spec.group_size, spec.row_scaled)
    return Choice(kernel=kernel, **({"step": step} | blocks))


@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_equals_reference(
    name: str, group_size: int, codebook: Codebook, kernel: str
) -> None:
    layer = layer_of(name, group_size, codebook)
    x, bias = activations(5, layer.spec.k, HALF), torch.randn(layer.spec.n).half()
    block_n = 128 if kernel == "gemm" else 64
    y = layer.run(x, choice_of(layer, kernel, block_n=block_n), bias)
    assert y.dtype == HALF
    assert relative_error(y, layer.expected(x, bias)) < BOUNDS[HALF]


@pytest.mark.parametrize("step", [64, 32, 16])
@pytest.mark.parametrize("group_size", GROUPS)
def test_turns_longer_and_shorter_than_a_group(group_size: int, step: int) -> None:
    layer = layer_of("rank 32 of 4 bits", group_size, "int4")
    x = activations(3, 512, HALF)
    for kernel in ("decode", "gemm"):
        y = layer.run(x, choice_of(layer, kernel, step=step))
        assert relative_error(y, layer.expected(x)) < BOUNDS[HALF]


@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
def test_one_level_with_groups_of_16(kernel: str) -> None:
    layer = layer_of("planes of 32, padded columns", 16, "quad8", row_scaled=False)
    x = activations(20, 320, HALF)
    y = layer.run(x, choice_of(layer, kernel, block_m=32))
    assert relative_error(y, layer.expected(x)) < BOUNDS[HALF]


@pytest.mark.parametrize("row_scaled", [False, True])
def test_columns_that_32_does_not_divide(row_scaled: bool) -> None:
    parts = (Part(40, 8, 8, 16, 24), Part(10))
    layer = random_layer(112, HALF, CPU, parts, group_size=16, row_scaled=row_scaled)
    x = activations(3, 112, HALF)
    for kernel in ("decode", "gemm", "fold"):
        y = layer.run(x, choice_of(layer, kernel))
        assert relative_error(y, layer.expected(x)) < BOUNDS[HALF]


@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
def test_bfloat16(kernel: str) -> None:
    layer = layer_of("rank 32 of 4 bits", 16, "quad8", torch.bfloat16)
    x = activations(9, 512, torch.bfloat16)
    y = layer.run(x, choice_of(layer, kernel))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, layer.expected(x)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("split", [2, 3, 7])
def test_split_columns_are_scaled_once(split: int) -> None:
    """Sidecar and bias are not scaled, whichever split adds them."""
    layer = random_layer(
        1280, HALF, CPU, (Part(130, 16, 8, 64, 512),), group_size=32, row_scaled=True
    )
    x, bias = activations(20, 1280, HALF), torch.randn(130).half()
    chosen = choice_of(layer, "decode", split_k=split)
    y = layer.run(x, chosen, bias)
    assert relative_error(y, layer.expected(x, bias)) < BOUNDS[HALF]
    assert torch.equal(y, layer.run(x, chosen, bias))
    assert counters.busy(x.device) == 0


def plain(scale: torch.Tensor, row_scale: torch.Tensor, k: int, codebook: Codebook) -> PlainLinear:
    codes = (torch.arange(len(scale) * k).view(-1, k) * 7 % 16 - 8).to(torch.int8)
    grid = TileGrid(len(scale), k, 0, 0)
    return PlainLinear(codes, scale, codebook, grid, row_scale=row_scale)


@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
def test_every_code_of_a_scale(kernel: str, codebook: Codebook) -> None:
    """-128, negative codes, zero; row scales of three significant bits, as 6-bit codes have.

    Each output is one weight. In the interpreter's float32 no product is rounded before the last.
    """
    scale = torch.arange(-128, 128).to(torch.int8).repeat(4).view(16, -1)  # groups of 16: K 1024
    row_scale = torch.tensor([2.0**-12, 1.75 * 2.0**-10, 0.25, 2.0**-14] * 4).half().view(16, 1)
    linear = plain(scale, row_scale, 1024, codebook)
    stacked = stack_linears([linear])
    assert stacked.spec == LayerSpec(16, 1024, 16, codebook, HALF, row_scaled=True)
    layer = stacked.module()
    kernel_of_layer = TritonKernel(stacked.spec, CPU)
    kernel_of_layer.matmul.warm_up = lambda *_: None  # type: ignore[method-assign]
    kernel_of_layer.prepare(layer)
    bench = BenchLayer((linear,), kernel_of_layer.matmul, _tensors(kernel_of_layer, layer))
    x = torch.eye(1024).half()
    y = bench.run(x, choice_of(bench, kernel, block_m=128 if kernel == "gemm" else 64))
    levels = code_values(linear.codes, codebook, torch.float64).view(16, -1, 16)
    scales = scale.double() * row_scale.double()
    assert torch.equal(y.T, (levels * scales.unsqueeze(-1)).view(16, 1024).half())


def _tensors(kernel: TritonKernel, layer: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(layer, stored) for name, stored in kernel.names.items()}


def test_large_sums_of_codes_are_finite_in_float16() -> None:
    """Weights are integers up to 2048 before the row's scale: their sums must not be in float16."""
    scale = torch.full((32, 64), 127, dtype=torch.int8)
    linear = plain(scale, torch.full((32, 1), 2.0**-14).half(), 1024, "quad8")
    linear = dataclasses.replace(linear, codes=torch.full_like(linear.codes, -8))
    stacked = stack_linears([linear])
    matmul = TritonKernel(stacked.spec, CPU).matmul
    tensors = matmul.prepare(stacked.packed, stacked.scale, row_scale=stacked.row_scale)
    layer = BenchLayer((linear,), matmul, tensors)
    x = torch.full((2, 1024), 30.0).half()
    for kernel in ("decode", "gemm", "fold"):
        y = layer.run(x, choice_of(layer, kernel))
        assert relative_error(y, layer.expected(x)) < BOUNDS[HALF]


@pytest.mark.parametrize("k", [2560, 896, 576, 320, 112])
@pytest.mark.parametrize("group_size", GROUPS)
def test_scale_words_follow_their_definition_and_come_back(group_size: int, k: int) -> None:
    if k % group_size:
        pytest.skip("no whole groups")
    plane = plane_length(k)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-128, 128, (37, k // group_size), generator=generator).to(torch.int8)
    stored = pack_scale_codes(codes, plane, group_size)
    run = min(plane, group_size)
    blocks = -(-k // (4 * plane))
    assert stored.shape == (blocks * plane // run, ROW_PAD)
    # no scale twice: a byte for each group of the padded columns
    assert stored.numel() * stored.itemsize == blocks * 4 * plane // group_size * ROW_PAD
    assert torch.equal(unpack_scale_codes(stored, 37, k, plane, group_size), codes)
    for column in torch.randint(0, k, (16,), generator=generator).tolist():
        block, within = divmod(column, 4 * plane)
        nibble, place = divmod(within, plane)
        word = int(stored[(block * plane + place) // run, 5])
        byte = nibble * stored.itemsize // 4
        assert ((word >> 8 * byte) & 255) - 128 == int(codes[5, column // group_size])


@pytest.mark.parametrize("m", [1, 40, 65])
def test_op_and_layer(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(m)
    linears = [
        random_linear(
            TileGrid(n, 256, 0, 128), HALF, generator, group_size=16, rank=rank, row_scaled=True
        )
        for n, rank in ((70, 8), (30, 0))
    ]
    stacked = stack_linears(linears)
    layer, kernel = stacked.module(), TritonKernel(stacked.spec, CPU)
    monkeypatch.setattr(kernel.matmul, "warm_up", lambda *_: None)
    kernel.prepare(layer)
    assert layer.weight_scale.dtype == torch.int32
    x, bias = activations(m, 256, HALF), torch.randn(100).half()
    wanted = torch.cat([naive_matmul(x, linear) for linear in linears], dim=1) + bias.double()
    assert relative_error(kernel(layer, x, bias), wanted) < BOUNDS[HALF]


def test_fake_op_takes_a_row_scale() -> None:
    layer = layer_of("no sidecar", 32, "int4")
    names = ("words", "scale", "row_scale")
    arguments = (activations(3, 256, HALF), *map(layer.tensors.get, names))
    torch.library.opcheck(
        torch.ops.svsk.matmul.default,
        (*arguments, None, [], layer.matmul.code),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_fold_writes_any_rows() -> None:
    layer = layer_of("rank 32 of 4 bits", 32, "quad8", torch.bfloat16)
    whole = naive_matmul(torch.eye(512), layer.linears[0]).T
    for rows in (slice(0, 130), slice(64, 130)):
        weight = fold(layer.base, layer.sidecar, 4, torch.bfloat16, rows)
        assert relative_error(weight, whole[rows]) < BOUNDS[torch.bfloat16]


H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=90, processors=132)


@pytest.mark.parametrize("row_scaled", [False, True])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("k", [2560, 896, 576])
def test_rule_gives_valid_choices(k: int, group_size: int, row_scaled: bool) -> None:
    choices = heuristic_choices(H100, 2560, k, group_size, row_scaled)
    Entry(2560, k, group_size, choices, row_scaled)  # raises if they do not fit the layer
    plane = plane_length(k)
    assert choices[0].step == (plane if row_scaled else min(plane, group_size))


def test_table_keeps_layers_of_two_levels_apart() -> None:
    choices = heuristic_choices(H100, 256, 512, 16, row_scaled=True)
    with pytest.raises(TuningError, match="step 64 must divide 16"):
        Entry(256, 512, 16, choices)
    with pytest.raises(TuningError, match="row_scaled 1: expected true or false"):
        Entry(256, 512, 16, choices, 1)  # type: ignore[arg-type]
    entries = (Entry(256, 512, 16, choices, True),)
    table = TuningTable(device=H100.name, triton="3.9.0", entries=entries)
    assert TuningTable.from_json(table.to_json()).entries == entries
