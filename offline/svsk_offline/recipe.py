# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a model is quantised, as a few lines of YAML.

A recipe names a method, ``published`` or ``alternating``, and has a section of that name with the
method's own settings. What a method does not know cannot be said, and a file that sets a key
without effect is refused.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import ValidationError, field_validator

from svsk_kernels.errors import SvskError
from svsk_offline.recipe_files import recipe_names, recipe_text
from svsk_offline.recipe_sections import (
    AllocationArgs,
    AlternatingArgs,
    CalibrationArgs,
    GradientArgs,
    PublishedArgs,
    SinkArgs,
    SmoothingArgs,
    TableArgs,
)
from svsk_vllm.format import SidecarArgs, WeightArgs
from svsk_vllm.format.config import Strict
from svsk_vllm.format.problems import problem_text
from svsk_vllm.format.targets import matches

__all__ = [
    "USUAL_IGNORE",
    "AllocationArgs",
    "AlternatingArgs",
    "AlternatingRecipe",
    "CalibrationArgs",
    "GradientArgs",
    "PublishedArgs",
    "PublishedRecipe",
    "Recipe",
    "SinkArgs",
    "SmoothingArgs",
    "TableArgs",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
]

USUAL_IGNORE: Final = (
    r"re:.*(shared_expert_gate|router(\.gate)?|(mlp|feed_forward|block_sparse_moe)\.gate"
    r"|kv_b_proj|in_proj_[ab]|in_proj_ba)$",
)
"""What recipes leave alone in every model that has it; of output heads ``tables`` says it.

Routers and small gates decide more than they weigh: an error in them sends a token another way.
``kv_b_proj`` of latent attention is taken apart by engines, which need it dense.
"""


class _Recipe(Strict):
    """What recipes of both methods say: with model and text, it decides every stored byte."""

    name: str
    description: str = ""
    method: str
    weights: WeightArgs = WeightArgs()
    sidecar: SidecarArgs = SidecarArgs(rank=16)
    calibration: CalibrationArgs = CalibrationArgs()
    ignore: tuple[str, ...] = USUAL_IGNORE
    tables: TableArgs = TableArgs()
    smoothing: SmoothingArgs | None = None
    activations: Literal["exact", "int8"] = "exact"  # what the checkpoint recommends to serve with

    @field_validator("weights")
    @classmethod
    def _four_bits(cls, value: WeightArgs) -> WeightArgs:
        if value.num_bits != 4:
            raise ValueError(f"codebook {value.codebook} {_EIGHT_BITS}")
        if value.hot_rows:
            raise ValueError(f"hot_rows {value.hot_rows}: of tables only. Say tables.hot_rows")
        return value

    @classmethod
    def checked(cls, raw: Mapping[str, Any], source: str) -> Self:
        """A recipe of these values.

        Raises:
            SvskError: there is none; ``source`` and every wrong key are named.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = "; ".join(map(_problem, error.errors()))
            raise SvskError(f"{source}: {problems}.") from error

    @property
    def largest_rank(self) -> int:
        """Of any sidecar that the recipe can give."""
        return self.sidecar.rank

    @property
    def target_bpw(self) -> float | None:
        """Bits per weight that may be spent; None without a budget."""
        return None

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradient of the model's loss must be taken first."""
        return False

    @property
    def sequential(self) -> bool:
        """Whether each block sees the outputs of the quantised blocks before it."""
        return self.calibration.sequential

    def without_budget(self) -> Self:
        """A copy that gives all linears one scheme."""
        return self

    @property
    def idle(self) -> dict[str, str]:
        """Keys whose value changes nothing, by ``section.key``, and why."""
        keys = ("sidecar.tile_m", "sidecar.tile_n", "sidecar.num_bits", f"{self.method}.ridge")
        idle = {} if self.largest_rank else dict.fromkeys(keys, _NO_SIDECAR)
        if self.tables.head != "svsk":
            idle["tables.rank"] = f"with tables.head {self.tables.head}"
        if "mixed-int8" not in (self.tables.head, self.tables.embedding):
            idle["tables.hot_rows"] = "without a table that is mixed-int8"
        if self.smoothing is not None and not self.smoothing.inputs:
            idle["smoothing.targets"] = "without smoothing.alpha or smoothing.above"
        return idle

    def override(self, changes: Mapping[str, Mapping[str, Any] | tuple[str, ...]]) -> Self:
        """A copy with some values replaced and checked again; None leaves a value as it is.

        Args:
            changes: section name to a mapping of key to value, or ``ignore`` to more ignore
                entries.
        """
        raw = self.model_dump(mode="python")
        for section, values in changes.items():
            if isinstance(values, Mapping):
                given = {key: value for key, value in values.items() if value is not None}
                raw |= {section: (raw.get(section) or {}) | given} if given else {}
            else:
                raw[section] = tuple(raw[section]) + values
        return self.checked(raw, f"recipe {self.name}")

    def refuse_idle(self, given: Mapping[str, str], source: str = "") -> None:
        """Refuse values that were given and change nothing.

        Args:
            given: what the user calls each of them, by ``section.key``.
            source: where they were given, in front of the message.

        Raises:
            SvskError: there are some.
        """
        reasons: dict[str, list[str]] = {}
        for key, why in self.idle.items():
            if key in given:
                reasons.setdefault(why, []).append(given[key])
        if reasons:
            problems = (f"{', '.join(names)}: no effect {why}" for why, names in reasons.items())
            raise SvskError(f"{source}{'; '.join(problems)}. Leave that out.")

    def written(self) -> dict[str, Any]:
        """What :func:`parse_recipe` reads back: every value that has an effect, as JSON."""
        raw = self.model_dump(mode="json", exclude_none=True)
        _leave_out(raw, self.idle)
        return raw

    def values(self) -> dict[str, Any]:
        """Every value that has an effect, as JSON; name and description left out."""
        written = self.written()
        return {key: written[key] for key in written if key not in ("name", "description")}

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`values`."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()


