# SPDX-License-Identifier: Apache-2.0
"""The C++ op of the quantiser's inner loop against the loop in PyTorch."""

import logging

import pytest
import torch

from svsk_kernels.cpu.build import round_block_obstacle
from svsk_offline.quantizers import error_feedback
from svsk_offline.quantizers.error_feedback import (
    Levels,
    round_block,
    round_in_a_loop,
    round_in_one_call,
)
from svsk_vllm.format import Codebook

needs_op = pytest.mark.skipif(
    round_block_obstacle() is not None, reason="the op cannot be built here"
)


def block(
    count: int, columns: int, n: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Work, coupling, pivots, scales (some of them 0) and values; near no tie."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scale = 0.1 + torch.rand(count, columns, n, generator=generator)
    scale[torch.rand(scale.shape, generator=generator) < 0.05] = 0
    coupling = 0.1 * random(count, columns, columns).triu()
    pivots = 0.5 + torch.rand(count, columns, generator=generator)
    return 3 * random(count, columns, n), coupling, pivots, scale, random(count, columns, n)


@needs_op
@pytest.mark.parametrize("levels", [Levels(), Levels(codebook="quad8"), Levels(-127, 127)])
@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(
    ("count", "columns", "n"),
    [(1, 1, 1), (1, 128, 64), (1, 7, 65), (3, 40, 5), (2, 129, 200)],
)
def test_one_call_does_what_the_loop_does(
    count: int, columns: int, n: int, descent: bool, levels: Levels
) -> None:
    work, coupling, pivots, scale, values = block(count, columns, n)
    given = values if descent else None
    expected, errors = round_in_a_loop(work.clone(), coupling, pivots, scale, levels, given)
    before = work.clone()
    found, moves = round_in_one_call(work, coupling, pivots, scale, levels, given)
    assert torch.equal(work, before)
    # The loop may fuse products and sums, so a near tie may fall the other way; none is here.
    assert torch.equal(found, expected)
    torch.testing.assert_close(moves, errors, rtol=1e-4, atol=1e-4)


@needs_op
def test_strided_and_expanded_tensors() -> None:
    """As the callers give them: slices of a larger matrix, and one scale for several columns."""
    work, coupling, pivots, scale, values = block(2, 50, 70)
    part = slice(10, 42)
    one = scale[:, :1].expand(2, 32, 70)
    arguments = work[:, part], coupling[:, part, part], coupling.diagonal(dim1=1, dim2=2)[:, part]
    arguments[2].add_(1)
    expected, _ = round_in_a_loop(
        arguments[0].clone(), *arguments[1:], one, Levels(), values[:, part]
    )
    found, _ = round_in_one_call(*arguments, one, Levels(), values[:, part])
    assert torch.equal(found, expected)
    turned = work.mT.contiguous().mT  # rows are not next to each other
    assert torch.equal(
        round_in_one_call(turned, coupling, pivots, scale, Levels())[0],
        round_in_one_call(work, coupling, pivots, scale, Levels())[0],
    )


@needs_op
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
def test_extremes_ties_and_what_is_not_a_number(codebook: Codebook) -> None:
    ratios = torch.tensor([0.0, -0.0, 0.5, 1.5, -2.5, 1e30, -1e30, 13.125, -16.0, torch.nan, 7.5])
    work = ratios.view(1, 1, -1)
    ones = torch.ones(1, 1, 1)
    levels = Levels(codebook=codebook)
    scale = ones.expand(1, 1, len(ratios))
    expected = round_in_a_loop(work.clone(), ones, ones[0], scale, levels)[0]
    found = round_in_one_call(work, ones, ones[0], scale, levels)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.isnan(), work.isnan())


@needs_op
def test_what_does_not_fit_is_refused() -> None:
    work, coupling, pivots, scale, _ = block(1, 4, 3)
    with pytest.raises(RuntimeError, match="shapes do not fit work"):
        round_in_one_call(work, coupling[:, :3], pivots, scale, Levels())
    with pytest.raises(RuntimeError, match="Double, expected float32"):
        round_in_one_call(work, coupling, pivots, scale.double(), Levels())


def test_without_a_compiler_it_is_slower_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(error_feedback, "round_block_obstacle", lambda: "there is no compiler")
    monkeypatch.setattr(
        error_feedback, "_has_op", error_feedback.lru_cache(error_feedback._has_op.__wrapped__)
    )
    work, coupling, pivots, scale, _ = block(1, 4, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, _ = round_block(work.clone(), coupling, pivots, scale, Levels())
    assert torch.equal(found, round_in_a_loop(work, coupling, pivots, scale, Levels())[0])
    assert [record.getMessage() for record in caplog.records] == [
        "Rounding in PyTorch, which is many times slower: there is no compiler"
    ]
