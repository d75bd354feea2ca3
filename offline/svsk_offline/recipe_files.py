# SPDX-License-Identifier: Apache-2.0
"""The recipes that come with the package, as text. Imports nothing heavy, to list them at once."""

from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from svsk_kernels.errors import SvskError
from svsk_offline.choices import did_you_mean
from svsk_offline.console_tables import new_table, show_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_recipes", "recipe_names", "recipe_text", "recipe_values"]


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("svsk_offline") / "recipes"
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe.

    Raises:
        SvskError: there is none of that name.
    """
    names = recipe_names()
    if name not in names:
        raise SvskError(
            f"Recipe {name!r} is not one of {', '.join(names)}, nor a file ending in .yaml."
            f"{did_you_mean(name, names)}"
        )
    path = resources.files("svsk_offline") / "recipes" / f"{name}.yaml"
    return path.read_text(encoding="utf-8")


def recipe_values(name: str) -> dict[str, Any]:
    """What the file of a shipped recipe says.

    Raises:
        SvskError: there is none of that name.
    """
    import yaml

    values: dict[str, Any] = yaml.load(
        recipe_text(name), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return values


def print_recipes(console: "Console", shipped: Mapping[str, Mapping[str, Any]]) -> None:
    """Show the shipped recipes, by name, as a table."""
    table = new_table("name", "base", "sidecar", "description")
    for name, values in shipped.items():
        side, weights = values["sidecar"], values["weights"]
        budget = values.get("allocation")
        base = f"{weights['codebook']}, {weights.get('scale_bits', 16)}-bit scales"
        tile = " x ".join(str(side[key] or "all") for key in ("tile_m", "tile_n"))
        if budget:
            groups, spent = "groups chosen per matrix", f"{budget['target_bpw']} bits per weight"
            chosen = f"chosen per matrix: {spent} in all"
        else:
            groups = f"groups of {weights['group_size']}"
            chosen = f"rank {side['rank']}, {side['num_bits']}-bit factors, tiles {tile}"
        table.add_row(name, f"{base}, {groups}", chosen, values["description"])
    show_table(console, table)
