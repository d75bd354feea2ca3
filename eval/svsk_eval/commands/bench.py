# SPDX-License-Identifier: Apache-2.0
"""Models beside each other on tasks: ``svsk bench``, and ``compare`` of what was measured."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from svsk_eval.choices import DTYPES, ENGINES, task_names
from svsk_eval.commands.options import (
    ApplyChatTemplate,
    BatchSize,
    Chunks,
    ConfirmRunUnsafeCode,
    Dtype,
    Engine,
    HtmlFile,
    IncludePath,
    Limit,
    MarkdownFile,
    ModelArg,
    check_models,
)
from svsk_kernels.errors import SvskError
from svsk_offline.choices import choose
from svsk_offline.cli_options import (
    JsonFile,
    Quiet,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import list_of
from svsk_offline.preflight import (
    check_report_files,
)
from svsk_offline.terminal import console, notes, write_json

__all__ = ["benchmark", "compare"]


def benchmark(
    models: Annotated[
        list[str], typer.Argument(help="Variants: folders or hub names, or LABEL=MODEL.")
    ],
    reference: Annotated[str, typer.Option(help="Dense model they are made from, or LABEL=MODEL.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-eval's names of tasks and groups, separated by commas.",
            autocompletion=list_of(task_names),
        ),
    ] = "svsk_smoke",
    engine: Engine = "vllm",
    limit: Limit = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Over the tasks': do_sample=true,temperature=0.6 ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of few-shot examples and sampling.")] = 1234,
    repeats: Annotated[
        int, typer.Option(min=1, help="Answers to each item, drawn with a temperature.")
    ] = 1,
    apply_chat_template: ApplyChatTemplate = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="System message of the chat.")
    ] = None,
    model_arg: ModelArg = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    include_path: IncludePath = None,
    confirm_run_unsafe_code: ConfirmRunUnsafeCode = False,
    trust_remote_code: TrustRemoteCode = False,
    text: Annotated[
        Path | None, typer.Option(help="Also score this plain text, as `svsk eval` does.")
    ] = None,
    chunks: Chunks = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    text_engine: Annotated[
        str,
        typer.Option(
            help="hf (KL, NLL), vllm (NLL as served) or hf,vllm.", autocompletion=list_of(ENGINES)
        ),
    ] = "hf",
    reference_answers: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "Also score variants on the reference's own answers to so many items of each task"
                " that generates: KL, tokens that flip."
            ),
        ),
    ] = 0,
    min_recovery: Annotated[
        float | None, typer.Option(help="Exit with 1 if any task keeps less, such as 0.98.")
    ] = None,
    work_dir: Annotated[
        Path, typer.Option(help="Keeps answers; a killed run goes on there.")
    ] = Path("svsk-bench"),
    merge_answers: Annotated[
        bool,
        typer.Option(
            "--merge-answers",
            help="Take answers there that other hardware or versions made; the report says so.",
        ),
    ] = False,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    html: HtmlFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run lm-eval tasks for a reference and its variants, and compare them item by item."""
    check_report_files(json=json_file, markdown=markdown, html=html)
    choose("--engine", engine, ENGINES)
    choose("--dtype", dtype, DTYPES)
    for name in (reference, *models):
        check_models(name if Path(name).is_dir() else name.rpartition("=")[2])
    from svsk_eval.bench.command import (
        bench_with_progress,
        engine_names,
        settings_of,
        shown_command,
    )
    from svsk_eval.bench.options import BenchOptions, TextOptions
    from svsk_eval.bench.runner import candidate
    from svsk_eval.text.engine_args import parse_engine_args

    settings = settings_of(
        tasks,
        engine=engine,
        limit=limit,
        seed=seed,
        repeats=repeats,
        gen_kwargs=gen_kwargs,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        model_args={
            **parse_engine_args(model_arg or (), "--model-arg"),
            **({"trust_remote_code": True} if trust_remote_code else {}),
        },
    )
    scored = text and TextOptions(text, chunks, seq_len, engine_names(text_engine, "--text-engine"))
    options = BenchOptions(
        work_dir=work_dir,
        dtype=dtype,
        include_path=include_path,
        batch_size=batch_size,
        consent=confirm_run_unsafe_code,
        text=scored or None,
        command=shown_command(sys.argv[1:]),
        reference_answers=reference_answers,
        merge_answers=merge_answers,
    )
    passed = bench_with_progress(
        console,
        [candidate(name) for name in (reference, *models)],
        settings,
        options,
        json_file=json_file,
        markdown=markdown,
        html=html,
        min_recovery=min_recovery,
        notes=notes,
    )
    if not passed:
        raise typer.Exit(1)


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            help=(
                "Files of `svsk eval --json`, or of `svsk bench --json`; the first is the baseline."
            )
        ),
    ],
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    html: HtmlFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare evaluations of the same text, answers or tasks, item by item."""
    check_report_files(json=json_file, markdown=markdown, html=html)
    from svsk_eval.chat.compared import compare_scores_and_print
    from svsk_eval.report.merge import compare_and_print, is_bench_report

    if any(map(is_bench_report, files)):
        compare_and_print(console, files, json_file, markdown, html)
        return
    if markdown is not None or html is not None:
        raise SvskError("--markdown and --html are for files of `svsk bench --json`.")
    write_json(json_file, compare_scores_and_print(console, files))
