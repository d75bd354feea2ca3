# SPDX-License-Identifier: Apache-2.0
"""Values that are finite as stored, and not where they are loaded."""

from pathlib import Path

import pytest
import torch

from svsk_vllm.format import validate_checkpoint
from tests.format.damages import Case, assert_lines, names_of, replaced, with_value
from tests.support.format_builders import DOWN_PROJ, O_PROJ, Q_PROJ, build_small_checkpoint

BEYOND = [
    replaced(
        "beyond the dtype:", "model.norm.weight", with_value(3, 7e4), "7e+04", "torch.float16"
    ),
    replaced(
        "products beyond the dtype:",
        f"{Q_PROJ}.weight_scale",
        with_value(5, 3e4),
        "beyond",
        "torch.float16",
    ),
    replaced(
        "products beyond float32:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, 1e38),
        "beyond what float32",
    ),
    replaced(
        "beyond, negative:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, -9e34),
        "beyond what float32",
    ),
    replaced(
        "beyond the dtype with the sidecar:",
        f"{DOWN_PROJ}.sidecar_gain",
        with_value(0, 30.0),
        "torch.float16",
    ),
]


@pytest.mark.parametrize("case", BEYOND, ids=names_of(BEYOND))
def test_finite_values_that_load_as_infinities(tmp_path: Path, case: Case) -> None:
    small = build_small_checkpoint(tmp_path, dtype=torch.float16)
    case.damage(small)
    problems = validate_checkpoint(tmp_path)
    assert_lines(problems, case.lines)
    assert len(problems) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_beyond_a_wider_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """1e38 is a number in both, 13 times as much in neither."""
    small = build_small_checkpoint(tmp_path, dtype=dtype)
    small.replace(f"{O_PROJ}.weight_scale", with_value(0, 1e38))
    assert_lines(
        validate_checkpoint(tmp_path), ((f"{O_PROJ}.weight_scale", "beyond what float32"),)
    )
    small.replace(f"{O_PROJ}.weight_scale", with_value(0, 1e36))
    assert validate_checkpoint(tmp_path) == []


def test_a_bound_that_no_weight_reaches_is_no_problem(tmp_path: Path) -> None:
    """In float16 a scale of 8,000 takes code 8, not 7, beyond the largest number.

    The weight itself decides.
    """
    small = build_small_checkpoint(tmp_path, dtype=torch.float16)
    small.replace(f"{Q_PROJ}.weight_scale", lambda scale: torch.full_like(scale, 8190.0))
    assert validate_checkpoint(tmp_path) != []
    # Every code is -8, 65,520: rounds to infinity.
    small.replace(f"{Q_PROJ}.weight_packed", torch.zeros_like)
    assert validate_checkpoint(tmp_path) != []
    # Every code is -7.
    small.replace(f"{Q_PROJ}.weight_packed", lambda packed: torch.full_like(packed, 0x11111111))
    assert validate_checkpoint(tmp_path) == []
