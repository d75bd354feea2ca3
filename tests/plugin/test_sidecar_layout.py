# SPDX-License-Identifier: Apache-2.0
"""The layout of sharded sidecars: any tiles, cut between any ranks."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_kernels.naive import naive_sidecar
from svsk_kernels.sidecar_op import prepare_sidecar, sidecar_matmul
from svsk_vllm.format import ConfigGroup, LinearSpec, QuantizedLinear, SvskFormatError, pack_factors
from svsk_vllm.plugin.shard_probe import ShardId
from svsk_vllm.plugin.sidecar_layout import build_layout
from svsk_vllm.plugin.sidecar_loader import SIDECAR_DTYPES, tile_loader
from tests.support.format_builders import make_group, property_test, random_linear


def load_sharded(
    linears: Sequence[QuantizedLinear], rank: int, size: int, *, by_columns: bool
) -> tuple[torch.Tensor, ...] | None:
    """Run-time tensors and plan of one rank of a fused layer, or of a row-parallel one."""
    k = linears[0].spec.k
    shards: list[tuple[ShardId, ConfigGroup]] = [
        (index if len(linears) > 1 else None, linear.spec.scheme)
        for index, linear in enumerate(linears)
    ]
    counts = [linear.spec.n // (1 if by_columns else size) for linear in linears]
    starts = [0, *itertools.accumulate(counts)]

    def rows_of(shard: ShardId) -> torch.Tensor:
        index = int(shard or 0)
        rows = torch.full((starts[-1],), -1)
        first = 0 if by_columns else rank * counts[index]
        rows[starts[index] : starts[index + 1]] = torch.arange(first, first + counts[index])
        return rows

    def columns_of(shard: ShardId) -> torch.Tensor:
        width = k // size
        return torch.arange(rank * width, (rank + 1) * width) if by_columns else torch.arange(k)

    layout = build_layout("layer", shards, rows_of, columns_of, k, starts[-1])
    if layout is None:
        return None
    tensors = dict(zip(SIDECAR_DTYPES, layout.plan.zeros(), strict=True))
    for (shard, _), linear in zip(shards, linears, strict=True):
        if linear.u is None or linear.v is None or linear.gain is None:
            continue
        bits = linear.spec.factor_bits
        stored = {
            "sidecar_u": pack_factors(linear.u, bits),
            "sidecar_v": pack_factors(linear.v, bits),
            "sidecar_gain": linear.gain,
        }
        for name, data in tensors.items():
            parameter = torch.nn.Parameter(data, requires_grad=False)
            arguments = () if shard is None else (shard,)
            tile_loader("layer", name, layout, k)(parameter, stored[name], *arguments)
    return *tensors.values(), torch.tensor(layout.plan.encode())


part = st.tuples(
    st.integers(1, 12).map(lambda n: 8 * n),  # rows
    st.sampled_from([0, 2, 4, 6, 130]),  # rank
    st.sampled_from([0, 5, 16, 48]),  # tile_m
    st.sampled_from([0, 24, 32, 40, 100]),  # tile_n
    st.sampled_from([4, 8]),  # bits
)


@property_test
@given(
    parts=st.lists(part, min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 4]),
    by_columns=st.booleans(),
)
def test_ranks_add_up_to_the_whole_layer(
    parts: list[tuple[int, int, int, int, int]], size: int, by_columns: bool
) -> None:
    """Any tiles against any shard boundary.

    Outputs side by side, or partial outputs summed, are the reference's.
    """
    parts = parts[:1] if by_columns else parts
    k = 128
    linears = [
        random_linear(
            LinearSpec(
                f"p{index}",
                n,
                k,
                make_group(rank=r, tile_m=m, tile_n=t, num_bits=bits, group_size=32),
            ),
            index,
        )
        for index, (n, r, m, t, bits) in enumerate(parts)
    ]
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(7))
    expected = torch.cat([naive_sidecar(x, linear.plain) for linear in linears], 1)
    pieces = []
    for rank in range(size):
        loaded = load_sharded(linears, rank, size, by_columns=by_columns)
        if loaded is None:
            assert not expected.any()
            return
        u, v, gain, plan = loaded
        own = x[:, rank * k // size : (rank + 1) * k // size] if by_columns else x
        pieces.append(
            sidecar_matmul(own, *prepare_sidecar(u, v, gain, own.dtype), plan.tolist()).double()
        )
    if by_columns:
        actual = torch.stack(pieces).sum(0)
    else:  # each rank holds its share of every part
        counts = [linear.spec.n // size for linear in linears]
        split = [piece.split(counts, 1) for piece in pieces]
        actual = torch.cat(
            [torch.cat([s[index] for s in split], 1) for index in range(len(linears))], 1
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_loader_names_what_does_not_fit() -> None:
    linear = random_linear(
        LinearSpec("p", 32, 64, make_group(rank=4, tile_m=16, tile_n=32, group_size=32))
    )
    shards: list[tuple[ShardId, ConfigGroup]] = [(None, linear.spec.scheme)]
    layout = build_layout(
        "layer", shards, lambda _: torch.arange(32), lambda _: torch.arange(64), 64, 32
    )
    assert layout is not None
    gain = torch.nn.Parameter(layout.plan.zeros()[2], requires_grad=False)
    with pytest.raises(
        SvskFormatError, match=r"layer\.sidecar_gain: the checkpoint holds shape \[2, 2, 5\]"
    ):
        tile_loader("layer", "sidecar_gain", layout, 64)(gain, torch.zeros(2, 2, 5))
    with pytest.raises(SvskFormatError, match=r"loads it in parts \('q'\).*packed_modules_mapping"):
        tile_loader("layer", "sidecar_gain", layout, 64)(gain, torch.zeros(2, 2, 4), "q")
    only_q = build_layout(
        "layer",
        [("q", linear.spec.scheme)],
        lambda _: torch.arange(32),
        lambda _: torch.arange(64),
        64,
        32,
    )
    assert only_q is not None
    message = (
        r"layer\.sidecar_gain: loaded for part 'v', but by config\.json there are sidecars for"
    )
    with pytest.raises(SvskFormatError, match=message):
        tile_loader("layer", "sidecar_gain", only_q, 64)(gain, torch.zeros(2, 2, 4), "v")


def test_scattered_columns_are_refused() -> None:
    shards: list[tuple[ShardId, ConfigGroup]] = [(None, make_group(rank=4, group_size=32))]
    with pytest.raises(SvskFormatError, match="columns that do not follow each other"):
        build_layout(
            "layer", shards, lambda _: torch.arange(8), lambda _: torch.arange(64).flip(0), 64, 8
        )


def test_probes_stay_on_the_cpu_whatever_the_default_device() -> None:
    """The engine builds a model with the accelerator as the default device.

    Meta stands for one here.
    """
    shards: list[tuple[ShardId, ConfigGroup]] = [
        (None, make_group(rank=4, tile_m=16, tile_n=32, group_size=32))
    ]
    rows, columns = torch.arange(32), torch.arange(64)
    with torch.device("meta"):
        layout = build_layout("layer", shards, lambda _: rows, lambda _: columns, 64, 32)
    assert layout == build_layout("layer", shards, lambda _: rows, lambda _: columns, 64, 32)