class PublishedRecipe(_Recipe):
    """A recipe of the original method, which knows neither sink, gradients nor a bit budget."""

    method: Literal["published"] = "published"
    published: PublishedArgs = PublishedArgs()


class AlternatingRecipe(_Recipe):
    """A recipe that fits base and sidecar in turn under whole Hessians."""

    method: Literal["alternating"] = "alternating"
    alternating: AlternatingArgs = AlternatingArgs()
    sink: SinkArgs = SinkArgs()
    gradients: GradientArgs = GradientArgs()
    allocation: AllocationArgs | None = None

    @property
    def largest_rank(self) -> int:
        return self.allocation.largest_rank if self.allocation else self.sidecar.rank

    @property
    def target_bpw(self) -> float | None:
        return self.allocation.target_bpw if self.allocation else None

    def without_budget(self) -> Self:
        return self.model_copy(update={"allocation": None})

    @property
    def idle(self) -> dict[str, str]:
        idle = super().idle
        if not self.largest_rank:
            settings = ("alternating.rounds", "gradients.row_power", "gradients.directions")
            idle |= dict.fromkeys(settings, _NO_SIDECAR)
        if self.allocation is not None:
            idle |= dict.fromkeys(("sidecar.rank", "sidecar.num_bits"), _CHOSEN)
        if self.alternating.aim:
            idle["calibration.sequential"] = "beside alternating.aim, which is always sequential"
        if not self.sink.weight:
            idle["sink.targets"] = "without sink.weight"
        if not self.gradients.token_power:
            idle["gradients.shared"] = "without gradients.token_power"
        if self.gradients.token_power:
            idle["gradients.samples"] = "beside gradients.token_power, which measures all samples"
        elif not self.needs_gradients:
            idle["gradients.samples"] = "where no gradient is measured"
        return idle

    @property
    def sequential(self) -> bool:
        return self.calibration.sequential or self.alternating.aim > 0

    def sink_weight(self, name: str) -> float:
        """Extra weight of the first token in the Hessian of the linear ``name``, 0 for none."""
        return self.sink.weight if matches(name, self.sink.targets) else 0.0

    @property
    def needs_gradients(self) -> bool:
        rows = self.gradients.row_power and self.largest_rank
        return bool(self.gradients.token_power or rows) or self.allocation is not None


