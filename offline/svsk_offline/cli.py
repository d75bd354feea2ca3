# SPDX-License-Identifier: Apache-2.0
"""The commands of the offline tool, each of which imports the heavy packages it needs."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.markup import escape

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
    examples,
)
from svsk_offline.command_app import App, Command, Group
from svsk_offline.completion import one_of
from svsk_offline.endings import plain_endings
from svsk_offline.export.formats import FORMATS
from svsk_offline.preflight import check_measurements, check_output, check_report_files
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import Terminal, console, notes, reset, write_json
from svsk_offline.world import World, joined
from svsk_vllm.version import __version__

__all__ = ["Commands", "app"]


class Commands(Group):
    """All subcommands end in one line instead of a traceback, whatever stops them.

    Attributes:
        continues: by subcommand, what becomes of a run that is started again after it was stopped.
    """

    continues: ClassVar[dict[str, str]] = {
        "quantize": (
            "Start it again with the same arguments to go on after the last finished block."
        ),
    }

    def make_context(self, *args: Any, **options: Any) -> Any:
        with plain_endings(_say_error):  # `--install-completion` writes files
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        reset()
        with plain_endings(_say_error, lambda: self.continues.get(ctx.invoked_subcommand)):
            return super().invoke(ctx)


class _Together(Command):
    """A subcommand that several processes may run together; ``ctx.obj`` is their world."""

    def invoke(self, ctx: Any) -> Any:
        with joined() as ctx.obj:
            console.quiet |= not ctx.obj.leads
            notes.quiet |= not ctx.obj.leads
            return super().invoke(ctx)


app = App(
    name="svsk",
    cls=Commands,
    no_args_is_help=True,
)
_errors = Terminal(stderr=True)


def _say_note(text: str) -> None:
    notes.print(text, markup=False)


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


@app.command(
    cls=_Together,
    epilog=examples(
        "svsk quantize Qwen/Qwen3-4B qwen3-4b-svsk --calibration text.txt --target-bpw 4.5",
        "svsk quantize ./my-model my-model-svsk --recipe fast --rank 16 --dry-run",
    ),
)
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
            say=_say_note if dry else lambda text: None,  # the run says it itself
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


@app.command(epilog=examples("svsk recipes", "svsk recipes best > mine.yaml"))
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print this one, to edit and give to --recipe.",
            autocompletion=one_of(recipe_names),
        ),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the recipes shipped with the package, or print one as YAML."""
    from svsk_offline.recipe_files import print_recipes, recipe_names, recipe_text, recipe_values

    check_report_files(json=json_file)
    if name is not None:
        typer.echo(recipe_text(name), nl=False, err=console.stderr)
        write_json(json_file, recipe_values(name))
        return
    shipped = {name: recipe_values(name) for name in recipe_names()}
    print_recipes(console, shipped)
    _say_note("`svsk recipes NAME` prints one; --recipe takes a name, or your edited file.")
    write_json(json_file, shipped)


