# SPDX-License-Identifier: Apache-2.0
"""A quantised linear in memory: the float reference of its weight, storing, and refusals."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_vllm.format import (
    Codebook,
    LinearSpec,
    QuantizedLinear,
    SvskFormatError,
    dequantize,
    restored_weight,
)
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.format_builders import make_group, property_test, random_linear

NAME = "model.layers.0.mlp.up_proj"
FOUR_BITS: tuple[Codebook, ...] = ("int4", "quad8")


def naive_weight(linear: QuantizedLinear, *, with_sidecar: bool = True) -> torch.Tensor:
    """The formula of docs/format.md, one term at a time, in Python floats (float64)."""
    spec = linear.spec
    tile_m, tile_n = spec.scheme.sidecar.tile_m or spec.n, spec.scheme.sidecar.tile_n or spec.k
    codes, scale = linear.codes.tolist(), linear.scale.double().tolist()
    weight = [[0.0] * spec.k for _ in range(spec.n)]
    for n in range(spec.n):
        for k in range(spec.k):
            q = codes[n][k]
            level = q if spec.scheme.weights.codebook == "int4" else q * (8 + abs(q)) / 8
            weight[n][k] = scale[n][k // spec.group_size] * level
    if linear.u is None or linear.v is None or linear.gain is None or not with_sidecar:
        return torch.tensor(weight, dtype=torch.float64)
    u, v, gain = linear.u.tolist(), linear.v.tolist(), linear.gain.double().tolist()
    for n in range(spec.n):
        for k in range(spec.k):
            a, b = n // tile_m, k // tile_n
            for i in range(spec.rank):
                weight[n][k] += gain[a][b][i] * u[n][b][i] * v[a][i][k]
    return torch.tensor(weight, dtype=torch.float64)


def assert_reference_is_exact(linear: QuantizedLinear) -> None:
    weight = dequantize(linear)
    assert weight.dtype == torch.float32
    # weights are of the order of 0.1: 1e-6 is a few float32 roundings, far below any one term
    torch.testing.assert_close(weight.double(), naive_weight(linear), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3, 16])
@pytest.mark.parametrize("codebook", FOUR_BITS)
@pytest.mark.parametrize(("group_size", "k"), [(32, 96), (64, 128)])
@pytest.mark.parametrize(
    ("tile_m", "tile_n"),
    [
        (5, 40),
        (512, 1024),
        (0, 0),
        (1, 33),
        (4, 0),
        (0, 48),
    ],  # smaller, larger, whole; off the group and byte grid
)
def test_dequantize_with_int8_factors(
    rank: int, codebook: Codebook, group_size: int, k: int, tile_m: int, tile_n: int
) -> None:
    scheme = make_group(
        group_size=group_size, codebook=codebook, rank=rank, tile_m=tile_m, tile_n=tile_n
    )
    assert_reference_is_exact(random_linear(LinearSpec(NAME, 13, k, scheme), seed=rank))


@settings(property_test, max_examples=40)
@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([16, 32, 64]),
    codebook=st.sampled_from(FOUR_BITS),
    scale_bits=st.sampled_from(get_args(ScaleBits)),
    rank=st.sampled_from([2, 4, 16]),
    tile_m=st.integers(0, 24),
    tile_n=st.integers(0, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_dequantize_with_four_bit_factors(
    n: int,
    groups: int,
    group_size: int,
    codebook: Codebook,
    scale_bits: ScaleBits,
    rank: int,
    tile_m: int,
    tile_n: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    scheme = make_group(
        group_size=group_size,
        codebook=codebook,
        scale_bits=scale_bits,
        rank=rank,
        tile_m=tile_m,
        tile_n=tile_n,
        num_bits=4,
    )
    linear = random_linear(LinearSpec(NAME, n, groups * group_size, scheme, dtype), seed)
    assert_reference_is_exact(linear)
    assert torch.equal(
        dequantize(QuantizedLinear.from_tensors(linear.spec, linear.to_tensors())),
        dequantize(linear),
    )


def ragged_linear() -> QuantizedLinear:
    return random_linear(LinearSpec(NAME, 13, 128, make_group(rank=4, tile_m=5, tile_n=48)))


def test_dequantize_without_the_sidecar() -> None:
    linear = ragged_linear()
    expected = naive_weight(linear, with_sidecar=False)
    torch.testing.assert_close(
        dequantize(linear, with_sidecar=False).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(dequantize(linear).double(), expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_restored_weight_is_rounded_once(dtype: torch.dtype) -> None:
    linear = random_linear(
        LinearSpec(NAME, 13, 128, make_group(rank=4, tile_m=5, tile_n=48), dtype)
    )
    restored = restored_weight(linear)
    assert restored.dtype == dtype
    assert torch.equal(restored, dequantize(linear).to(dtype))


def test_dequantize_does_not_alter_its_input() -> None:
    linear = ragged_linear()
    before = {name: tensor.clone() for name, tensor in linear.to_tensors().items()}
    dequantize(linear)
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.to_tensors().items())


def test_dequantize_of_views_that_are_not_contiguous() -> None:
    linear = ragged_linear()
    assert linear.u is not None
    views = replace(
        linear,
        codes=linear.codes.t().contiguous().t(),
        scale=linear.scale.t().contiguous().t(),
        u=linear.u.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(dequantize(views), dequantize(linear))
    assert all(tensor.is_contiguous() for tensor in views.to_tensors().values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [0, 6])
def test_stored_and_read_back_is_bit_identical(bits: int, rank: int) -> None:
    scheme = make_group(rank=rank, tile_m=5, tile_n=48, num_bits=bits)
    linear = random_linear(LinearSpec(NAME, 13, 128, scheme))
    # What does not belong to the linear is passed over.
    others = {"model.norm.weight": torch.ones(3)}
    back = QuantizedLinear.from_tensors(linear.spec, linear.to_tensors() | others)
    for field in ("codes", "scale", "u", "v", "gain"):
        ours, read = getattr(linear, field), getattr(back, field)
        assert (ours is None) == (read is None) == (rank == 0 and field in ("u", "v", "gain"))
        assert ours is None or (torch.equal(ours, read) and ours.dtype == read.dtype)


Damage = Callable[[QuantizedLinear], QuantizedLinear]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda x: replace(x, codes=x.codes[:, :64]), ["weight_packed", "[13, 8]", "[13, 16]"]),
        (lambda x: replace(x, codes=x.codes[:, :60]), ["K = 60 is not a multiple of 8"]),
        (lambda x: replace(x, codes=x.codes + 1), ["span -7 to 8"]),
        (lambda x: replace(x, codes=x.codes.int()), ["torch.int32"]),
        (
            lambda x: replace(x, scale=x.scale.float()),
            ["weight_scale", "torch.float32", "torch.bfloat16"],
        ),
        (lambda x: replace(x, scale=x.scale[:, :1]), ["weight_scale", "[13, 1]", "[13, 2]"]),
        (lambda x: replace(x, u=x.u[..., :3]), ["sidecar_u", "[13, 3, 3]", "[13, 3, 4]"]),
        (lambda x: replace(x, v=x.v.float()), ["torch.float32"]),
        (
            lambda x: replace(x, gain=x.gain.half()),
            ["sidecar_gain", "torch.float16", "torch.float32"],
        ),
        (
            lambda x: replace(x, u=None, v=None, gain=None),
            ["sidecar_u: missing", "sidecar_v: missing", "sidecar_gain"],
        ),
        (
            lambda x: replace(x, spec=LinearSpec(NAME, 13, 128, make_group())),
            ["sidecar_u: unexpected, the scheme has rank 0", "sidecar_v", "sidecar_gain"],
        ),
    ],
)
def test_storing_refuses_and_names_the_module(damage: Damage, words: list[str]) -> None:
    with pytest.raises(SvskFormatError) as caught:
        damage(ragged_linear()).to_tensors()
    for word in [NAME, *words]:
        assert word in str(caught.value)


def test_reading_names_every_wrong_tensor() -> None:
    linear = ragged_linear()
    tensors = linear.to_tensors()
    del tensors[f"{NAME}.sidecar_u"]
    tensors[f"{NAME}.sidecar_gain"] = tensors[f"{NAME}.sidecar_gain"].half()
    with pytest.raises(SvskFormatError) as caught:
        QuantizedLinear.from_tensors(linear.spec, tensors)
    assert f"{NAME}.sidecar_u: missing, expected torch.int8 [13, 3, 4]" in str(caught.value)
    assert f"{NAME}.sidecar_gain: torch.float16 [3, 3, 4], expected torch.float32 [3, 3, 4]" in str(
        caught.value
    )
