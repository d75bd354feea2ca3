# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command: the offline tool's subcommands, and those that ask how good a model is.

Heavy packages are imported by the subcommand that needs them.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from svsk_eval.choices import ACTIVATIONS, DTYPES, ENGINES, KV_KINDS, PEERS, TABLES, task_names
from svsk_kernels.errors import SvskError
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.choices import CODEBOOKS, STORED_DTYPES, check_device, choose
from svsk_offline.cli import Commands, app
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
    examples,
)
from svsk_offline.completion import list_of, one_of
from svsk_offline.preflight import (
    check_measurements,
    check_page_file,
    check_recipe_file,
    check_report_files,
    check_text,
    refuse_file,
)
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import console, notes, write_json
from svsk_vllm.format.files import read_json

__all__ = ["app"]

Commands.continues |= {
    "tune": "Start it again with the same arguments to go on after the last finished trial.",
    "bench": "Start it again with the same arguments to go on after the last answer.",
    "sweep": "Start it again with the same arguments to go on after the last finished step.",
}

MarkdownFile = Annotated[Path | None, typer.Option(help="Write the report of tasks there.")]
HtmlFile = Annotated[
    Path | None, typer.Option(help="Write the report of tasks there, one page with plots.")
]


def _check_models(*models: str | None) -> None:
    """Refuse what is no model's folder and cannot be on the hub, before anything is imported."""
    from svsk_offline.storage.hub import check_model

    for model in models:
        if model is not None:
            check_model(model)


