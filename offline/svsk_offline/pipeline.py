# SPDX-License-Identifier: Apache-2.0
"""Quantising a model: one decoder block at a time, from a dense folder to an SVSK checkpoint.

Shards are written per block into a folder in ``OUT.partial``, which becomes ``OUT`` when everything
is there. A run that was interrupted continues after the last finished block when it is started
again with the same inputs, and writes the same bytes: the hidden states are computed again, blocks
with a shard are not quantised again. A lock keeps a second run away from ``OUT``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import CalibrationSet, load_calibration
from svsk_offline.calibration.limits import check_length, check_token_ids
from svsk_offline.calibration.sources import check_sources
from svsk_offline.calibration.token_budget import check_drawn, sample_count
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.preflight import check_measurements, check_output, check_recipe
from svsk_offline.quantization_result import Progress, QuantizationResult
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.run import Run
from svsk_offline.storage.atomic import PartialFolder
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.hub import resolve_model
from svsk_offline.world import ALONE, World

__all__ = [
    "Progress",
    "QuantizationResult",
    "check_takes",
    "load_texts",
    "quantize",
    "resolve_device",
]


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str = "best",
    *,
    calibration: str | Sequence[str] | CalibrationSet = DEFAULT_SOURCE,
    chat_template: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    measurements: str | Path | None = None,
    memory_budget: int | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> QuantizationResult:
    """Quantise a dense Hugging Face model into an SVSK checkpoint.

    Args:
        model: folder or hub name.
        out: folder to write.
        recipe: a recipe, or the name or file of one.
        calibration: text sources, see :func:`svsk_offline.calibration.load_calibration`; or samples
            drawn already, which then stand in for the recipe's, however few they are.
        chat_template: render question and answer rows as chat messages.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: dtype of scales and unquantised tensors, ``auto`` for the model's own.
        overwrite: replace ``out``, and drop an unfinished run with other inputs.
        trust_remote_code: run Python files that come with the model.
        measurements: folder that keeps what a bit budget and gradient weights measure of model and
            text, for runs that differ in the budget or in how they quantise; they do not measure it
            again.
        memory_budget: bytes that the run may hold, on a GPU those there; hidden states then go to a
            temporary file and statistics are gathered in turns, to the same result. None for no
            limit but 2 GiB of hidden states.
        progress: callbacks.
        world: the processes that quantise together, each of which calls this with the same
            arguments but its device; see :func:`svsk_offline.world.joined`.

    Raises:
        SvskError: something about the request that the user can mend.
        SvskFormatError: the model folder is damaged, or a layer does not fit the format.
    """
    progress = progress if progress and world.leads else Progress()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    torch_device = resolve_device(device)
    check_output(Path(out), overwrite=overwrite, source=model)
    if not isinstance(calibration, CalibrationSet):
        check_sources(calibration_entries(calibration), chat_template)
    model_folder = resolve_model(str(model), trust_remote_code=trust_remote_code)
    source = ModelSource(model_folder, trust_remote_code=trust_remote_code)
    folder = PartialFolder(Path(out), source.folder, overwrite=overwrite)
    kept = None if measurements is None else Path(measurements)
    if kept is not None:
        check_measurements(kept, (source.folder, folder.out, folder.path))
    with folder.locked() if world.leads else nullcontext():
        scale_dtype = source.model_dtype(dtype)
        source.check()
        check_recipe(recipe, source.linear_names(), progress.message)
        if isinstance(calibration, CalibrationSet):
            count, seq_len = calibration.tokens.shape
            recipe = recipe.override({"calibration": {"samples": count, "seq_len": seq_len}})

        def texts() -> CalibrationSet:
            if isinstance(calibration, CalibrationSet):
                check_takes(source, calibration)
                return calibration
            return load_texts(source, calibration, recipe, chat_template, progress.message)

        run = Run(
            source,
            folder,
            recipe,
            texts,
            torch_device,
            scale_dtype,
            progress,
            kept,
            world,
            memory_budget,
        )
        return run.execute(overwrite)


def load_texts(
    source: ModelSource,
    calibration: str | Sequence[str],
    recipe: Recipe,
    chat_template: bool,
    message: Callable[[str], None],
    *,
    more: int = 0,
) -> CalibrationSet:
    """Draw calibration text for a model, after a check that it takes samples of that length.

    Args:
        source: the model.
        calibration: text sources.
        recipe: how many samples, how long, and the seed of their draw.
        chat_template: render question and answer rows as chat messages.
        message: told how many tokens these are, and whether they are few.
        more: samples beyond the recipe's.

    Raises:
        SvskError: it does not, there are too few samples for the width of the model, or see
            :func:`svsk_offline.calibration.load_calibration`.
    """
    model: Any = source.model
    args = recipe.calibration
    check_length(args.seq_len, model.config, str(source.folder))
    texts = calibration if isinstance(calibration, str) else ", ".join(calibration)
    count = sample_count(source, recipe, message, texts)
    drawn = load_calibration(
        calibration,
        source.tokenizer,
        count + more,
        args.seq_len,
        args.seed,
        chat_template=chat_template,
        fewer=args.samples is None,
    )
    check_drawn(source, recipe, len(drawn.tokens) - more, count, message)
    check_takes(source, drawn)
    return drawn


def check_takes(source: ModelSource, texts: CalibrationSet) -> None:
    """Refuse samples that a model cannot be run on.

    Raises:
        SvskError: they are longer than its positions, or hold tokens beyond its vocabulary.
    """
    model: Any = source.model
    check_length(texts.tokens.shape[1], model.config, str(source.folder))
    check_token_ids(
        texts.tokens,
        model.get_input_embeddings().weight.shape[0],
        lambda token: source.tokenizer.convert_ids_to_tokens(token),
        str(source.folder),
        f"calibration text {texts.source}",
    )


def resolve_device(name: str) -> torch.device:
    """Device by name, ``auto`` for CUDA where there is one.

    Raises:
        SvskError: torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SvskError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]}). Leave --device out,"
            " or say --device cpu."
        ) from error
    return device
