# SPDX-License-Identifier: Apache-2.0
"""The benchmark of host time, and that launches prepared once pass on what Triton's own do."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from typer.testing import CliRunner

import svsk_kernel_tools.bench.host as bench
from svsk_kernel_tools.bench.layers import BenchLayer, Part, random_layer
from svsk_kernels.gpu import int8_layer
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.folded_product import FoldedProduct, matmul_folded
from svsk_kernels.gpu.launch import PackedProduct, packed_matmul

BFLOAT = torch.bfloat16
CPU = torch.device("cpu")
DECODE = Choice(kernel="decode", block_m=16, step=32, split_k=2, pdl=True)
GEMM = Choice(kernel="gemm", block_m=64, block_n=128, step=32, num_warps=8)
STREAM, FUNCTION, HOOKS, ARGUMENTS = 3, 4, slice(6, 9), 9
"""Where they stand in what Triton's driver is called with."""


def test_benchmark_reports_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIDECARS", {"whole": (32, 0, 0)})
    monkeypatch.setattr(bench, "SHAPE", (128, 4096))
    monkeypatch.setattr(bench, "_CALLS", 2)
    document = tmp_path / "host.json"
    result = CliRunner().invoke(
        bench.app, ["--rows", "1,2048", "--rounds", "2", "--json", str(document)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(document.read_text())
    assert set(found) == {"beside", "1", "2048"}
    assert set(found["beside"]) == {"torch.mm", "launch by Triton, whole"}
    assert set(found["1"]) == set(found["2048"]) == {"layer, whole", "op, whole"}
    assert min(stats["us"] for times in found.values() for stats in times.values()) > 0
    assert [line.split("|")[1].strip() for line in result.output.splitlines()[:4]] == [
        "M",
        "---",
        "1",
        "2048",
    ]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the driver was asked to launch."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(bench, "_launch_nothing", lambda *arguments: made.append(arguments))
    return made


def layer_of(rank: int, bits: int = 8, row_scaled: bool = False) -> BenchLayer:
    part = Part(100, rank, bits, 0, 0)
    return random_layer(2112, BFLOAT, CPU, [part], group_size=32, row_scaled=row_scaled)


def described(launch: tuple[Any, ...]) -> list[Any]:
    """A launch with tensors as what is the same of those that each call allocates."""
    values = launch[:FUNCTION] + launch[FUNCTION : FUNCTION + 1] + launch[ARGUMENTS:]
    return [(v.dtype, v.shape, v.stride()) if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("choice", "rank", "bits", "row_scaled"),
    [(DECODE, 16, 8, False), (DECODE, 0, 8, True), (GEMM, 16, 4, True), (GEMM, 0, 8, False)],
)
def test_launches_pass_on_what_those_of_triton_do(
    launches: list[tuple[Any, ...]],
    choice: Choice,
    rank: int,
    bits: int,
    row_scaled: bool,
    with_bias: bool,
) -> None:
    """The same binary, and the same arguments, of another number of tokens and another stride."""
    layer = layer_of(rank, bits, row_scaled)
    bias = torch.zeros(100, dtype=BFLOAT) if with_bias else None
    side, bits = layer.sidecar, layer.spec.factor_bits
    wide = torch.zeros(5, 2112 + 16, dtype=BFLOAT)
    with bench.no_launches():
        product = PackedProduct(
            layer.base, side, bits, choice, layer.tiles, dtype=BFLOAT, has_bias=with_bias
        )
        product(torch.zeros(3, 2112, dtype=BFLOAT), layer.base, side, bias)  # Triton's own
        launches.clear()
        x = wide[:, :2112]
        product(x, layer.base, side, bias)
        ours = list(launches)
        launches.clear()
        packed_matmul(x, layer.base, side, bits, bias, choice, layer.tiles)
    assert len(ours) == len(launches) == (2 if rank else 1)
    for mine, theirs in zip(ours, launches, strict=True):
        assert described(mine) == described(theirs)
        assert mine[HOOKS] == (None, None, None) != theirs[HOOKS]
        assert x.data_ptr() in [v.data_ptr() for v in mine if isinstance(v, torch.Tensor)]


def test_folding_passes_on_what_triton_does(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(16)
    x = torch.zeros(3, 2112, dtype=BFLOAT)
    monkeypatch.setattr("svsk_kernels.gpu.repack_sidecar.FOLD_BYTES", 64 * 2112 * 2)
    with bench.no_launches():
        product = FoldedProduct(layer.base, layer.sidecar, 8, BFLOAT)
        product(x, layer.base, layer.sidecar, None)
        first = list(launches)
        launches.clear()
        product(x, layer.base, layer.sidecar, None)
        again = list(launches)
        launches.clear()
        matmul_folded(x, layer.base, layer.sidecar, 8, None)
    assert [len(made) for made in (first, again, launches)] == [2, 2, 2]  # 64 rows, and 36
    assert list(map(described, first)) == list(map(described, again))
    assert list(map(described, again)) == list(map(described, launches))
    assert first[0][HOOKS] != (None, None, None) == again[0][HOOKS]


def test_what_is_not_aligned_is_left_to_triton(launches: list[tuple[Any, ...]]) -> None:
    """Activations off 16 bytes take another binary, which no other call gets."""
    layer, wide = layer_of(0), torch.zeros(3, 2112 + 16, dtype=BFLOAT)
    with bench.no_launches():
        product = PackedProduct(
            layer.base, None, 8, DECODE, layer.tiles, dtype=BFLOAT, has_bias=False
        )
        for first in (1, 0, 1, 0):
            product(wide[:, first : first + 2112], layer.base, None, None)
    odd, even, odd_again, even_again = (launch[FUNCTION] for launch in launches)
    assert odd == odd_again != even == even_again
    assert [launch[HOOKS] == (None, None, None) for launch in launches] == [False] * 3 + [True]


def test_profilers_see_every_launch(launches: list[tuple[Any, ...]]) -> None:
    layer = layer_of(0)
    x, hook = torch.zeros(3, 2112, dtype=BFLOAT), triton.knobs.runtime.launch_enter_hook
    with bench.no_launches():
        product = PackedProduct(
            layer.base, None, 8, DECODE, layer.tiles, dtype=BFLOAT, has_bias=False
        )
        product(x, layer.base, None, None)
        hook.add(print)
        try:
            product(x, layer.base, None, None)
        finally:
            hook.remove(print)
        product(x, layer.base, None, None)
    assert [launch[HOOKS][1] for launch in launches] == [hook, hook, None]


def test_layers_of_other_sizes_are_prepared_apart(launches: list[tuple[Any, ...]]) -> None:
    """Through the op: ranks, and the dtype of scales, that the numbers of the op do not tell."""
    with bench.no_launches():
        layers = [layer_of(16), layer_of(32), layer_of(16, row_scaled=True), layer_of(16)]
        x = torch.zeros(1, 2112, dtype=BFLOAT)
        for layer in layers:
            launches.clear()
            layer.dispatched(x)
            side = layer.sidecar
            assert side is not None
            z = launches[0][ARGUMENTS + 5]
            assert z.shape == (1, len(side.gain))
            assert launches[1][ARGUMENTS + 3] is layer.base.row_scale


def test_heads_of_8_bits(launches: list[tuple[Any, ...]]) -> None:
    """Prepared for each size and stride; few tokens and many take different blocks."""
    scale = torch.ones(2, 70, dtype=BFLOAT)
    codes, wide = torch.zeros(70, 128, dtype=torch.int8), torch.zeros(40, 130, dtype=BFLOAT)
    with bench.no_launches(), mock.patch.dict(int8_layer._prepared, clear=True):
        for x in (wide[:, :128], wide[:, :128].contiguous()):
            for m in (2, 3, 40, 17):
                torch.ops.svsk.int8_matmul(x[:m], codes, scale, None, False)
    assert [launch[0] for launch in launches] == [1, 1, 1, 1] * 2
    assert [launch[HOOKS] == (None, None, None) for launch in launches] == [False, True] * 4
    for first, second in zip(launches[::2], launches[1::2], strict=True):
        assert first[FUNCTION] == second[FUNCTION]
        assert [first[ARGUMENTS + 6 :], first[0:4]] == [second[ARGUMENTS + 6 :], second[0:4]]
    assert len({launch[FUNCTION] for launch in launches}) == 4
