# SPDX-License-Identifier: Apache-2.0
"""``svsk sweep``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from svsk_eval.choices import DTYPES, ENGINES, PEERS, TABLES, task_names
from svsk_eval.commands.options import (
    ApplyChatTemplate,
    BatchSize,
    Chunks,
    ConfirmRunUnsafeCode,
    Dtype,
    Engine,
    IncludePath,
    Limit,
    ModelArg,
    check_models,
)
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.choices import check_device, choose
from svsk_offline.cli_options import (
    CalibrationText,
    Device,
    JsonFile,
    Quiet,
    Samples,
    Seed,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import list_of, one_of
from svsk_offline.preflight import (
    check_measurements,
    check_report_files,
    check_text,
    refuse_file,
)
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import console, notes, write_json
from svsk_vllm.format.files import read_json

__all__ = ["sweep"]


def sweep(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder for models, results, table and figure.")],
    text: Annotated[Path, typer.Option(help="Plain text to score, other than --calibration.")],
    bpw: Annotated[str, typer.Option(help="Bit budgets of SVSK checkpoints: 4.25,4.45,4.62.")] = "",
    peer: Annotated[
        str,
        typer.Option(
            help="Other quantisers of eval/peers, such as gptq,awq:64 (with groups of 64).",
            autocompletion=list_of(PEERS),
        ),
    ] = "",
    also: Annotated[
        str,
        typer.Option(
            help="Further recipes, each at the size it gives: published,fast.",
            autocompletion=list_of(recipe_names),
        ),
    ] = "",
    recipe: Annotated[
        str, typer.Option(help="That budgets are given to.", autocompletion=one_of(recipe_names))
    ] = "best",
    calibration: CalibrationText = None,
    samples: Samples = None,
    seq_len: Annotated[
        int, typer.Option(min=2, help="Tokens of a calibration sample, and of a chunk of the text.")
    ] = 512,
    seed: Seed = None,
    chunks: Chunks = 32,
    tables: Annotated[
        str,
        typer.Option(
            help="Embedding and output head: own, as each quantiser stores them, or reference.",
            autocompletion=one_of(TABLES),
        ),
    ] = "own",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Also run lm-eval's tasks of these names.", autocompletion=list_of(task_names)
        ),
    ] = None,
    engine: Engine = "vllm",
    limit: Limit = None,
    apply_chat_template: ApplyChatTemplate = False,
    model_arg: ModelArg = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    include_path: IncludePath = None,
    confirm_run_unsafe_code: ConfirmRunUnsafeCode = False,
    measurements: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what budgets measure; OUT/measurements if not given."),
    ] = None,
    env_dir: Annotated[Path, typer.Option(help="Where the peers' environments are.")] = Path(
        ".venv-peers"
    ),
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantise MODEL to several sizes and by other quantisers, score all, draw KL against bits.

    OUT gets sweep.json, sweep.md and sweep.svg. One measuring serves all budgets. Started again, it
    goes on after the last finished step; more budgets, peers or tasks may be asked for then.
    """
    check_text(text)
    check_report_files(json=json_file)
    check_device(device)
    choose("--engine", engine, ENGINES)
    choose("--dtype", dtype, DTYPES)
    names = tuple(calibration or [DEFAULT_SOURCE])
    calibration_entries(list(names))
    refuse_file(out, str(out))
    choose("--tables", tables, TABLES)
    check_models(model)
    if measurements is not None:
        check_measurements(measurements, (out,))
    from svsk_eval.bench.command import settings_of, shown_command
    from svsk_eval.sweep.command import sweep_with_progress
    from svsk_eval.sweep.request import (
        SweepRequest,
        TaskOptions,
        distinct,
        own_variants,
        peer_variants,
    )
    from svsk_eval.text.engine_args import parse_engine_args
    from svsk_offline.recipe import load_recipe

    given = {"samples": samples, "seq_len": seq_len, "seed": seed}
    chosen = load_recipe(recipe).override({"calibration": given})
    variants = distinct([*own_variants(bpw, also, chosen, tables, seq_len), *peer_variants(peer)])
    asked = None
    if tasks is not None:
        arguments = parse_engine_args(model_arg or (), "--model-arg")
        settings = settings_of(
            tasks,
            engine=engine,
            limit=limit,
            seed=1234,
            gen_kwargs=None,
            apply_chat_template=apply_chat_template,
            system_instruction=None,
            model_args=arguments | ({"trust_remote_code": True} if trust_remote_code else {}),
        )
        asked = TaskOptions(settings, dtype, include_path, batch_size, confirm_run_unsafe_code)
    request = SweepRequest(
        model=model,
        out=out,
        variants=variants,
        recipe=chosen,
        calibration=names,
        tables=tables,
        text=text,
        chunks=chunks,
        seq_len=seq_len,
        tasks=asked,
        device=device,
        measurements=measurements,
        env_dir=env_dir,
        trust_remote_code=trust_remote_code,
        # OUT is not there yet, so that it would not be known as a path
        command=shown_command([out.name if one == str(out) else one for one in sys.argv[1:]]),
    )
    done = sweep_with_progress(console, request, notes)
    if json_file is not None:
        write_json(json_file, read_json(out / "sweep.json"))
    if not done:
        raise typer.Exit(1)
