# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe: the settings of a method, of calibration, of a bit budget."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from svsk_kernels.tile_grid import TileGrid
from svsk_vllm.format.config import MAX_RANK, ScaleBits, Strict

__all__ = [
    "AllocationArgs",
    "AlternatingArgs",
    "CalibrationArgs",
    "GradientArgs",
    "PublishedArgs",
    "SinkArgs",
    "SmoothingArgs",
    "TableArgs",
    "ranks_that_pay",
]


class PublishedArgs(Strict):
    """The original method: rounding by channel importance, a sidecar by channel energy.

    Rounding searches the scale of each group over clipped maxima; the error of weight j counts
    ``clip((E[x_j^2] / mean_j E[x_j^2]) ** alpha, *importance_clip)``. The sidecar is a truncated
    SVD of what is left, columns weighted by ``sqrt(E[x_j^2] + ridge * mean)``.
    """

    alpha: float = Field(default=0.5, ge=0, le=2)
    importance_clip: tuple[float, float] = (0.25, 4.0)
    clip_grid: tuple[float, ...] = Field(
        default=(1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), min_length=1
    )
    ridge: float = Field(default=1e-4, gt=0)

    @field_validator("clip_grid")
    @classmethod
    def _holds_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value or any(not 0 < clip <= 1 for clip in value):
            raise ValueError(
                f"expected factors in (0, 1] with 1.0 among them (plain rounding), got {value}"
            )
        return value


class AlternatingArgs(Strict):
    """Base and sidecar under the input's Hessian, each fitted to what the other leaves.

    The base is error feedback (GPTQ with static groups, activation order).

    Attributes:
        scales: least weighted error, or each group's largest magnitude.
        damping: of the base's Hessian, relative to the mean of its diagonal.
        ridge: of each tile's block of the Hessian in the sidecar's fit, relative likewise.
        rounds: of base and sidecar, each fitted from scratch.
        polish: rounds at the end that refit all scales together and move single codes.
        aim: largest share of what its inputs lack in the quantised model that a weight makes up
            for: it is fitted to the dense model's outputs; how much does most is decided on samples
            that are held out. Above 0 a block's linears are taken one input after another, each
            with the inputs that the quantised ones before it give.
    """

    scales: Literal["search", "absmax"] = "search"
    damping: float = Field(default=0.01, gt=0)
    ridge: float = Field(default=1e-4, gt=0)
    rounds: int = Field(default=3, ge=1)
    polish: int = Field(default=0, ge=0)
    aim: float = Field(default=0.0, ge=0, le=1)


class SinkArgs(Strict):
    """Extra weight of the first token in the Hessians of the modules named.

    Every later token attends to the first one (the attention sink), so its error is felt coherently
    everywhere.
    """

    weight: float = Field(default=0.0, ge=0)
    targets: tuple[str, ...] = (r"re:.*\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value)$",)


class GradientArgs(Strict):
    """Weights from the gradient of the model's own loss, by one more pass over the text.

    A token counts in a linear's Hessian in proportion to ``|g_t| ** (2 token_power)``, g_t the
    gradient of the linear's output at that token; a row of the weight counts in the sidecar's fit
    in proportion to ``E[g_tn^2] ** row_power``. 0 is off: all count the same.

    Attributes:
        directions: directions of the output in which the sidecar's fit counts errors of several
            features together, those of the largest mean squared gradient; 0 counts each feature for
            itself.
        shared: one weighting of tokens for all linears of one input: fewer Hessians.
        samples: calibration samples to measure with, None for all; all with ``token_power``.
    """

    token_power: float = Field(default=0.0, ge=0, le=1)
    row_power: float = Field(default=0.0, ge=0, le=1)
    directions: int = Field(default=0, ge=0, le=4096)
    shared: bool = False
    samples: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _whole_gradients(self) -> Self:
        if self.directions and self.row_power != 1:
            raise ValueError(
                f"directions {self.directions} beside row_power {self.row_power}: directions are of"
                " the gradients as they are. Set row_power to 1, or directions to 0"
            )
        return self


_RANKS: Final = (0, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128)
_LARGE_RANKS: Final = (160, 192, 224, 256, 320, 384, 448, 512)
_LARGE_SIDE: Final = 4096
_SIDE_PER_LARGE_RANK: Final = 16
"""A square tile of so many rows per rank spends half a bit per weight on 4-bit factors: more is
better spent on the base."""


def ranks_that_pay(grid: TileGrid) -> tuple[int, ...]:
    """Ranks that a matrix may be given where a recipe names none.

    Up to 128; in tiles of 4096 rows and columns or more, up to a sixteenth of the shorter side.
    """
    side = min(grid.tile_rows, grid.n, grid.tile_cols, grid.k)
    most = side // _SIDE_PER_LARGE_RANK if side >= _LARGE_SIDE else 0
    return (*_RANKS, *(rank for rank in _LARGE_RANKS if rank <= most))


