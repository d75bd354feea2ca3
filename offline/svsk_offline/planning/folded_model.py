# SPDX-License-Identifier: Apache-2.0
"""The model that a recipe quantises: with the factors of its smoothing folded in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from svsk_offline.calibration import CalibrationSet
from svsk_offline.planning.smoothing import Smoothing, plan_smoothing
from svsk_offline.recipe_sections import SmoothingArgs
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.world import ALONE, World

__all__ = ["folded_model"]

_NAME: Final = "svsk-smoothing.safetensors"


def folded_model(
    source: ModelSource,
    texts: CalibrationSet,
    args: SmoothingArgs,
    device: torch.device,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> tuple[ModelSource, dict[str, Any]]:
    """A model as it is quantised, by factors chosen now or by an earlier start of this run.

    A maximum that lies between two powers of two may be rounded the other way by another number
    of threads, so a run that goes on takes the factors that it began with.

    Args:
        source: the dense model, not folded.
        texts: samples that are fitted.
        args: of the recipe.
        device: where to compute.
        folder: keeps the factors as long as the run is unfinished.
        progress: called with the number of blocks done and their total, where factors are chosen.
        say: is told what is folded, and what is left alone.
        world: the processes; the leading one chooses, with all samples.

    Returns:
        The folded model, and what ``producer`` says of it.
    """
    path = folder / _NAME

    def choose() -> Smoothing:
        if path.exists():
            return Smoothing.load(path)
        say("Looking for the largest magnitudes of activations")
        chosen = plan_smoothing(source, texts, args, device, folder, progress)
        chosen.save(path)
        return chosen

    found = world.first(choose)
    for line in found.lines():
        say(line)
    folded = source.folded(found.fold)
    record = args.model_dump(mode="json", exclude_none=True) | found.record()
    if not args.inputs:
        del record["targets"]
    return folded, record
