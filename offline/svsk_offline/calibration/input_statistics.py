# SPDX-License-Identifier: Apache-2.0
"""Second moments of a linear's input."""

import copy
from typing import Final

import torch

from svsk_kernels.cpu.processor import has_bf16_products
from svsk_offline.precision import exact_bfloat16
from svsk_offline.world import World

__all__ = ["InputStatistics", "multiplied_exactly"]

_PANELS: Final = 4
"""More would leave out more of the products, but make them narrower and so slower."""


class InputStatistics:
    """Second moments of one linear's input, accumulated in float32 sample by sample.

    Args:
        features: number of input channels K.
        device: where the inputs are.
        full: keep the whole matrix ``E[x x^T]``; otherwise only its diagonal.
        first: keep that of the first tokens apart as well.
    """

    def __init__(
        self, features: int, device: torch.device, *, full: bool, first: bool = False
    ) -> None:
        shape = (features, features) if full else (features,)
        self._sum = torch.zeros(shape, device=device)
        self._first = torch.zeros(shape, device=device) if first else None
        self._weight = 0.0
        self.tokens = 0  # taken in by :meth:`add`
        self._samples = 0
        self._settled = False  # the sums have become means

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in the inputs of some samples.

        Args:
            inputs: float [samples, tokens, K], or [tokens, K] without first tokens.
            weights: how much each token counts, float [samples, tokens] or [tokens]; None is 1
                each.

        Raises:
            ValueError: :attr:`hessian` has been read.
        """
        if self._settled:
            raise ValueError("The Hessian has been read; nothing can be taken in after that.")
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        self.tokens += rows.shape[0]
        if weights is None:
            self._weight += rows.shape[0]
            if not multiplied_exactly(rows.device, rows.dtype):
                rows = rows.float()
        else:
            # The root on both factors of x x^T gives the weight once. Its product with what came
            # in 16 bits does not fit into 16 bits.
            rows = rows.float()
            rows = rows * weights.reshape(-1, 1).to(rows).sqrt()
            self._weight += float(weights.sum())
        self._accumulate(self._sum, rows)
        # A flattened input does not say where samples begin.
        if inputs.ndim == 3 and self._first is not None:
            self._accumulate(self._first, inputs.detach()[:, 0].float())
            self._samples += inputs.shape[0]

    def add_up(self, world: World, owner: int | None, factor: float = 1.0) -> None:
        """Add up what all processes took in.

        Args:
            world: the processes, which all come here.
            owner: the one that gets the sums, at the others nothing may be read afterwards; None
                for all of them.
            factor: of this process's sums, a power of two.

        Raises:
            ValueError: :attr:`hessian` has been read.
        """
        if self._settled:
            raise ValueError("The Hessian has been read; nothing can be taken in after that.")
        if world.size == 1:
            return
        totals = (self._sum, self._first)
        for total in totals:
            if total is not None and factor != 1:
                total *= factor
        counts = (self._weight, self.tokens, self._samples)
        self._weight, tokens, samples = world.add_up(totals, counts, owner)
        self.tokens, self._samples = int(tokens), int(samples)

    def empty(self) -> "InputStatistics":
        """Statistics of the same kind that have taken in nothing; first tokens are left out."""
        other = copy.copy(self)
        other._sum, other._first = torch.zeros_like(self._sum), None
        other._weight, other.tokens, other._samples, other._settled = 0.0, 0, 0, False
        return other

    def take_in(self, other: "InputStatistics") -> None:
        """Add what others have taken in, first tokens left out.

        Raises:
            ValueError: :attr:`hessian` has been read, here or of the other.
        """
        if self._settled or other._settled:
            raise ValueError("The Hessian has been read; nothing can be taken in after that.")
        self._sum += other._sum
        self._weight += other._weight
        self.tokens += other.tokens

    def fill_up(self, pool: "InputStatistics", wanted: int) -> None:
        """Let a pool stand in for the tokens that are missing.

        The means become ``(n M + (wanted - n) P) / wanted`` for n tokens of mean M and the pool's
        mean P; with ``wanted`` tokens or more nothing changes.

        Raises:
            ValueError: :attr:`hessian` has been read, here or of the pool.
        """
        if self._settled or pool._settled:
            raise ValueError("The Hessian has been read; nothing can be taken in after that.")
        missing = wanted - self.tokens
        if missing <= 0:
            return
        self._sum *= self.tokens / wanted / self._divisor()
        self._sum.add_(pool._sum, alpha=missing / wanted / pool._divisor())
        self._weight = 1.0

    @staticmethod
    def _accumulate(total: torch.Tensor, rows: torch.Tensor) -> None:
        if total.ndim == 1:
            total += rows.float().square().sum(0)
            return
        # Only the block upper triangle, panel by panel: 5/8 of the products.
        k = rows.shape[1]
        width = _panel_width(k)
        for start in range(0, k, width):
            stop = min(start + width, k)
            left, right = rows[:, start:stop].T, rows[:, start:]
            if rows.dtype == torch.float32:
                total[start:stop, start:].addmm_(left, right)
            else:
                _add_wide_product(total[start:stop, start:], left, right)

    @property
    def second_moment(self) -> torch.Tensor:
        """``E[x_j^2]``, float32 [K]."""
        diagonal = self._sum.diagonal() if self._sum.ndim == 2 else self._sum
        return diagonal / self._divisor()

    @property
    def hessian(self) -> torch.Tensor:
        """``E[x x^T]`` over all tokens, by their weights, float32 [K, K].

        The same tensor each time, made of the sums in place: a copy is what a GPU may not have room
        for. Nothing can be taken in afterwards.
        """
        if not self._settled:
            self._settle()
        return self._sum

    @property
    def first_hessian(self) -> torch.Tensor:
        """``E[x x^T]`` over the first token of each sample, float32 [K, K]; as :attr:`hessian`."""
        if self._first is None:
            raise ValueError(
                "First tokens were not kept apart; create the statistics with first=True."
            )
        if not self._settled:
            self._settle()
        return self._first

    def _divisor(self) -> float:
        # 1 where nothing was taken in: all zero, not NaN
        return 1.0 if self._settled else self._weight or 1.0

    def _settle(self) -> None:
        """Turn the sums into whole matrices of means."""
        if self._sum.ndim != 2:
            raise ValueError(
                "Only the diagonal was accumulated; create the statistics with full=True."
            )
        _mirror(self._sum)
        self._sum /= self._divisor()
        if self._first is not None:
            _mirror(self._first)
            self._first /= max(1, self._samples)
        self._settled = True


def multiplied_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device's matrix units multiply a dtype without rounding, and add in float32.

    A product of two bfloat16 or float16 numbers has at most 22 bits, so it is exact in float32: the
    tensor cores of NVIDIA's GPUs, and the bfloat16 units of CPUs, give the sums of the float32
    product several times as fast.
    """
    if device.type == "cpu":
        return dtype == torch.bfloat16 and has_bf16_products()
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
    )


def _add_wide_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a product of 16-bit matrices, summed in float32, to a float32 matrix in place."""
    if total.device.type == "cpu":
        # PyTorch has no product of bfloat16 given in float32 here, but it has one of float32
        # numbers rounded to bfloat16, which these are already.
        with exact_bfloat16():
            total.addmm_(left.float(), right.float())
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


def _mirror(total: torch.Tensor) -> None:
    """Fill the lower triangle of a [K, K] whose upper one is known, in place."""
    k = len(total)
    width = _panel_width(k)
    for start in range(0, k, width):
        stop = min(start + width, k)
        total[stop:, start:stop] = total[start:stop, stop:].T
        corner = total[start:stop, start:stop].triu()
        total[start:stop, start:stop] = corner + corner.triu(1).T


def _panel_width(k: int) -> int:
    return -(-k // _PANELS)
