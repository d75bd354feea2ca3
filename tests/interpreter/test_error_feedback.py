# SPDX-License-Identifier: Apache-2.0
"""The kernel for a block of columns against the loop it stands for, in float64."""

import pytest
import torch

from svsk_kernels.gpu.error_feedback import feedback_block

QUAD8_LEVELS = torch.tensor([q * (8 + abs(q)) / 8 for q in range(-8, 8)], dtype=torch.float64)


def levels_of(low: int, high: int, quad8: bool) -> torch.Tensor:
    return QUAD8_LEVELS if quad8 else torch.arange(low, high + 1, dtype=torch.float64)


def nearest(ratio: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[(ratio.unsqueeze(-1) - levels).abs().argmin(-1)]


def reference(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    levels: torch.Tensor,
    values: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels, errors, and how far each ratio was from the border between two levels.

    One matrix, float64.
    """
    work, found, errors, margin = work.clone(), *(torch.zeros_like(work) for _ in range(3))
    borders = (levels[1:] + levels[:-1]) / 2
    for i in range(work.shape[0]):
        wanted = work[i] if values is None else values[i] + work[i] / pivots[i]
        ratio = torch.where(scale[i] == 0, 0.0, wanted / torch.where(scale[i] == 0, 1.0, scale[i]))
        margin[i] = (ratio.unsqueeze(-1) - borders).abs().amin(-1)
        found[i] = nearest(ratio, levels)
        value = found[i] * scale[i]
        errors[i] = (wanted - value) / pivots[i] if values is None else value - values[i]
        work[i + 1 :] -= coupling[i, i + 1 :, None] * errors[i]
    return found, errors, margin


def make(batch: int, count: int, n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coupling = torch.randn(batch, count, count, generator=generator) * 0.3 / count**0.5
    scale = 0.1 + torch.rand(batch, count, n, generator=generator)
    scale[:, 1, : n // 3] = 0.0
    return {
        "work": torch.randn(batch, count, n, generator=generator) * 3,
        "coupling": coupling.triu(1),
        "pivots": 0.5 + torch.rand(batch, count, generator=generator),
        "scale": scale,
    }


@pytest.mark.parametrize(
    ("batch", "count", "n", "grid"),
    [
        (1, 128, 40, (-8, 7, False)),
        (1, 128, 33, (-8, 7, True)),
        (3, 32, 20, (-127, 127, False)),
        (2, 5, 64, (-8, 7, False)),
        (1, 2, 1, (-8, 7, True)),
    ],
)
@pytest.mark.parametrize("descent", [False, True])
def test_every_column_is_the_loop(
    batch: int, count: int, n: int, grid: tuple[int, int, bool], descent: bool
) -> None:
    """Up to the first column of a row whose ratio float32 cannot tell from a border.

    From there on rows may differ.
    """
    given = make(batch, count, n, count)
    values = (
        torch.randn(batch, count, n, generator=torch.Generator().manual_seed(9))
        if descent
        else None
    )
    found, errors = feedback_block(*given.values(), *grid, values)
    compared = 0
    for a in range(batch):
        double = [tensor[a].double() for tensor in given.values()]
        wanted, wanted_errors, margin = reference(
            *double, levels_of(*grid), None if values is None else values[a].double()
        )
        clear = (margin > 1e-4).cumprod(0).bool()
        compared += int(clear.sum())
        assert torch.equal(found[a].double()[clear], wanted[clear])
        torch.testing.assert_close(
            errors[a].double()[clear], wanted_errors[clear], rtol=1e-4, atol=1e-4
        )
    assert compared > 0.8 * found.numel()


def test_halves_go_to_the_even_code_as_torch_rounds() -> None:
    ratio = torch.arange(-21, 21).float().div(2).view(1, 1, -1)
    one = torch.ones(1, 1)
    found, errors = feedback_block(
        ratio, one.unsqueeze(0), one, torch.ones_like(ratio), -8, 7, False
    )
    assert torch.equal(found, ratio.round().clamp(-8, 7))
    assert torch.equal(errors, ratio - found)


def test_quad8_levels_of_far_and_tiny_ratios() -> None:
    ratio = torch.tensor([-1e30, -16.1, -0.0, 1e-30, 0.57, 13.0, 1e30, torch.inf]).view(1, 1, -1)
    one = torch.ones(1, 1)
    found, _ = feedback_block(ratio, one.unsqueeze(0), one, torch.ones_like(ratio), -8, 7, True)
    expected = nearest(ratio.double().clamp(-100, 100), QUAD8_LEVELS).float()
    assert torch.equal(found, expected)


def test_scales_may_be_expanded() -> None:
    given = make(2, 16, 24, 3)
    scale = given["scale"][:, :1, :]
    expanded = feedback_block(*list(given.values())[:3], scale.expand(2, 16, 24), -8, 7, False)
    whole = feedback_block(
        *list(given.values())[:3], scale.expand(2, 16, 24).contiguous(), -8, 7, False
    )
    assert all(map(torch.equal, expanded, whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pivots": torch.ones(1, 3)},
            r"pivots: expected float32 \[1, 4\], got torch.float32 \[1, 3\]",
        ),
        ({"work": torch.ones(1, 4, 8).double()}, "work: expected float32"),
        ({"scale": torch.ones(1, 8, 4).mT}, "contiguous"),
        (
            {
                name: torch.ones(1, 129, size)
                for name, size in (("work", 8), ("coupling", 129), ("scale", 8))
            }
            | {"pivots": torch.ones(1, 129)},
            "129 columns, expected 1 to 128",
        ),
    ],
)
def test_wrong_tensors(change: dict[str, torch.Tensor], message: str) -> None:
    given = make(1, 4, 8, 0) | change
    with pytest.raises(ValueError, match=message):
        feedback_block(*given.values(), -8, 7, False)


def test_nothing_to_round() -> None:
    levels, errors = feedback_block(
        torch.ones(1, 4, 0),
        torch.ones(1, 4, 4),
        torch.ones(1, 4),
        torch.ones(1, 4, 0),
        -8,
        7,
        False,
    )
    assert levels.shape == errors.shape == (1, 4, 0)
