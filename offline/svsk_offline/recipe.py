# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a model is quantised, as a few lines of YAML."""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from svsk_kernels.errors import SvskError
from svsk_vllm.format import SidecarArgs, WeightArgs
from svsk_vllm.format.config import MAX_RANK, matches

__all__ = [
    "AaBase",
    "AllocationArgs",
    "CalibrationArgs",
    "DiagonalFit",
    "GptqBase",
    "GradientArgs",
    "HessianFit",
    "Recipe",
    "SinkArgs",
    "load_recipe",
    "recipe_names",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AaBase(_Strict):
    """Activation-aware round-to-nearest: the scale of each group is searched over clipped maxima.

    The error of weight j counts ``clip((E[x_j^2] / mean_j E[x_j^2]) ** alpha, *importance_clip)``.
    """

    method: Literal["aa"] = "aa"
    alpha: float = Field(default=0.5, ge=0, le=2)
    importance_clip: tuple[float, float] = (0.25, 4.0)
    clip_grid: tuple[float, ...] = Field(
        default=(1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), min_length=1
    )

    @field_validator("clip_grid")
    @classmethod
    def _starts_at_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value or any(not 0 < clip <= 1 for clip in value):
            raise ValueError(
                f"expected factors in (0, 1] with 1.0 among them (plain rounding), got {value}"
            )
        return value


class DiagonalFit(_Strict):
    """Sidecar from a truncated SVD of the residual, columns weighted by ``sqrt(E[x_j^2] + ridge * mean)``."""

    method: Literal["diagonal"] = "diagonal"
    ridge: float = Field(default=1e-4, gt=0)


class GptqBase(_Strict):
    """Error feedback under the Hessian of the input (GPTQ with static groups, activation order)."""

    method: Literal["gptq"] = "gptq"
    scales: Literal["search", "absmax"] = (
        "search"  # the least weighted error, or each group's largest magnitude
    )
    damping: float = Field(default=0.01, gt=0)  # relative to the mean of the Hessian's diagonal
    polish: int = Field(
        default=0, ge=0
    )  # rounds at the end that refit all scales together and move single codes


class HessianFit(_Strict):
    """Sidecar fitted under the full Hessian, alternating with the base."""

    method: Literal["hessian"] = "hessian"
    ridge: float = Field(default=1e-4, gt=0)
    rounds: int = Field(
        default=3, ge=1
    )  # of base and sidecar, each fitted from scratch to what the other leaves


class SinkArgs(_Strict):
    """Extra weight of the first token in the Hessians of the modules named.

    Every later token attends to the first one (the attention sink), so its error is felt coherently
    everywhere.
    """

    weight: float = Field(default=0.0, ge=0)
    targets: tuple[str, ...] = (r"re:.*\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value)$",)


class GradientArgs(_Strict):
    """Weights from the gradient of the model's own loss, one more pass over the calibration text, there and back.

    A token counts in a linear's Hessian in proportion to ``|g_t| ** (2 token_power)``, g_t the
    gradient of the linear's output at that token; a row of the weight counts in the sidecar's fit
    in proportion to ``E[g_tn^2] ** row_power``. 0 is off: all count the same.
    """

    token_power: float = Field(default=0.0, ge=0, le=1)
    row_power: float = Field(default=0.0, ge=0, le=1)
    shared: bool = False  # one weighting for all linears of one input: fewer Hessians
    samples: int | None = Field(
        default=None, ge=1
    )  # calibration samples to measure with; all where token_power is on


class AllocationArgs(_Strict):
    """Rank, factor bits and group size per matrix under a bit budget.

    Without a target all are as the recipe says.
    """

    target_bpw: float | None = Field(default=None, gt=4, le=8)
    ranks: tuple[Annotated[int, Field(ge=0, le=MAX_RANK)], ...] = (
        0,
        8,
        16,
        24,
        32,
        40,
        48,
        64,
        80,
        96,
        128,
    )
    factor_bits: tuple[Literal[4, 8], ...] = (4,)
    group_sizes: tuple[Literal[32, 64], ...] = (64, 32)

    @field_validator("ranks", "factor_bits", "group_sizes")
    @classmethod
    def _not_empty(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"expected one or more different values, got {value}")
        return value

    @model_validator(mode="after")
    def _ranks_pack(self) -> "AllocationArgs":
        if 4 in self.factor_bits and any(rank % 2 for rank in self.ranks):
            raise ValueError(f"ranks {self.ranks}: with 4-bit factors every rank must be even")
        return self


class CalibrationArgs(_Strict):
    """How much text the statistics are taken from."""

    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=16)
    seed: int = Field(default=0, ge=0)
    sequential: bool = False  # each block sees the outputs of the quantised blocks before it


