# SPDX-License-Identifier: Apache-2.0
"""Which tensors a linear stores, their shapes, and the bits they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_vllm.format import SUFFIXES, LinearSpec, SvskFormatError
from tests.support.format_builders import make_group, property_test, random_linear

NAME = "model.layers.3.mlp.gate_proj"
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def stored(spec: LinearSpec) -> Stored:
    return {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in spec.tensors().items()}


def test_a_base_alone_stores_codes_and_scales() -> None:
    assert stored(LinearSpec(NAME, 5, 192, make_group())) == {
        "weight_packed": (torch.int32, (5, 24)),
        "weight_scale": (torch.bfloat16, (5, 3)),
    }


@pytest.mark.parametrize(
    ("bits", "factor_dtype", "u_shape", "v_shape"),
    [(8, torch.int8, (1000, 3, 16), (2, 16, 2560)), (4, torch.uint8, (1000, 3, 8), (2, 16, 1280))],
)
def test_a_sidecar_stores_three_more(
    bits: int, factor_dtype: torch.dtype, u_shape: tuple[int, ...], v_shape: tuple[int, ...]
) -> None:
    spec = LinearSpec(
        NAME, 1000, 2560, make_group(rank=16, num_bits=bits, group_size=32), torch.float16
    )
    assert stored(spec) == {
        "weight_packed": (torch.int32, (1000, 320)),
        "weight_scale": (torch.float16, (1000, 80)),
        "sidecar_u": (factor_dtype, u_shape),
        "sidecar_v": (factor_dtype, v_shape),
        "sidecar_gain": (torch.float32, (2, 3, 16)),
    }
    others = {"weight_row_scale", "weight_hot_rows", "weight_hot_packed", "weight_hot_scale"}
    assert list(spec.tensors()) == [s for s in SUFFIXES if s not in others]


def test_hot_rows_are_stored_apart() -> None:
    spec = LinearSpec(NAME, 11, 192, make_group(targets=[NAME], hot_rows=3), torch.float16)
    assert stored(spec) == {
        "weight_packed": (torch.int32, (8, 24)),
        "weight_scale": (torch.float16, (8, 3)),
        "weight_hot_rows": (torch.int32, (3,)),
        "weight_hot_packed": (torch.int32, (3, 48)),
        "weight_hot_scale": (torch.float16, (3, 3)),
    }
    with pytest.raises(SvskFormatError, match=f"{NAME}: hot_rows 3 of 3 rows: expected fewer"):
        LinearSpec(NAME, 3, 192, make_group(targets=[NAME], hot_rows=3))


@property_test
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([16, 32, 64]),
    half_rank=st.integers(0, 4),
    tile_m=st.integers(0, 50),
    tile_n=st.integers(0, 300),
    bits=st.sampled_from([4, 8]),
)
def test_specification_fits_what_is_stored(
    n: int, groups: int, group_size: int, half_rank: int, tile_m: int, tile_n: int, bits: int
) -> None:
    scheme = make_group(
        group_size=group_size, rank=2 * half_rank, tile_m=tile_m, tile_n=tile_n, num_bits=bits
    )
    spec = LinearSpec(NAME, n, groups * group_size, scheme)
    tensors = random_linear(spec).to_tensors()
    found = {
        name.removeprefix(f"{NAME}."): (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    assert found == stored(spec)
    assert spec.stored_bits == sum(
        8 * len(t.contiguous().view(torch.uint8).flatten()) for t in tensors.values()
    )
    assert spec.bits_per_weight == spec.stored_bits / (n * groups * group_size)


def bits_per_weight(
    rank: int, tile_m: int, tile_n: int, factor_bits: int, n: int = 5120, k: int = 5120
) -> float:
    scheme = make_group(rank=rank, tile_m=tile_m, tile_n=tile_n, num_bits=factor_bits)
    return LinearSpec(NAME, n, k, scheme).bits_per_weight


def test_bits_per_weight_of_the_base() -> None:
    assert bits_per_weight(0, 512, 1024, 8) == 4.25
    assert LinearSpec(NAME, 7, 96, make_group(group_size=32)).bits_per_weight == 4.5
    assert LinearSpec(NAME, 7, 128, make_group(), torch.float32).bits_per_weight == 4.5


@pytest.mark.parametrize(
    ("rank", "tile_m", "tile_n", "factor_bits", "factors", "gains"),
    [
        (16, 512, 1024, 8, 0.375, 32 * 16 / (512 * 1024)),
        (32, 512, 1024, 4, 0.375, 32 * 32 / (512 * 1024)),
        (16, 512, 1024, 4, 0.1875, 32 * 16 / (512 * 1024)),
    ],
)
def test_bits_per_weight_of_a_sidecar(
    rank: int, tile_m: int, tile_n: int, factor_bits: int, factors: float, gains: float
) -> None:
    assert bits_per_weight(rank, tile_m, tile_n, factor_bits) == 4.25 + factors + gains
    assert bits_per_weight(16, 1024, 2048, 8, 4096, 4096) == 4.25 + 0.1875 + 32 * 16 / (1024 * 2048)


def test_ragged_tiles_cost_a_whole_slot() -> None:
    # 5120 = 2 * 2048 + 1024: U has three slots per row where two and a half would be in proportion
    assert (
        bits_per_weight(16, 1024, 2048, 8)
        == 4.25 + 16 * 8 * (3 / 5120 + 5 / 5120) + 32 * 16 * 15 / 5120**2
    )


@pytest.mark.parametrize(
    ("k", "group_size", "remedy"),
    [
        (100, 64, "64; add the module to the ignore list"),  # not a multiple of 8 either
        (72, 64, "64; add the module to the ignore list"),
        (96, 64, "64; use group_size 32, or add the module to the ignore list"),
        (48, 32, "32; use group_size 16, or add the module to the ignore list"),
        (40, 16, "16; add the module to the ignore list"),
        (33, 32, "32; add the module to the ignore list"),
    ],
)
def test_a_k_that_no_whole_groups_fill_is_refused(k: int, group_size: int, remedy: str) -> None:
    with pytest.raises(SvskFormatError) as caught:
        LinearSpec(NAME, 16, k, make_group(group_size=group_size))
    for word in [NAME, f"K = {k} ", f"not a multiple of the group size {remedy}"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (16, 0), (-1, 64)])
def test_an_empty_weight_is_refused(n: int, k: int) -> None:
    with pytest.raises(SvskFormatError, match=rf"{NAME}: weight of shape \[{n}, {k}\]"):
        LinearSpec(NAME, n, k, make_group())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_other_scale_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SvskFormatError, match=f"{NAME}: scales of {dtype}: expected one of"):
        LinearSpec(NAME, 16, 64, make_group(), dtype)
