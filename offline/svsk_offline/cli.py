# SPDX-License-Identifier: Apache-2.0
"""The commands of the offline tool, each of which imports the heavy packages it needs."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from svsk_kernels.errors import SvskError
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.cli_options import (
    CalibrationText,
    ChatTemplate,
    CodebookName,
    Device,
    Overwrite,
    Samples,
    Seed,
    SeqLen,
    StoredDtype,
    TileM,
    TileN,
    TrustRemoteCode,
    console,
)
from svsk_offline.endings import plain_endings
from svsk_offline.preflight import check_measurements, check_output
from svsk_vllm.version import __version__

__all__ = ["Commands", "app"]


class Commands(typer.core.TyperGroup):
    """All subcommands end in one line instead of a traceback, whatever stops them.

    Attributes:
        continues: by subcommand, what becomes of a run that is started again after it was stopped.
    """

    continues: ClassVar[dict[str, str]] = {
        "quantize": (
            "Start it again with the same arguments to go on after the last finished block."
        ),
    }

    def invoke(self, ctx: Any) -> Any:
        with plain_endings(_say_error, lambda: self.continues.get(ctx.invoked_subcommand)):
            return super().invoke(ctx)


app = typer.Typer(
    name="svsk",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)


def _say_note(text: str) -> None:
    console.print(text, markup=False)


def _say_error(text: str) -> None:
    _errors.print(f"[bold red]error:[/] {escape(text)}")


def _version(value: bool) -> None:
    if value:
        console.print(f"svsk {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Quantise language models to SVSK checkpoints.

    Inspect, check, export, evaluate and run them.
    """


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Name (see `svsk recipes`) or YAML file.")] = "best",
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
        int | None, typer.Option(help="Bits of a sidecar factor, 8 or 4.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights per scale: 16, 32 or 64.")] = None,
    scale_bits: Annotated[
        int | None, typer.Option(help="Bits of a scale: 16, or 8 or 6 under a scale per row.")
    ] = None,
    codebook: CodebookName = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Module to leave alone: name or re:pattern.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Output head: int8, mixed-int8 (8 bits in rows of common tokens, 4 in others),"
            " svsk (4 bits and a sidecar), dense, or auto (int8 where it can be)."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="Embedding table: int8, mixed-int8, dense, or auto (int8 where it can be; as the"
            " head where it is tied)."
        ),
    ] = None,
    hot_rows: Annotated[
        int | None, typer.Option(help="Of mixed-int8: rows in 8 bits, 8000 if not given.")
    ] = None,
    budget_includes: Annotated[
        list[str] | None, typer.Option(help="head: its bits count in --target-bpw.")
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
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    measurements: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what a bit budget measures, for runs with other budgets."
        ),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantise MODEL into the SVSK checkpoint OUT.

    Example: `svsk quantize Qwen/Qwen3-4B qwen3-4b-svsk --calibration text.txt --target-bpw 4.5`
    """
    # What takes no time comes before imports that do.
    check_output(out, overwrite=overwrite, source=model)
    if measurements is not None:
        check_measurements(measurements, (out,))
    calibration_entries(calibration or DEFAULT_SOURCE)
    from svsk_offline.console import quantize_with_progress
    from svsk_offline.recipe import load_recipe

    loaded = load_recipe(recipe)
    sidecar = {"rank": rank, "tile_m": tile_m, "tile_n": tile_n, "num_bits": factor_bits}
    if target_bpw is None and loaded.target_bpw and not (rank is None and factor_bits is None):
        _say_note(
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
    )
    if measurements is not None and not chosen.needs_gradients:
        raise SvskError(
            f"--measurements: no effect with recipe {chosen.name} as given, which measures nothing"
            " beforehand. Leave that out."
        )
    quantize_with_progress(
        console,
        model,
        out,
        chosen,
        calibration=calibration or DEFAULT_SOURCE,
        chat_template=chat_template,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        measurements=measurements,
    )


@app.command()
def recipes() -> None:
    """List the recipes shipped with the package."""
    from svsk_offline.recipe import load_recipe, recipe_names

    table = Table("name", "method", "weights", "sidecar", "description")
    for name in recipe_names():
        recipe = load_recipe(name)
        side, weights = recipe.sidecar, recipe.weights
        table.add_row(
            name,
            recipe.method,
            f"{weights.codebook} g{weights.group_size} s{weights.scale_bits}",
            f"r{side.rank} {side.num_bits} bit, {side.tile_m}x{side.tile_n}",
            recipe.description,
        )
    console.print(table)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(help="SVSK checkpoint; with --keys any model's folder or hub name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="Run the model on a text instead: would a key cache of few bits lose channels?",
        ),
    ] = False,
    calibration: CalibrationText = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a checkpoint holds.

    Bits per weight with every stored bit counted, sizes, recipe, producer. Or, with `--keys`, how
    far apart the channels of each layer's keys are, and what `svsk quantize --smooth-keys` would
    make of it.
    """
    from svsk_offline.storage.inspection import inspect_checkpoint, print_inspection

    if keys:
        from svsk_offline.key_inspection import inspect_keys, print_keys

        found = inspect_keys(
            str(folder),
            calibration or DEFAULT_SOURCE,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            print_keys(console, found)
        return
    if calibration or trust_remote_code or device != "auto":
        raise SvskError(
            "--calibration, --device, --trust-remote-code: no effect without --keys. Leave that"
            " out."
        )
    inspection = inspect_checkpoint(folder)
    if as_json:
        typer.echo(json.dumps(inspection, indent=2))
    else:
        print_inspection(console, inspection)


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a checkpoint's structure and numbers.

    List every problem and exit with 1 if there is one.
    """
    from svsk_offline.storage.inspection import serving_note, validate_against_architecture

    problems = validate_against_architecture(
        folder,
        trust_remote_code=trust_remote_code,
        note=lambda text: console.print(f"[yellow]not checked:[/] {escape(text)}"),
    )
    note = None if problems else serving_note(folder)
    if note:
        console.print(f"[yellow]note:[/] {escape(note)}")
    for problem in problems:
        console.print(f"[red]problem:[/] {escape(problem)}")
    if problems:
        console.print(f"{len(problems)} problem(s) in {folder}")
        raise typer.Exit(1)
    console.print(f"{folder}: valid")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or file.gguf.")],
    to: Annotated[str, typer.Option(help="dense, compressed-tensors or gguf.")],
    template: Annotated[
        Path | None, typer.Option(help="GGUF of the same model, which gives all but the weights.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Also write the sidecars there, as a GGUF LoRA adapter.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint for what does not read SVSK, and say what is lost.

    Example: `svsk export qwen3-4b-svsk qwen3-4b.gguf --to gguf --lora qwen3-4b-sidecar.gguf`
    """
    from svsk_offline.export.formats import export_format
    from svsk_offline.export.request import check_request

    kind = export_format(to)
    check_request(kind, folder, out, template=template, lora=lora, overwrite=overwrite)
    from svsk_offline.export.request import run

    for written in run(
        kind, folder, out, template=template, lora=lora, overwrite=overwrite, say=_say_note
    ):
        console.print(f"wrote {written}")
    _say_note(f"in this format: {kind.losses}")


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the dense model a checkpoint stands for: `svsk export --to dense`."""
    export(folder, out, "dense", overwrite=overwrite)


if __name__ == "__main__":
    app()
