# SPDX-License-Identifier: Apache-2.0
"""``svsk quantize``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from svsk_kernels.errors import SvskError
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.choices import (
    BUDGET_PARTS,
    CODEBOOKS,
    EMBEDDINGS,
    FACTOR_BITS,
    GROUP_SIZES,
    HEADS,
    SCALE_BITS,
    STORED_DTYPES,
    budget_bytes,
    check_device,
    choose,
)
from svsk_offline.cli_options import (
    CalibrationText,
    ChatTemplate,
    CodebookName,
    Device,
    JsonFile,
    Overwrite,
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
from svsk_offline.preflight import check_measurements, check_output, check_report_files
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import console, notes, say_note, write_json
from svsk_offline.world import World

__all__ = ["quantize"]


def quantize(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Name (see `svsk recipes`) or YAML file.", autocompletion=one_of(recipe_names)
        ),
    ] = "best",
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits per weight; rank, group size and scale bits are then chosen."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Sidecar rank per tile, 0 (none) to 512.")
    ] = None,
    tile_m: TileM = None,
    tile_n: TileN = None,
    factor_bits: Annotated[
        int | None,
        typer.Option(help="Bits of a sidecar factor, 8 or 4.", autocompletion=one_of(FACTOR_BITS)),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights per scale: 16, 32 or 64.", autocompletion=one_of(GROUP_SIZES)),
    ] = None,
    scale_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a scale: 16, or 8 or 6 under a scale per row.",
            autocompletion=one_of(SCALE_BITS),
        ),
    ] = None,
    codebook: CodebookName = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Module to leave alone: name or re:pattern.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Output head: int8, mixed-int8 (8 bits in rows of common tokens, 4 in others),"
            " svsk (4 bits and a sidecar), dense, or auto (int8 where it can be).",
            autocompletion=one_of(HEADS),
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="Embedding table: int8, mixed-int8, dense, or auto (int8 where it can be; as the"
            " head where it is tied).",
            autocompletion=one_of(EMBEDDINGS),
        ),
    ] = None,
    hot_rows: Annotated[
        int | None, typer.Option(help="Of mixed-int8: rows in 8 bits, 8000 if not given.")
    ] = None,
    budget_includes: Annotated[
        list[str] | None,
        typer.Option(
            help="head: its bits count in --target-bpw.", autocompletion=one_of(BUDGET_PARTS)
        ),
    ] = None,
    smoothing: Annotated[
        float | None,
        typer.Option(
            help="Move scales of activations into the weights: alpha, 0 to 1, such as 0.7."
        ),
    ] = None,
    smooth_outliers: Annotated[
        float | None,
        typer.Option(
            help="Move only channels of activations over this many times the median one, such as 2."
        ),
    ] = None,
    smooth_keys: Annotated[
        bool, typer.Option("--smooth-keys", help="Even out keys, for key caches of few bits.")
    ] = False,
    calibration: CalibrationText = None,
    chat_template: ChatTemplate = False,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--parallel",
            help="Calibrate each block on the outputs of the quantised ones before.",
        ),
    ] = None,
    aim: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Largest share of the errors before a matrix that it makes up for; 0 for none.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    measurements: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what a bit budget measures, for runs with other budgets."
        ),
    ] = None,
    memory_budget: Annotated[
        float | None,
        typer.Option(
            help=(
                "GiB that a process may hold: more goes to files, or is gathered in turns, which"
                " takes longer. The result is the same."
            ),
        ),
    ] = None,
    disk_budget: Annotated[
        float | None,
        typer.Option(help="GB that output and temporary files may take; refused if it is more."),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done and what it needs; write nothing."),
    ] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantise MODEL into the SVSK checkpoint OUT.

    A run that was stopped goes on after its last finished block when it is started again. Several
    processes: `torchrun --nproc-per-node 2 -m svsk_offline quantize ...`.
    """
    world: World = ctx.obj
    # What takes no time comes before imports that do.
    check_output(out, overwrite=overwrite, source=model)
    check_report_files(json=json_file)
    if measurements is not None:
        check_measurements(measurements, (out,))
    calibration_entries(calibration or DEFAULT_SOURCE)
    memory = budget_bytes("--memory-budget", memory_budget, "GiB", 1 << 30)
    disk = budget_bytes("--disk-budget", disk_budget, "GB", 10**9)
    check_device(device)
    choose("--dtype", dtype, STORED_DTYPES)
    choose("--group-size", group_size, GROUP_SIZES)
    choose("--scale-bits", scale_bits, SCALE_BITS)
    choose("--factor-bits", factor_bits, FACTOR_BITS)
    choose("--codebook", codebook, CODEBOOKS)
    choose("--head", head, HEADS)
    choose("--embedding", embedding, EMBEDDINGS)
    from svsk_offline.recipe import load_recipe
    from svsk_offline.storage.hub import check_model, resolve_model
    from svsk_offline.unfinished import check_unfinished

    check_model(model, dense=True)
    loaded = load_recipe(recipe)
    sidecar = {"rank": rank, "tile_m": tile_m, "tile_n": tile_n, "num_bits": factor_bits}
    if target_bpw is None and loaded.target_bpw and not (rank is None and factor_bits is None):
        say_note(
            "--rank, --factor-bits: one sidecar for all linears, in place of the recipe's bit"
            " budget"
        )
        loaded = loaded.without_budget()
    budget: dict[str, Any] = {"target_bpw": target_bpw}
    if target_bpw or loaded.target_bpw:
        budget["group_sizes"] = (group_size,) if group_size else None
        budget["scale_bits"] = (scale_bits,) if scale_bits else None
        budget["includes"] = tuple(budget_includes) if budget_includes else None
    elif budget_includes:
        raise SvskError("--budget-includes: there is no bit budget. Give one with --target-bpw.")
    chosen = loaded.override(
        {
            "weights": {
                "group_size": group_size,
                "codebook": codebook,
                "scale_bits": scale_bits,
            },
            "sidecar": sidecar,
            "calibration": {
                "samples": samples,
                "seq_len": seq_len,
                "seed": seed,
                "sequential": sequential,
            },
            "alternating": {"aim": aim},
            "allocation": budget,
            "tables": {"head": head, "embedding": embedding, "hot_rows": hot_rows},
            "smoothing": {
                "alpha": smoothing,
                "above": smooth_outliers,
                "keys": smooth_keys or None,
            },
            "ignore": tuple(ignore or ()),
        }
    )
    options = ("--rank", "--tile-m", "--tile-n", "--factor-bits")
    chosen.refuse_idle(
        {
            f"sidecar.{key}": option
            for (key, value), option in zip(sidecar.items(), options, strict=True)
            if value is not None
        }
        | ({} if hot_rows is None else {"tables.hot_rows": "--hot-rows"})
        | (
            {}
            if sequential is None
            else {"calibration.sequential": "--sequential" if sequential else "--parallel"}
        )
    )
    if measurements is not None and not chosen.needs_gradients:
        raise SvskError(
            f"--measurements: no effect with recipe {chosen.name} as given, which measures nothing"
            " beforehand. Leave that out."
        )
    if not (overwrite or dry):
        check_unfinished(out, chosen.values())
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    check_model(str(folder), dense=True)
    if dry or (disk is not None and world.leads):
        if dry and world.size > 1:
            raise SvskError(
                f"--dry-run: works out what one process needs, not {world.size}. Start it without"
                " torchrun."
            )
        from svsk_offline.dry_run import check_disk, dry_run, print_estimate

        estimate = dry_run(
            folder,
            out,
            chosen,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            memory_budget=memory,
            say=say_note if dry else lambda text: None,  # the run says it itself
        )
        check_disk(estimate, disk)
        if dry:
            print_estimate(console, estimate)
            write_json(json_file, estimate.to_json())
            return
    from svsk_offline.console import quantize_with_progress

    figures = quantize_with_progress(
        console,
        folder,
        out,
        chosen,
        notes=notes,
        reference=model,
        calibration=calibration or DEFAULT_SOURCE,
        chat_template=chat_template,
        device=world.device(device),
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        measurements=measurements,
        memory_budget=memory,
        world=world,
    )
    if world.leads:
        write_json(json_file, figures)