@app.command(
    epilog=examples("svsk inspect qwen3-4b-svsk", "svsk inspect qwen3-4b-svsk --json sizes.json")
)
def inspect(
    folder: Annotated[
        Path, typer.Argument(help="SVSK checkpoint; with --keys any model's folder or hub name.")
    ],
    json_file: JsonFile = None,
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
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds.

    Bits per weight with every stored bit counted, sizes, recipe, producer. Or, with `--keys`, how
    far apart the channels of each layer's keys are, and what `svsk quantize --smooth-keys` would
    make of it.
    """
    from svsk_offline.storage.hub import check_checkpoint, check_model
    from svsk_offline.storage.inspection import inspect_checkpoint, print_inspection

    check_report_files(json=json_file)
    check_device(device)
    if keys:
        check_model(str(folder))
        from svsk_offline.key_inspection import inspect_keys, print_keys

        found = inspect_keys(
            str(folder),
            calibration or DEFAULT_SOURCE,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        print_keys(console, found)
        write_json(json_file, found.to_json())
        return
    if calibration or trust_remote_code or device != "auto":
        raise SvskError(
            "--calibration, --device, --trust-remote-code: no effect without --keys. Leave that"
            " out."
        )
    check_checkpoint(folder)
    inspection = inspect_checkpoint(folder)
    print_inspection(console, inspection)
    write_json(json_file, inspection)


@app.command(
    epilog=examples("svsk validate qwen3-4b-svsk", "svsk validate downloaded --json - --quiet")
)
def validate(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a checkpoint's structure and numbers.

    List every problem and exit with 1 if there is one.
    """
    from svsk_offline.storage.hub import check_checkpoint
    from svsk_offline.storage.inspection import serving_note, validate_against_architecture

    check_report_files(json=json_file)
    check_checkpoint(folder)
    left: list[str] = []
    problems = validate_against_architecture(
        folder, trust_remote_code=trust_remote_code, note=left.append
    )
    for text in left:
        console.print(f"[yellow]not checked:[/] {escape(text)}")
    note = None if problems else serving_note(folder)
    if note:
        console.print(f"[yellow]note:[/] {escape(note)}")
    write_json(
        json_file,
        {"folder": str(folder), "problems": problems, "not_checked": left, "note": note},
    )
    for problem in problems:
        console.print(f"[red]problem:[/] {escape(problem)}")
    if problems:
        console.print(f"{len(problems)} problem(s) in {folder}", markup=False)
        raise typer.Exit(1)
    console.print(f"{folder}: valid", markup=False)


@app.command(
    epilog=examples(
        "svsk export qwen3-4b-svsk qwen3-4b.gguf --to gguf --lora qwen3-4b-sidecar.gguf",
        "svsk export qwen3-4b-svsk qwen3-4b-w4a16 --to compressed-tensors",
    )
)
def export(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or file.gguf.")],
    to: Annotated[
        str, typer.Option(help="dense, compressed-tensors or gguf.", autocompletion=one_of(FORMATS))
    ],
    template: Annotated[
        Path | None, typer.Option(help="GGUF of the same model, which gives all but the weights.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Also write the sidecars there, as a GGUF LoRA adapter.")
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for what does not read SVSK, and say what is lost."""
    from svsk_offline.export.formats import export_format
    from svsk_offline.export.request import check_request

    check_report_files(json=json_file)
    kind = export_format(to)
    check_request(kind, folder, out, template=template, lora=lora, overwrite=overwrite)
    from svsk_offline.storage.hub import check_checkpoint

    check_checkpoint(folder)
    from svsk_offline.export.request import run

    written = run(
        kind, folder, out, template=template, lora=lora, overwrite=overwrite, say=_say_note
    )
    for path in written:
        console.print(f"wrote {path}", markup=False)
    _say_note(f"in this format: {kind.losses}")
    write_json(
        json_file,
        {"format": kind.name, "written": [str(path) for path in written], "losses": kind.losses},
    )


@app.command(
    epilog=examples(
        "svsk restore qwen3-4b-svsk qwen3-4b-dense",
        "svsk restore qwen3-4b-svsk qwen3-4b-dense --overwrite",
    )
)
def restore(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the dense model a checkpoint stands for: `svsk export --to dense`."""
    export(folder, out, "dense", overwrite=overwrite, json_file=json_file)


@app.command(
    epilog=examples(
        "svsk diff qwen3-4b-4.30 qwen3-4b-4.45",
        "svsk diff published best --json difference.json",
    )
)
def diff(
    first: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what differs between two checkpoints: config, bits, errors, tensors.

    Exit with 0 whether they differ or not; `--json` tells a script.
    """
    from svsk_offline.storage.comparison import compare_checkpoints, print_comparison
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    for folder in (first, second):
        check_checkpoint(folder)
    comparison = compare_checkpoints(first, second)
    print_comparison(console, comparison)
    write_json(json_file, comparison)


@app.command(
    epilog=examples(
        "svsk push qwen3-4b-svsk me/Qwen3-4B-svsk",
        'svsk push qwen3-4b-svsk me/Qwen3-4B-svsk --private --message "4.45 bits"',
    )
)
def push(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Name on the hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "SVSK checkpoint",
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Validate a checkpoint and upload it to the hub.

    With the token of `hf auth login`; to another hub where HF_ENDPOINT names one.
    """
    from svsk_offline.push import check_repository
    from svsk_offline.push import push as upload
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    check_checkpoint(folder)
    check_repository(repository)
    address = upload(
        folder,
        repository,
        private=private,
        message=message,
        trust_remote_code=trust_remote_code,
        note=_say_note,
    )
    console.print(address, markup=False)
    write_json(json_file, {"repository": repository, "commit": address})