Recipe = PublishedRecipe | AlternatingRecipe

_METHODS: Final[dict[str, type[Recipe]]] = {
    "published": PublishedRecipe,
    "alternating": AlternatingRecipe,
}
_EIGHT_BITS: Final = "has 8 bits, which only tables.head and tables.embedding may have"
_NO_SIDECAR: Final = "at rank 0, which has no sidecar"
_CHOSEN: Final = "under a bit budget, which chooses it per matrix"

_FORMER: Final = {("aa", "diagonal"): "published", ("gptq", "hessian"): "alternating"}
"""Methods by the base and the fit that recipe files once named apart."""


def parse_recipe(raw: Any, source: str) -> Recipe:
    """Check the values of a recipe file.

    Raises:
        SvskError: they are no recipe's, or some have no effect; ``source`` is named.
    """
    if not isinstance(raw, dict):
        raise SvskError(f"{source}: holds a {type(raw).__name__}, expected a mapping of sections.")
    if "method" not in raw or "base" in raw or "fit" in raw:
        raise SvskError(_former(raw, source))
    kind = _METHODS.get(str(raw["method"]))
    if kind is None:
        raise SvskError(
            f"{source}: method: expected published or alternating, got {raw['method']!r}."
        )
    recipe = kind.checked(raw, source)
    recipe.refuse_idle({key: key for key in recipe.idle if _says(raw, key)}, f"{source}: ")
    return recipe


def _problem(item: Any) -> str:
    key = ".".join(map(str, item["loc"]))
    methods = [name for name, kind in _METHODS.items() if key in kind.model_fields]
    if item["type"] == "extra_forbidden" and methods:
        return f"{key}: goes with method {methods[0]} only"
    return f"{key}: {problem_text(item)}"


def _says(raw: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return isinstance(raw.get(section), dict) and name in raw[section]


def _leave_out(raw: dict[str, Any], keys: Mapping[str, str]) -> list[str]:
    """Take keys out of the sections of a recipe; which ones it had."""
    present = [key for key in keys if _says(raw, key)]
    for key in present:
        section, _, name = key.partition(".")
        del raw[section][name]
    return present


def _former(raw: dict[str, Any], source: str) -> str:
    """What to say of a file in the form that named base and fit apart: the same in today's form."""
    parts = {"base": {"method": "aa"}, "fit": {"method": "diagonal"}} | copy.deepcopy(raw)
    base, fit = parts.pop("base"), parts.pop("fit")
    if not (isinstance(base, dict) and isinstance(fit, dict)):
        return f"{source}: base: or fit: is no mapping. Say method: published or alternating."
    names = base.pop("method", "aa"), fit.pop("method", "diagonal")
    method = parts.pop("method", None) or _FORMER.get(names)
    if method not in _METHODS:
        return (
            f"{source}: base {names[0]} with fit {names[1]} is no method. Say method: published or"
            " method: alternating, with a section of that name for its settings."
        )
    head = {key: parts.pop(key) for key in ("name", "description") if key in parts}
    new = {**head, "method": method, method: base | fit, **parts}
    without_effect = ", ".join(_leave_out(new, _METHODS[method].checked(new, source).idle))
    shown = {key: value for key, value in new.items() if value != {}}
    text = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=100)
    return (
        f"{source}: recipes name one method, published or alternating, in place of base and fit."
        f" Write this one as:\n\n{text}"
        + (f"\n({without_effect}: had no effect.)" if without_effect else "")
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
    else:
        text = recipe_text(name)
    try:
        return parse_recipe(yaml.safe_load(text), f"recipe {name}")
    except yaml.YAMLError as error:
        raise SvskError(f"Recipe {name}: not valid YAML: {error}.") from error
