# SPDX-License-Identifier: Apache-2.0
"""A linear in GGUF's blocks, read back by the package ``gguf``: the same bits."""

import gguf
import pytest
import torch

from svsk_offline.export.gguf.adapter import lora_factors, require_small
from svsk_offline.export.gguf.blocks import TYPE_OF, pack_blocks
from svsk_vllm.format import Codebook, LinearSpec, QuantizedLinear, SvskError, dequantize
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.format_builders import make_group, random_linear


def read_back(linear: QuantizedLinear) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[TYPE_OF[linear.spec.scheme.weights.joined_codebook]]
    return torch.from_numpy(gguf.quants.dequantize(pack_blocks(linear).numpy(), kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("codebook", "group_size", "scale_bits"),
    [
        ("int4", 32, 16),
        ("int4", 64, 8),
        ("int4", 64, 6),
        ("quad8", 32, 6),
        ("quad8", 64, 16),
        ("int8", 32, 16),
        ("int8", 64, 16),
    ],
)
def test_bit_exact(
    dtype: torch.dtype, codebook: Codebook, group_size: int, scale_bits: ScaleBits
) -> None:
    group = make_group(group_size=group_size, codebook=codebook, scale_bits=scale_bits)
    linear = random_linear(LinearSpec("some.linear", 37, 192, group, dtype))
    if (
        dtype != torch.bfloat16
    ):  # of these, blocks hold those with bfloat16's bits that are not tiny
        scale = linear.scale.sign() * linear.scale.abs().clamp_min(2.0**-10)
        linear = QuantizedLinear(linear.spec, linear.codes, scale.bfloat16().to(dtype))
    assert len(linear.codes.unique()) == (256 if codebook == "int8" else 16)
    assert torch.equal(read_back(linear), dequantize(linear))


def test_hot_rows_are_bit_exact() -> None:
    group = make_group(targets=["embed"], hot_rows=9)
    linear = random_linear(LinearSpec("embed", 37, 192, group))
    assert int(linear.codes.abs().max()) > 100
    assert torch.equal(read_back(linear), dequantize(linear))


def test_scales_that_float16_does_not_hold_are_refused() -> None:
    linear = random_linear(LinearSpec("some.linear", 4, 64, make_group(group_size=32)))
    linear.scale[:] = 2.0**-17 * 1.9921875  # the smallest binade whose 8 bits float16 has
    assert torch.equal(read_back(linear), dequantize(linear))
    for bad in (2.0**-18 * 1.9921875, 2.0**17):
        linear.scale[2, 1] = bad
        with pytest.raises(SvskError, match=r"some\.linear: .* does not hold 1 of 8 .*--ignore"):
            pack_blocks(linear)
        linear.codes[2, 32:] = 0
        assert torch.equal(read_back(linear), dequantize(linear)), "any scale would do"
        linear.codes[2, 32:] = 3


def test_quad8_needs_an_eighth_of_the_scale() -> None:
    group = make_group(group_size=32, codebook="quad8")
    linear = random_linear(LinearSpec("some.linear", 4, 64, group))
    linear.scale[:] = 2.0**-14 * 1.9921875
    assert torch.equal(read_back(linear), dequantize(linear))
    linear.scale[:] = 2.0**-15 * 1.9921875
    with pytest.raises(SvskError, match="does not hold 8 of 8"):
        pack_blocks(linear)


def test_groups_of_16() -> None:
    linear = random_linear(LinearSpec("some.linear", 5, 96, make_group(group_size=16)))
    with pytest.raises(
        SvskError,
        match=r"some\.linear: groups of 16 weights have scales of their own.* `--group-size 32`",
    ):
        pack_blocks(linear)
    linear.scale[:, 1::2] = linear.scale[:, ::2]
    assert torch.equal(read_back(linear), dequantize(linear))
    linear.codes[3, :16] = 0
    linear.scale[3, 0] = 7.0
    linear.codes[4, 48:64] = 0
    linear.scale[4, 3] = 7.0
    assert torch.equal(read_back(linear), dequantize(linear)), "of codes that are 0 any scale does"
    odd = random_linear(LinearSpec("some.linear", 5, 48, make_group(group_size=16)))
    with pytest.raises(SvskError, match="48 columns are not a multiple of GGUF's blocks of 32"):
        pack_blocks(odd)


@pytest.mark.parametrize(("tile_m", "tile_n", "num_bits"), [(0, 0, 8), (48, 0, 4), (50, 100, 8)])
def test_adapter_is_the_sidecar(tile_m: int, tile_n: int, num_bits: int) -> None:
    group = make_group(rank=2, tile_m=tile_m, tile_n=tile_n, num_bits=num_bits)
    linear = random_linear(LinearSpec("some.linear", 131, 192, group))
    assert linear.gain is not None
    linear.gain[0, 0, 1] *= -1
    a, b = lora_factors(linear)
    tiles = linear.spec.grid.num_row_tiles * linear.spec.grid.num_col_tiles
    assert (a.shape, b.shape) == ((2 * tiles, 192), (131, 2 * tiles))
    sidecar = dequantize(linear) - dequantize(linear, with_sidecar=False)
    error = (b.float() @ a.float() - sidecar).norm() / sidecar.norm()
    assert error < 2**-10, "two factors of 11 significant bits"


def test_tiles_that_make_a_huge_adapter_are_refused() -> None:
    spec = LinearSpec("some.linear", 128, 192, make_group(rank=4, tile_m=48, tile_n=96))
    with pytest.raises(
        SvskError, match=r"3 x 2 tiles of rank 4 .* rank 24, more than 16.*tile-m 0"
    ):
        require_small(spec)
    require_small(LinearSpec("some.linear", 128, 192, make_group(rank=8, tile_m=64)))
    require_small(LinearSpec("some.linear", 128, 192, make_group(rank=24, tile_m=0, tile_n=0)))


def test_a_gain_beyond_float16_is_refused() -> None:
    linear = random_linear(LinearSpec("some.linear", 64, 64, make_group(rank=1)))
    assert linear.gain is not None
    linear.gain[:] = 1e12
    with pytest.raises(SvskError, match=r"some\.linear: a factor of its sidecar exceeds float16"):
        lora_factors(linear)