@app.command(
    "eval",
    epilog=examples(
        "svsk eval qwen3-4b-svsk --reference Qwen/Qwen3-4B --text held_out.txt --json scores.json",
        "svsk eval qwen3-4b-svsk --text held_out.txt --engine vllm",
    ),
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Dense or SVSK model: folder or hub name.")],
    text: Annotated[Path | None, typer.Option(help="Plain text to score.")] = None,
    reference: Annotated[str | None, typer.Option(help="Dense model to compare with.")] = None,
    chunks: Annotated[
        int, typer.Option(min=1, help="Chunks of --seq-len tokens, from the start of the text.")
    ] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    chat: Annotated[
        Path | None,
        typer.Option(help="Prompts, JSON lines: score the answers that the reference gives."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of --chat, from the first.")] = 32,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer, its end included.")
    ] = 256,
    answers: Annotated[
        Path | None,
        typer.Option(help="Keeps the answers, for other models and after an interruption."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help=(
                "Arithmetic: auto (float32 on a CPU; vllm: the checkpoint's if fast), float32,"
                " bfloat16, float16."
            ),
            autocompletion=one_of(DTYPES),
        ),
    ] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="hf: dequantised weights. vllm: the served model, its kernels included; no KL.",
            autocompletion=one_of(ENGINES),
        ),
    ] = "hf",
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Argument of vllm.LLM, such as tensor_parallel_size=2; the value is JSON or a word."
            )
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            help=(
                "Attend to keys and values as a cache stores them, with --engine hf: kpc32, q8_0,"
                " q4_0, q4_1, int4; two kinds as KEYS:VALUES."
            ),
            autocompletion=one_of(KV_KINDS),
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help=(
                "Round the inputs of MODEL's linears as kernels of few bits would, with --engine"
                " hf: int8, int8-g64, fp8, nvfp4."
            ),
            autocompletion=one_of(ACTIVATIONS),
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score MODEL on a text, or on its reference's answers to prompts, or on both.

    On a text: NLL, perplexity, and KL divergence and top-1 agreement with a reference. On answers:
    the same, and how sure it is of their ends.
    """
    check_report_files(json=json_file, answers=answers)
    if text is not None:
        check_text(text)
    check_device(device)
    choose("--dtype", dtype, DTYPES)
    choose("--engine", engine, ENGINES)
    _check_models(model, reference)
    from svsk_eval.cards import eval_rows, note_in_card
    from svsk_eval.chat.command import check_options, evaluate_parts
    from svsk_eval.chat.scoring import ChatRequest
    from svsk_eval.text.engine_args import parse_engine_args
    from svsk_eval.text.request import TextRequest

    check_options(
        text=text,
        chat=chat,
        answers=answers,
        reference=reference,
        engine=engine,
        kv=kv,
        activations=activations,
    )
    about: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    scored = asked = None
    if text is not None:
        engine_args = parse_engine_args(engine_arg or ())
        parts: dict[str, Any] = {
            "text": text,
            "chunks": chunks,
            "seq_len": seq_len,
            "engine": engine,
            "kv": kv,
            "activations": activations,
        }
        scored = TextRequest(**parts, engine_args=engine_args, **about)
    if chat is not None:
        parts = {"file": chat, "prompts": prompts, "answer_tokens": answer_tokens}
        asked = ChatRequest(**parts, answers=answers, **about)
    figures = evaluate_parts(console, scored, asked, notes)
    note_in_card(notes, model, eval_rows(figures, text, chat))
    write_json(json_file, figures)


@app.command(
    "bench",
    epilog=examples(
        "svsk bench qwen3-4b-svsk --reference Qwen/Qwen3-4B --tasks svsk_reasoning --html a.html",
        "svsk bench base=w4a16 svsk=qwen3-4b-svsk --reference Qwen/Qwen3-4B --min-recovery 0.98",
    ),
)
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
    engine: Annotated[
        str, typer.Option(help="vllm or hf.", autocompletion=one_of(ENGINES))
    ] = "vllm",
    limit: Annotated[int | None, typer.Option(help="Items per task, from its first.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Over the tasks': do_sample=true,temperature=0.6 ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of few-shot examples and sampling.")] = 1234,
    repeats: Annotated[
        int, typer.Option(min=1, help="Answers to each item, drawn with a temperature.")
    ] = 1,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask as a chat.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="System message of the chat.")
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Argument of lm-eval's model, such as max_model_len=4096;"
                " the value is JSON or a word."
            )
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic: auto, bfloat16, float16, float32.", autocompletion=one_of(DTYPES)
        ),
    ] = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at a time with hf; vllm chooses itself.")
    ] = 8,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Run programs that the models write, in a sandbox."
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    text: Annotated[
        Path | None, typer.Option(help="Also score this plain text, as `svsk eval` does.")
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the text.")] = 32,
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
        _check_models(name if Path(name).is_dir() else name.rpartition("=")[2])
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


@app.command(
    epilog=examples(
        "svsk compare published.json best.json",
        "svsk compare bench-a.json bench-b.json --html report.html",
    )
)
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


@app.command(
    epilog=examples(
        "svsk tune Qwen/Qwen3-4B tuned.yaml --target-bpw 4.5 --budget-minutes 120",
        "svsk tune ./my-model tuned.yaml --recipe fast --calibration text.txt",
    )
)
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

    _check_models(model)
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


@app.command(
    epilog=examples(
        "svsk sweep Qwen/Qwen3-4B sweep-4b --bpw 4.25,4.45,4.62 --text held_out.txt",
        "svsk sweep ./my-model sweep --bpw 4.45 --peer gptq,awq:64 --text held_out.txt",
    )
)
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
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the text, from its start.")] = 32,
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
    engine: Annotated[
        str, typer.Option(help="That runs the tasks: vllm or hf.", autocompletion=one_of(ENGINES))
    ] = "vllm",
    limit: Annotated[int | None, typer.Option(help="Items per task, from its first.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask tasks as a chat.")
    ] = False,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="Argument of lm-eval's model, such as max_model_len=4096."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic of tasks: auto, bfloat16, float16, float32.",
            autocompletion=one_of(DTYPES),
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of tasks at a time, hf.")] = 8,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Run programs that the models write, in a sandbox."
        ),
    ] = False,
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
    _check_models(model)
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


@app.command(
    epilog=examples(
        "svsk report qwen3-4b-svsk --html report.html",
        "svsk report qwen3-4b-svsk --reference Qwen/Qwen3-4B --text held_out.txt --html r.html",
    )
)
def report(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the report there, one page with plots.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Dense model it was made from, for KL on --text.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Plain text to score.")] = None,
    chunks: Annotated[
        int, typer.Option(min=1, help="Chunks of --seq-len tokens, from the start of the text.")
    ] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic: auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.",
            autocompletion=one_of(DTYPES),
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the page if it exists.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show where a checkpoint's bits went, what each matrix loses, and what could be better.

    With a reference and a text also KL by position and by kind of token. Without, no tensor is
    read.
    """
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    if html is not None:
        check_page_file(html, overwrite=overwrite)
    check_device(device)
    choose("--dtype", dtype, DTYPES)
    check_checkpoint(folder)
    from svsk_eval.checkpoint.command import check_options, report_checkpoint

    check_options(reference=reference, text=text, html=html)
    request = None
    if text is not None:
        check_text(text)
        _check_models(reference)
        from svsk_eval.text.request import TextRequest

        request = TextRequest(
            model=str(folder),
            reference=reference,
            text=text,
            chunks=chunks,
            seq_len=seq_len,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    figures = report_checkpoint(console, folder, html=html, request=request, notes=notes)
    write_json(json_file, figures)


@app.command(
    epilog=examples(
        'svsk generate qwen3-4b-svsk --prompt "The capital of France is"',
        'svsk generate ./my-model --prompt "2 + 2 =" --prompt "3 + 3 =" --engine hf',
    )
)
def generate(
    folder: Annotated[str, typer.Argument(help="Dense or SVSK model.")],
    prompt: Annotated[
        list[str], typer.Option(help="May be given several times: they run as one batch.")
    ],
    engine: Annotated[
        str, typer.Option(help="vllm or hf.", autocompletion=one_of(ENGINES))
    ] = "vllm",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, float16, float32.", autocompletion=one_of(DTYPES))
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Complete prompts with a model, through vLLM or transformers."""
    check_report_files(json=json_file)
    choose("--engine", engine, ENGINES)
    choose("--dtype", dtype, DTYPES)
    _check_models(folder)
    from svsk_eval.text.generate import generate_texts

    texts = generate_texts(
        folder,
        prompt,
        engine,
        max_tokens=max_tokens,
        temperature=temperature,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    for question, answer in zip(prompt, texts, strict=True):
        console.print(Text.assemble((question, "bold"), answer))
    pairs = zip(prompt, texts, strict=True)
    write_json(json_file, [{"prompt": question, "answer": answer} for question, answer in pairs])


if __name__ == "__main__":
    app()
