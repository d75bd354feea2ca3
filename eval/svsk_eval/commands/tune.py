# SPDX-License-Identifier: Apache-2.0
"""``svsk tune``."""

from pathlib import Path
from typing import Annotated

import typer

from svsk_eval.commands.options import check_models
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.choices import CODEBOOKS, STORED_DTYPES, check_device, choose
from svsk_offline.cli_options import (
    CalibrationText,
    ChatTemplate,
    CodebookName,
    Device,
    JsonFile,
    Quiet,
    Samples,
    Seed,
    SeqLen,
    StoredDtype,
    TileM,
    TileN,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import one_of
from svsk_offline.preflight import (
    check_recipe_file,
    check_report_files,
    refuse_file,
)
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import console, notes, write_json

__all__ = ["tune"]


def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Recipe to write, .yaml.")],
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight, spent where they help most.")
    ] = None,
    budget_minutes: Annotated[
        float, typer.Option(help="Of all runs of this search together.")
    ] = 60.0,
    recipe: Annotated[
        str,
        typer.Option(
            help="Where to start: name or YAML file.", autocompletion=one_of(recipe_names)
        ),
    ] = "best",
    codebook: CodebookName = None,
    tile_m: TileM = None,
    tile_n: TileN = None,
    calibration: CalibrationText = None,
    chat_template: ChatTemplate = False,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    held_out: Annotated[
        int, typer.Option(help="Pieces of the text to score on, not to calibrate with.")
    ] = 16,
    work_dir: Annotated[
        Path | None, typer.Option(help="For trials; OUT.tune if not given.")
    ] = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUT, and forget a search with other inputs."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search for a recipe that suits MODEL better, by the KL divergence on held-out text.

    Write it to OUT.

    The recipe given is the first trial, and the result unless another is better by a standard error
    or more. Started again, a search that was killed continues; with a larger budget and
    `--overwrite` one that is over goes on.
    """
    check_recipe_file(out, overwrite=overwrite)
    check_report_files(json=json_file)
    check_device(device)
    choose("--codebook", codebook, CODEBOOKS)
    choose("--dtype", dtype, STORED_DTYPES)
    if work_dir is not None:
        refuse_file(work_dir, f"--work-dir {work_dir}")
    calibration_entries(calibration or DEFAULT_SOURCE)
    from svsk_offline.recipe import load_recipe

    check_models(model)
    chosen = load_recipe(recipe).override(
        {
            "weights": {"codebook": codebook},
            "sidecar": {"tile_m": tile_m, "tile_n": tile_n},
            "calibration": {"samples": samples, "seq_len": seq_len, "seed": seed},
            "allocation": {"target_bpw": target_bpw},
        }
    )
    from svsk_eval.tune.console import tune_with_progress, tuned_figures

    result = tune_with_progress(
        console,
        model,
        out,
        chosen,
        budget_minutes=budget_minutes,
        calibration=calibration or DEFAULT_SOURCE,
        chat_template=chat_template,
        held_out=held_out,
        work_dir=work_dir,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        notes=notes,
    )
    write_json(json_file, tuned_figures(result))
