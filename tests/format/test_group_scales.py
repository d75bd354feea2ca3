# SPDX-License-Identifier: Apache-2.0
"""Scales in two levels: exact products, every scale that can be stored, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_vllm.format import (
    Checkpoint,
    LinearSpec,
    QuantizedLinear,
    SvskCheckpointConfig,
    SvskFormatError,
    validate_checkpoint,
)
from svsk_vllm.format.group_scales import (
    GroupScales,
    join_scales,
    pack_scale_codes,
    row_scale_problem,
    row_significand_bits,
    split_scales,
    unpack_scale_codes,
)
from tests.support.format_builders import (
    DOWN_PROJ,
    build_small_checkpoint,
    make_group,
    property_test,
    random_linear,
)

BITS: tuple[Literal[6, 8], ...] = (6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scales(n: int, groups: int, seed: int, size: float = 0.01) -> torch.Tensor:
    """Of both signs, over two decades, with a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, groups, generator=generator) * size
    values *= 10 ** torch.rand(n, 1, generator=generator).mul_(2).sub_(1)
    values[0] = 0
    return values


@settings(property_test, max_examples=60)
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-5, 1e-3, 1.0, 100.0]),
)
def test_what_was_rounded_is_stored_without_a_loss(
    n: int, groups: int, bits: Literal[6, 8], dtype: torch.dtype, seed: int, size: float
) -> None:
    given_scales = scales(n, groups, seed, size)
    stored = GroupScales(dtype, bits)
    rounded = stored.round(given_scales, stored.row_scale(given_scales))
    assert torch.equal(rounded.to(dtype).float(), rounded)  # exact in the model's dtype
    codes, row_scale = split_scales(rounded.to(dtype), bits)
    assert row_scale_problem(row_scale, bits) is None
    assert torch.equal(join_scales(codes, row_scale), rounded.to(dtype))
    columns = codes.shape[1]
    assert torch.equal(unpack_scale_codes(pack_scale_codes(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_half_a_step_of_the_row(bits: Literal[6, 8]) -> None:
    given_scales = scales(50, 20, 1)
    stored = GroupScales(torch.bfloat16, bits)
    row_scale = stored.row_scale(given_scales)
    assert row_scale is not None
    error = (stored.round(given_scales, row_scale) - given_scales).abs()
    assert bool((error <= row_scale / 2 * 1.001).all())
    # No smaller row scale would do: under the next one below, half of it or 4/5 at least, the
    # largest scale exceeds the largest code.
    smaller = 1 - 1 / (2 ** (row_significand_bits(bits) - 1) + 1)
    largest = given_scales[1:].abs().amax(1, keepdim=True)
    assert bool((largest / (row_scale[1:] * smaller) > 2 ** (bits - 1) - 1).all())


def test_a_row_scale_with_eight_bit_codes_is_a_power_of_two() -> None:
    row_scale = GroupScales(torch.bfloat16, 8).row_scale(scales(30, 8, 2))
    assert row_scale is not None
    assert bool((torch.frexp(row_scale).mantissa == 0.5).all())


def test_float16_keeps_scales_below_its_normal_numbers() -> None:
    stored = GroupScales(torch.float16, 8)
    tiny = torch.full((2, 3), 3e-7)
    rounded = stored.round(tiny, stored.row_scale(tiny))
    assert bool((rounded > 0).all())
    assert torch.equal(join_scales(*split_scales(rounded.half(), 8)).float(), rounded)


def test_every_code_of_eight_bits_can_be_read() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(1, -1)
    scale = join_scales(codes, torch.tensor([[0.25]], dtype=torch.bfloat16))
    assert torch.equal(scale.float(), codes.float() / 4)
    assert torch.equal(join_scales(*split_scales(scale, 8)), scale)


def test_six_bit_codes_in_bytes() -> None:
    codes = torch.tensor([[-32, -1, 0, 31, 5]], dtype=torch.int8)
    stored = pack_scale_codes(codes, 6)
    fields = [0, 31, 32, 63, 37, 0, 0, 0]  # the last bytes are filled up with zero bits
    words = [sum(f << 6 * i for i, f in enumerate(fields[j : j + 4])) for j in (0, 4)]
    assert stored.tolist() == [[b for word in words for b in word.to_bytes(3, "little")]]
    assert torch.equal(unpack_scale_codes(stored, 6, 5), codes)


@pytest.mark.parametrize("value", [32, -33])
def test_six_bit_codes_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(
        SvskFormatError, match=rf"6-bit scale codes span {value} to {value}: expected -32 to 31"
    ):
        pack_scale_codes(torch.tensor([[value]], dtype=torch.int8), 6)


@pytest.mark.parametrize(("bits", "groups"), [(6, 5), (6, 9), (8, 3)])
def test_codes_of_another_shape_are_refused(bits: Literal[6, 8], groups: int) -> None:
    stored = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(SvskFormatError, match=f"for {groups} groups"):
        unpack_scale_codes(stored, bits, groups)


def test_scales_that_no_row_scale_holds_are_refused() -> None:
    with pytest.raises(
        SvskFormatError, match="scales of 1 of 2 rows are no 8-bit multiples of a row scale"
    ):
        split_scales(torch.tensor([[1.0, 0.5], [1.0, 1 / 3]], dtype=torch.bfloat16), 8)


@pytest.mark.parametrize(
    ("value", "bits", "words"),
    [
        (0.0, 8, "positive and finite"),
        (-1.0, 8, "positive and finite"),
        (float("inf"), 6, "positive and finite"),
        (0.75, 8, r"more than 1 significant bit"),
        (1.125, 6, r"more than 3 significant bit"),
    ],
)
def test_a_row_scale_the_format_does_not_allow(value: float, bits: int, words: str) -> None:
    linear = random_linear(LinearSpec("m", 4, 64, make_group(scale_bits=8 if bits == 8 else 6)))
    tensors = linear.to_tensors()
    row_scale = tensors["m.weight_row_scale"]
    row_scale[2] = value
    with pytest.raises(
        SvskFormatError, match=rf"m\.weight_row_scale: 1 of 4 values.*{words}.*The file is damaged"
    ):
        QuantizedLinear.from_tensors(linear.spec, tensors)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_valid_and_says_its_version(
    tmp_path: Path, bits: Literal[6, 8], dtype: torch.dtype
) -> None:
    small = build_small_checkpoint(tmp_path, 1, dtype, bits)
    assert validate_checkpoint(tmp_path) == []
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config.version == "1.1"
    for name, linear in small.linears.items():
        assert torch.equal(checkpoint.read_linear(name).scale, linear.scale)


def test_a_damaged_row_scale_is_a_problem(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, scale_bits=8)
    small.replace(f"{DOWN_PROJ}.weight_row_scale", lambda tensor: tensor * 1.5)
    (problem,) = validate_checkpoint(tmp_path)
    assert f"{DOWN_PROJ}.weight_row_scale: 20 of 20 values have more than 1 signific" in problem


def test_a_row_scale_without_two_levels_is_a_problem(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, scale_bits=8)

    def one_level(config: dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            del group["weights"]["scale_bits"]

    small.edit_config(one_level)
    problems = "\n".join(validate_checkpoint(tmp_path))
    assert "weight_row_scale: unexpected" in problems
    assert "weight_scale: torch.int8" in problems


def test_version_1_0_has_one_level() -> None:
    config = SvskCheckpointConfig(config_groups={"g": make_group(scale_bits=8)}).to_dict()
    assert config["version"] == "1.1"
    with pytest.raises(SvskFormatError, match=r"version 1\.0 with scale_bits"):
        SvskCheckpointConfig.from_dict({**config, "version": "1.0"})
    small_groups = SvskCheckpointConfig(config_groups={"g": make_group(group_size=16)}).to_dict()
    assert small_groups["version"] == "1.1"


def test_readers_of_version_1_0_see_nothing_new_where_nothing_is() -> None:
    config = SvskCheckpointConfig(config_groups={"g": make_group()}).to_dict()
    assert config["version"] == "1.0"
    assert "scale_bits" not in config["config_groups"]["g"]["weights"]


@pytest.mark.parametrize(("group_size", "bits", "bpw"), [(32, 8, 4.25), (16, 6, 4.375)])
def test_bits_per_weight(group_size: int, bits: Literal[6, 8], bpw: float) -> None:
    scheme = make_group(group_size=group_size, scale_bits=bits)
    assert LinearSpec("m", 64, 4096, scheme).bits_per_weight == bpw + 16 / 4096


def test_scales_that_were_not_rounded_are_not_stored() -> None:
    linear = random_linear(LinearSpec("m", 4, 128, make_group(scale_bits=8)))
    wrong = replace(linear, scale=linear.scale * 1.01 + 1e-3 * torch.arange(2))
    with pytest.raises(SvskFormatError, match="m: scales of"):
        wrong.to_tensors()