class AllocationArgs(Strict):
    """What is chosen per matrix under a budget of bits per weight.

    Every group size comes with every ``scale_bits``. With ``includes: [head]`` the output head's
    bits and weights count in ``target_bpw``.

    Attributes:
        ranks: None for those of :meth:`ranks_for`.
    """

    target_bpw: float = Field(gt=4, le=8)
    ranks: tuple[Annotated[int, Field(ge=0, le=MAX_RANK)], ...] | None = None
    factor_bits: tuple[Literal[4, 8], ...] = (4,)
    group_sizes: tuple[Literal[16, 32, 64], ...] = (64, 32)
    scale_bits: tuple[ScaleBits, ...] = (16,)
    includes: tuple[Literal["head"], ...] = ()

    @field_validator("ranks", "factor_bits", "group_sizes", "scale_bits")
    @classmethod
    def _not_empty(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value or len(set(value)) != len(value):
            raise ValueError(f"expected one or more different values, got {value}")
        return value

    @model_validator(mode="after")
    def _ranks_pack(self) -> Self:
        if 4 in self.factor_bits and any(rank % 2 for rank in self.ranks or ()):
            raise ValueError(f"ranks {self.ranks}: with 4-bit factors every rank must be even")
        return self

    @property
    def largest_rank(self) -> int:
        """Of any matrix, however large."""
        return max(self.ranks or _LARGE_RANKS)

    def ranks_for(self, grid: TileGrid) -> tuple[int, ...]:
        """What a matrix may be given: the ranks of the recipe, or those that can pay."""
        return ranks_that_pay(grid) if self.ranks is None else self.ranks


class TableArgs(Strict):
    """How the embedding table and the output head are stored.

    ``int8`` rounds to 8 bits, a scale for 64 weights: near lossless. ``svsk`` runs the recipe's
    quantiser on the head, with the Hessian of the final norm's output. ``mixed-int8``, the
    original's scheme, rounds the rows of common tokens to 8 bits and the others to 4. ``auto`` is
    ``int8``, or ``dense`` where a model's matrix cannot be quantised, or is on the ignore list.

    Attributes:
        head: of the output head.
        embedding: of the table. Where the model ties the two, ``auto`` of one is what the other
            is, and they are stored once.
        rank: of the sidecar of a head ``svsk``, over the whole matrix, with 4-bit factors.
        hot_rows: of ``mixed-int8``: rows in 8 bits.
    """

    head: Literal["auto", "int8", "mixed-int8", "svsk", "dense"] = "auto"
    embedding: Literal["auto", "int8", "mixed-int8", "dense"] = "auto"
    rank: int = Field(default=32, ge=0, le=MAX_RANK, multiple_of=2)
    hot_rows: int = Field(default=8000, ge=1, strict=True)


class SmoothingArgs(Strict):
    """What is moved from activations into weights before anything is quantised.

    Attributes:
        alpha: how much of every channel's scale moves, 0 to 1 (SmoothQuant's).
        above: instead, only channels whose largest magnitude is over this many times the median of
            their tensor's move, and only down to that, or by a factor of 4. With neither, inputs
            are left alone.
        targets: whose inputs: ``norms`` for linears that read a norm, ``o`` for o_proj, ``down``
            for down_proj.
        keys: even out the channels of keys, for key caches of few bits.
    """

    alpha: float | None = Field(default=None, ge=0, le=1)
    above: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    targets: tuple[Literal["norms", "o", "down"], ...] = ("norms", "o", "down")
    keys: bool = False

    @field_validator("targets")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"expected one or more of norms, o and down, got {value}")
        return value

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.inputs or self.keys):
            raise ValueError("smooths nothing. Say above (4), alpha (0.7), or keys: true")
        if self.alpha is not None and self.above is not None:
            raise ValueError(
                f"alpha ({self.alpha}) and above ({self.above}) are two rules for the same factors."
                " Leave one of them out"
            )
        return self

    @property
    def inputs(self) -> bool:
        """Whether inputs of linears are smoothed."""
        return self.alpha is not None or self.above is not None


class CalibrationArgs(Strict):
    """How much text the statistics are taken from.

    Attributes:
        samples: None for as many as the model's widest layer needs.
        tokens_per_input: how many tokens it needs for each of its inputs.
    """

    samples: int | None = Field(default=None, ge=1)
    tokens_per_input: int = Field(default=16, ge=2)
    seq_len: int = Field(default=512, ge=16)
    seed: int = Field(default=0, ge=0)
    sequential: bool = False  # each block sees the outputs of the quantised blocks before it