class Recipe(_Strict):
    """Everything that decides the bytes of a checkpoint, apart from the model and the calibration text."""

    name: str
    description: str = ""
    weights: WeightArgs = WeightArgs()
    sidecar: SidecarArgs = SidecarArgs(rank=16)
    base: AaBase | GptqBase = Field(default=AaBase(), discriminator="method")
    fit: DiagonalFit | HessianFit = Field(default=DiagonalFit(), discriminator="method")
    sink: SinkArgs = SinkArgs()
    gradients: GradientArgs = GradientArgs()
    allocation: AllocationArgs = AllocationArgs()
    calibration: CalibrationArgs = CalibrationArgs()
    ignore: tuple[str, ...] = ("lm_head",)

    @model_validator(mode="after")
    def _fit_has_its_statistics(self) -> "Recipe":
        if isinstance(self.base, AaBase):
            if isinstance(self.fit, HessianFit) or self.sink.weight:
                raise ValueError("base.method aa goes with fit.method diagonal and no sink weight")
            if self.needs_gradients:
                raise ValueError("base.method aa goes without gradients and allocation")
        if isinstance(self.base, GptqBase) and isinstance(self.fit, DiagonalFit):
            raise ValueError("base.method gptq goes with fit.method hessian")
        return self

    def sink_weight(self, name: str) -> float:
        """Extra weight of the first token in the Hessian of the linear ``name``.

        0 where it has none.
        """
        return self.sink.weight if matches(name, self.sink.targets) else 0.0

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradient of the model's loss must be taken first."""
        rows = self.gradients.row_power and self.sidecar.rank
        return bool(self.gradients.token_power or rows) or self.allocation.target_bpw is not None

    @property
    def needs_hessians(self) -> bool:
        """Whether calibration must keep whole second-moment matrices."""
        return isinstance(self.base, GptqBase)

    def override(self, changes: Mapping[str, Mapping[str, Any] | tuple[str, ...]]) -> "Recipe":
        """A copy with some values replaced and checked again; None leaves a value as it is.

        Args:
            changes: section name to a mapping of key to value, or ``ignore`` to more ignore
                entries.
        """
        raw = self.model_dump(mode="python")
        for section, values in changes.items():
            if isinstance(values, Mapping):
                raw[section] |= {key: value for key, value in values.items() if value is not None}
            else:
                raw[section] = tuple(raw[section]) + values
        return _parse(raw, f"recipe {self.name}")

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's values, name and description left out."""
        values = self.model_dump(mode="json", exclude={"name", "description"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parse(raw: Any, source: str) -> Recipe:
    if not isinstance(raw, dict):
        raise SvskError(f"{source}: holds a {type(raw).__name__}, expected a mapping of sections.")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (got {item['input']!r})"
            for item in error.errors()
        )
        raise SvskError(f"{source}: {problems}.") from error


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("svsk_offline") / "recipes"
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a YAML file.

    Raises:
        SvskError: there is no such recipe or file, or it is not a valid recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise SvskError(
                f"Recipe {path}: no such file. Shipped recipes: {', '.join(recipe_names())}."
            )
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = (resources.files("svsk_offline") / "recipes" / f"{name}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        raise SvskError(
            f"Recipe {name!r} is not one of {', '.join(recipe_names())}, nor a file ending in"
            " .yaml."
        )
    try:
        return _parse(yaml.safe_load(text), f"recipe {name}")
    except yaml.YAMLError as error:
        raise SvskError(f"Recipe {name}: not valid YAML: {error}.") from error
