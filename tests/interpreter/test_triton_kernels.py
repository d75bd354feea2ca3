# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, against the reference in float64.

The interpreter computes in float32 here (its bfloat16 arithmetic is wrong); inline PTX it cannot
run at all, so the plain-Triton unpacking is what these tests see. ``python -m
svsk_kernel_tools.bench`` compares the two on a GPU.
"""

import itertools
from typing import Any

import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.folded_product import fold, matmul_folded
from svsk_kernels.gpu.launch import counters, packed_matmul, shrink
from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import Codebook
from tests.interpreter.layers import BOUNDS, Layer, activations, make_layer

CODEBOOKS: tuple[Codebook, ...] = ("int4", "quad8")
SHAPES: list[dict[str, Any]] = [
    {"m": 1, "n": 64, "k": 256, "rank": 16},
    {"m": 3, "n": 100, "k": 96, "rank": 8, "tile_m": 48, "tile_n": 40, "group_size": 32},
    {"m": 17, "n": 33, "k": 288, "rank": 24, "tile_m": 16, "tile_n": 128, "group_size": 32},
    {"m": 64, "n": 160, "k": 512, "rank": 32, "tile_m": 64, "tile_n": 256},
    {"m": 100, "n": 96, "k": 128, "rank": 0},
    {"m": 5, "n": 7, "k": 576, "rank": 64, "tile_m": 0, "tile_n": 0},
    {"m": 2, "n": 130, "k": 1024, "rank": 128, "tile_m": 100, "tile_n": 600, "group_size": 32},
]


def layer_of(
    shape: dict[str, Any], codebook: Codebook, num_bits: int, dtype: torch.dtype = torch.float16
) -> Layer:
    arguments = {key: value for key, value in shape.items() if key not in ("m", "k")}
    return make_layer(shape["k"], dtype, arguments, codebook=codebook, num_bits=num_bits)


def choice(kernel: str, layer: Layer, **blocks: Any) -> Choice:
    step = min(layer.base.plane, layer.base.group_size)
    return Choice(kernel=kernel, step=step, **blocks)


def run(
    layer: Layer, x: torch.Tensor, chosen: Choice, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return packed_matmul(
        x, layer.base, layer.sidecar, layer.stacked.spec.factor_bits, bias, chosen, layer.tiles
    )


def combinations() -> list[Any]:
    """Every kernel, codebook, width of factors and shape together.

    In every run each kernel has each shape once, and each codebook with each width; the rest is
    run with all tests.
    """
    kinds = list(itertools.product(CODEBOOKS, (4, 8)))
    return [
        pytest.param(
            kernel,
            *kind,
            shape,
            id="-".join(map(str, (kernel, *kind, *shape.values()))),
            marks=() if (i + j) % len(kinds) == k else pytest.mark.slow,
        )
        for i, kernel in enumerate(("decode", "gemm", "fold"))
        for j, shape in enumerate(SHAPES)
        for k, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(("kernel", "codebook", "num_bits", "shape"), combinations())
def test_kernel_equals_reference(
    kernel: str, codebook: Codebook, num_bits: int, shape: dict[str, Any]
) -> None:
    layer = layer_of(shape, codebook, num_bits)
    x = activations(shape["m"], shape["k"], torch.float16)
    if kernel == "fold":
        found = matmul_folded(x, layer.base, layer.sidecar, layer.stacked.spec.factor_bits, None)
    else:
        block_m = next(size for size in (16, 32, 64, 128) if size >= min(shape["m"], 64))
        found = run(
            layer,
            x,
            choice(kernel, layer, block_m=block_m, block_n=64 if kernel == "decode" else 128),
        )
    assert found.dtype == torch.float16
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.float16]


@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
@pytest.mark.parametrize(
    ("rank", "num_bits", "n", "k", "tile_n"),
    [
        (130, 4, 70, 320, 0),
        (131, 8, 33, 96, 40),
        (256, 4, 40, 2304, 0),
        (511, 8, 40, 192, 0),
        (512, 4, 7, 512, 256),
    ],
)
def test_ranks_beyond_128(
    kernel: str, rank: int, num_bits: int, n: int, k: int, tile_n: int
) -> None:
    """Over whole matrices and in tiles, one of them longer than a job."""
    sizes = {"n": n, "rank": rank, "tile_m": 0, "tile_n": tile_n, "group_size": 32}
    layer = make_layer(k, torch.float16, sizes, num_bits=num_bits)
    bits = layer.stacked.spec.factor_bits
    x = activations(3, k, torch.float16)
    if kernel == "fold":
        found = matmul_folded(x, layer.base, layer.sidecar, bits, None)
    else:
        found = run(layer, x, choice(kernel, layer))
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.float16]


@pytest.mark.parametrize("rank", [16, 40, 256])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_splits_share_the_ranks(rank: int, num_bits: int) -> None:
    """32 of them at a time, fewer times than there are splits or more."""
    layer = make_layer(
        1280, torch.float16, {"n": 70, "rank": rank, "tile_m": 0, "tile_n": 0}, num_bits=num_bits
    )
    x = activations(2, 1280, torch.float16)
    found = run(layer, x, choice("decode", layer, split_k=5))
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.float16]
    assert counters.busy(x.device) == 0


@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
def test_bfloat16(kernel: str) -> None:
    layer = layer_of(SHAPES[3], "quad8", 4, torch.bfloat16)
    x = activations(9, 512, torch.bfloat16)
    if kernel == "fold":
        found = matmul_folded(x, layer.base, layer.sidecar, 4, None)
    else:
        found = run(layer, x, choice(kernel, layer))
    assert found.dtype == torch.bfloat16
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kernel", ["decode", "gemm", "fold"])
def test_parts_of_a_fused_layer_differ(kernel: str, mixed: bool) -> None:
    """Ranks, tiles and factor bits of their own.

    One part without a sidecar; blocks of rows across part boundaries.
    """
    parts = (
        {"n": 100, "rank": 8, "tile_m": 48, "tile_n": 0, "num_bits": 4},
        {"n": 30, "rank": 0},
        {"n": 70, "rank": 24, "tile_m": 32, "tile_n": 96, "num_bits": 8 if mixed else 4},
        {"n": 20, "rank": 2, "tile_m": 0, "tile_n": 64, "num_bits": 4},
    )
    layer = make_layer(320, torch.float16, *parts, group_size=32)
    assert layer.stacked.spec.factor_bits == (8 if mixed else 4)
    x = activations(6, 320, torch.float16)
    bias = torch.randn(layer.base.n).half()
    if kernel == "fold":
        found = matmul_folded(x, layer.base, layer.sidecar, layer.stacked.spec.factor_bits, bias)
    else:
        found = run(layer, x, choice(kernel, layer), bias)
    assert relative_error(found, layer.expected(x) + bias.double()) < BOUNDS[torch.float16]
    without = layer.expected(x)[:, 100:130] + bias[100:130].double()
    assert relative_error(found[:, 100:130], without) < BOUNDS[torch.float16]


@pytest.mark.parametrize("split", [2, 3, 7])
@pytest.mark.parametrize("rank", [0, 16])
def test_split_columns_add_up_and_leave_the_counters_zero(split: int, rank: int) -> None:
    layer = make_layer(1280, torch.float16, {"n": 130, "rank": rank, "tile_m": 64, "tile_n": 512})
    x = activations(20, 1280, torch.float16)
    bias = torch.randn(130).half()
    chosen = choice("decode", layer, split_k=split, block_m=16)
    found = run(layer, x, chosen, bias)
    assert relative_error(found, layer.expected(x) + bias.double()) < BOUNDS[torch.float16]
    assert torch.equal(found, run(layer, x, chosen, bias))
    assert counters.busy(x.device) == 0


@pytest.mark.parametrize("num_bits", [4, 8])
def test_tiles_longer_than_a_job(num_bits: int) -> None:
    layer = make_layer(
        4352, torch.float16, {"n": 40, "rank": 20, "tile_m": 0, "tile_n": 0}, num_bits=num_bits
    )
    assert layer.tiles.long
    x = activations(18, 4352, torch.float16)
    found = run(layer, x, choice("decode", layer, block_m=32))
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.float16]
    assert counters.busy(x.device) == 0


def test_kernels_that_run_side_by_side_count_apart() -> None:
    """With dependent launch the decode kernel counts while the shrink kernel still does."""
    device = torch.device("cpu")
    own, other = counters.get(device).shrink, counters.get(device).decode
    assert own.data_ptr() + own.nbytes <= other.data_ptr()


def test_more_jobs_than_counters_and_counters_of_any_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(4352, torch.float16, {"n": 40, "rank": 4, "tile_m": 0, "tile_n": 0})
    x = activations(2, 4352, torch.float16)
    monkeypatch.setattr("svsk_kernels.gpu.launch.COUNTERS", 2)
    found = run(layer, x, choice("decode", layer))
    assert relative_error(found, layer.expected(x)) < BOUNDS[torch.float16]
    monkeypatch.undo()
    shared = counters.get(x.device)
    for counts in (shared.shrink, shared.decode):
        counts.fill_(7)
    assert counters.busy(x.device) == shared.shrink.numel() + shared.decode.numel()
    counters.reset(x.device)
    assert counters.busy(x.device) == 0


def test_z_is_gain_times_v_x() -> None:
    layer = make_layer(512, torch.float16, {"n": 64, "rank": 16, "tile_n": 256})
    side = layer.sidecar
    assert side is not None
    x = activations(5, 512, torch.float16)
    z = shrink(x, side, 8, layer.tiles)
    linear = layer.linears[0]
    assert linear.v is not None
    assert linear.gain is not None
    for b, r in itertools.product(range(2), (0, 7, 15)):
        v = linear.v[0, r, b * 256 : (b + 1) * 256].double()
        wanted = x[:, b * 256 : (b + 1) * 256].double() @ v * float(linear.gain[0, b, r]) * 128
        torch.testing.assert_close(z[:, b * 16 + r].double(), wanted, rtol=2e-3, atol=1e-4)


def test_input_need_not_be_contiguous_and_padding_is_not_read() -> None:
    """What lies around x in memory must not matter, not even where it is not finite."""
    layer = make_layer(
        288, torch.float16, {"n": 50, "rank": 8, "tile_m": 16, "tile_n": 40}, group_size=32
    )
    wide = torch.full((4, 500), float("nan"), dtype=torch.float16)
    wide[:, :288] = activations(4, 288, torch.float16)
    x = wide[:, :288]
    assert (
        relative_error(run(layer, x, choice("decode", layer)), layer.expected(x))
        < BOUNDS[torch.float16]
    )


@pytest.mark.parametrize("num_bits", [4, 8])
def test_fold_writes_any_rows_rounded_once(num_bits: int) -> None:
    layer = make_layer(
        320, torch.bfloat16, {"n": 200, "rank": 8, "tile_m": 48, "tile_n": 96}, num_bits=num_bits
    )
    whole = naive_matmul(torch.eye(320), layer.linears[0]).T
    for rows in (slice(0, 200), slice(64, 200), slice(128, 192)):
        found = fold(
            layer.base, layer.sidecar, layer.stacked.spec.factor_bits, torch.bfloat16, rows
        )
        assert found.shape == (rows.stop - rows.start, 320)
        assert relative_error(found, whole[rows]) < BOUNDS[torch.bfloat16]


def test_folding_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(256, torch.float16, {"n": 200, "rank": 8})
    x, bias = activations(3, 256, torch.float16), torch.randn(200).half()
    for some in (bias, None):
        whole = matmul_folded(x, layer.base, layer.sidecar, 8, some)
        monkeypatch.setattr("svsk_kernels.gpu.repack_sidecar.FOLD_BYTES", 256 * 2 * 64)
        torch.testing.assert_close(
            matmul_folded(x, layer.base, layer.sidecar, 8, some), whole, rtol=1e-3, atol=1e-3
        )
        monkeypatch.undo()


def test_small_and_large_values_survive_float16() -> None:
    """z is kept in the range of the outputs.

    Products of integer factors alone would overflow or vanish.
    """
    for size in (1e-3, 300.0):
        layer = make_layer(256, torch.float16, {"n": 64, "rank": 16, "tile_n": 0})
        x = activations(2, 256, torch.float16) * size
        found = run(layer, x, choice("decode", layer))
        assert torch.isfinite(found).all()
        assert relative_error(found, layer.expected(x)) < 2 * BOUNDS[torch.float16]


def test_stacked_linears_must_share_columns_groups_and_codebook() -> None:
    with pytest.raises(
        ValueError, match="differ in columns, group size, codebook or in whether rows have scales"
    ):
        make_layer(64, torch.float16, {"n": 8, "group_size": 32}, {"n": 8, "group_size": 64})
