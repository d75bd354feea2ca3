# SPDX-License-Identifier: Apache-2.0
"""What several processes do not divide among themselves, refused before any work."""

from collections.abc import Mapping
from pathlib import Path

from svsk_kernels.errors import SvskError
from svsk_offline.recipe import AlternatingRecipe, Recipe
from svsk_offline.world import World
from svsk_vllm.format import ConfigGroup
from svsk_vllm.format.experts import expert_layers

__all__ = ["check_divisible"]


def check_divisible(
    world: World, recipe: Recipe, schemes: Mapping[str, ConfigGroup], folder: Path
) -> None:
    """Refuse a recipe or a model that only one process can quantise.

    Args:
        world: the processes.
        recipe: how the model is quantised.
        schemes: of its linears, by their names.
        folder: of the model, for the message.

    Raises:
        SvskError: there are several processes, and what one would need of the others is not added
            up.
    """
    if world.size == 1:
        return
    args = recipe if isinstance(recipe, AlternatingRecipe) else None
    if args and args.gradients.token_power:
        what = (
            f"gradients.token_power is {args.gradients.token_power:g}: the weight of a token is"
            " relative to those of all samples, which are not put together"
        )
    elif expert_layers(schemes):
        what = (
            f"{folder} is a mixture of experts: the tokens that are routed to each expert are not"
            " added up"
        )
    else:
        return
    raise SvskError(
        f"{world.size} processes: {what} over processes. Leave that out, or quantise with one"
        " process, without torchrun."
    )
