# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command. Heavy packages are imported by the subcommand that needs them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from svsk_offline.endings import plain_endings
from svsk_offline.errors import SvskError
from svsk_offline.preflight import (
    calibration_path,
    check_effect,
    check_output,
    check_recipe_file,
    check_report_files,
    check_text,
)
from svsk_vllm.version import __version__

__all__ = ["app"]

_CONTINUES: Final = {
    "quantize": "Start it again with the same arguments to go on after the last finished block.",
    "tune": "Start it again with the same arguments to go on after the last finished trial.",
    "bench": "Start it again with the same arguments to go on after the last answer.",
}


class _Commands(typer.core.TyperGroup):
    """All subcommands end in one line instead of a traceback, whatever stops them."""

    def invoke(self, ctx: Any) -> Any:
        with plain_endings(_say_error, lambda: _CONTINUES.get(ctx.invoked_subcommand)):
            return super().invoke(ctx)


app = typer.Typer(
    name="svsk", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)  # fmt: skip
console = Console(soft_wrap=True)
_errors = Console(stderr=True, soft_wrap=True)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
TileM = Annotated[int | None, typer.Option(help="Rows of a tile, 0 for all.")]
TileN = Annotated[int | None, typer.Option(help="Columns of a tile, 0 for all.")]
CodebookName = Annotated[str | None, typer.Option(help="int4 or quad8.")]
CalibrationText = Annotated[
    str, typer.Option(help="File (text, JSON lines or list, parquet), dataset name[:config]:split, or python.")
]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Render Q/A rows as chat.")]
Samples = Annotated[int | None, typer.Option(help="Calibration samples.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per sample.")]
Seed = Annotated[int | None, typer.Option(help="Of the draw of samples.")]
StoredDtype = Annotated[str, typer.Option(help="Of scales and dense tensors: auto, bfloat16, float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with the model.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")]
MarkdownFile = Annotated[Path | None, typer.Option(help="Write the report of tasks there.")]
HtmlFile = Annotated[Path | None, typer.Option(help="Write the report of tasks there, one page with plots.")]


def _say_note(text: str) -> None:
    console.print(text, highlight=False, markup=False)


def _say_error(text: str) -> None:
    _errors.print(f"[bold red]error:[/] {escape(text)}", highlight=False)


def _write_json(target: Path | None, value: Any) -> None:
    if target is not None:
        from svsk_offline.atomic import write_json

        write_json(target, value)


def _version(value: bool) -> None:
    if value:
        console.print(f"svsk {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Quantise language models to SVSK checkpoints; inspect, check, restore, evaluate and run them."""


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Name (see `svsk recipes`) or YAML file.")] = "best",
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight; rank and group size are then chosen per matrix.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Sidecar rank per tile, 0 for none.")] = None,
    tile_m: TileM = None,
    tile_n: TileN = None,
    factor_bits: Annotated[int | None, typer.Option(help="Bits of a sidecar factor, 8 or 4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights per scale, 32 or 64.")] = None,
    codebook: CodebookName = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Module to leave alone: name or re:pattern.")] = None,
    calibration: CalibrationText = "python",
    chat_template: ChatTemplate = False,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--parallel", help="Calibrate each block on the outputs of the quantised ones before."
        ),
    ] = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantise MODEL into the SVSK checkpoint OUT.

    Example: `svsk quantize Qwen/Qwen3-4B qwen3-4b-svsk --calibration text.txt --target-bpw 4.5`
    """
    check_output(out, overwrite=overwrite, source=model)  # what takes no time comes before imports that do
    calibration_path(calibration)
    from svsk_offline.console import quantize_with_progress
    from svsk_offline.recipe import load_recipe

    chosen = load_recipe(recipe).override(
        {
            "weights": {"group_size": group_size, "codebook": codebook},
            "sidecar": {"rank": rank, "tile_m": tile_m, "tile_n": tile_n, "num_bits": factor_bits},
            "calibration": {"samples": samples, "seq_len": seq_len, "seed": seed, "sequential": sequential},
            "allocation": {"target_bpw": target_bpw, "group_sizes": group_size and (group_size,)},
            "ignore": tuple(ignore or ()),
        }
    )
    if chosen.allocation.target_bpw is not None and (rank is not None or factor_bits is not None):
        raise SvskError(
            f"Under a target of {chosen.allocation.target_bpw} bits per weight ranks and factor bits are chosen: "
            "leave --rank and --factor-bits out."
        )
    if chosen.allocation.target_bpw is None and not chosen.sidecar.rank:
        tiles = {"--tile-m": tile_m, "--tile-n": tile_n, "--factor-bits": factor_bits}
        check_effect(tiles, "at rank 0, which has no sidecar")
    quantize_with_progress(
        console, model, out, chosen,
        calibration=calibration, chat_template=chat_template, device=device, dtype=dtype, overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def recipes() -> None:
    """List the recipes shipped with the package."""
    from svsk_offline.recipe import load_recipe, recipe_names

    table = Table("name", "base", "sidecar", "description")
    for name in recipe_names():
        recipe = load_recipe(name)
        side, weights = recipe.sidecar, recipe.weights
        table.add_row(
            name,
            f"{recipe.base.method}, {weights.codebook} g{weights.group_size}",
            f"{recipe.fit.method}, r{side.rank} {side.num_bits} bit, {side.tile_m}x{side.tile_n}",
            recipe.description,
        )
    console.print(table)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Show what a checkpoint holds: bits per weight with every stored bit counted, sizes, recipe, producer."""
    from svsk_offline.inspect import inspect_checkpoint, print_inspection

    found = inspect_checkpoint(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_inspection(console, found)


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")], trust_remote_code: TrustRemoteCode = False
) -> None:
    """Check a checkpoint's structure and numbers; list every problem and exit with 1 if there is one."""
    from svsk_offline.inspect import serving_note, validate_against_architecture

    problems = validate_against_architecture(
        folder,
        trust_remote_code=trust_remote_code,
        note=lambda text: console.print(f"[yellow]not checked:[/] {escape(text)}", highlight=False),
    )
    note = None if problems else serving_note(folder)
    if note:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    for problem in problems:
        console.print(f"[red]problem:[/] {escape(problem)}", highlight=False)
    if problems:
        console.print(f"{len(problems)} problem(s) in {folder}")
        raise typer.Exit(1)
    console.print(f"{folder}: valid")


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the dense Hugging Face model a checkpoint stands for."""
    check_output(out, overwrite=overwrite, dense=True, source=folder)
    from svsk_offline.restore import restore as run

    console.print(f"wrote {run(folder, out, overwrite=overwrite, say=_say_note)}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Dense or SVSK model: folder or hub name.")],
    text: Annotated[Path, typer.Option(help="Plain text to score.")],
    reference: Annotated[str | None, typer.Option(help="Dense model to compare with.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of --seq-len tokens, from the start of the text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic: auto (float32 on a CPU; vllm: the checkpoint's if fast), float32, bfloat16, float16."
        ),
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="hf: dequantised weights. vllm: the served model, its kernels included; no KL.")
    ] = "hf",
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="Argument of vllm.LLM, such as tensor_parallel_size=2; the value is JSON or a word."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
) -> None:
    """Score MODEL: NLL, perplexity, and KL divergence and top-1 agreement against a reference."""
    check_report_files(json=json_file)
    check_text(text)
    from svsk_eval.console import evaluate_with_progress
    from svsk_eval.engine_args import parse_engine_args

    result = evaluate_with_progress(
        console, model, reference, text, chunks=chunks, seq_len=seq_len, device=device, dtype=dtype,
        engine=engine, engine_args=parse_engine_args(engine_arg or ()), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _write_json(json_file, result)


@app.command("bench")
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Variants: folders or hub names, or LABEL=MODEL.")],
    reference: Annotated[str, typer.Option(help="Dense model they are made from, or LABEL=MODEL.")],
    tasks: Annotated[
        str, typer.Option(help="lm-eval's names of tasks and groups, separated by commas.")
    ] = "svsk_smoke",
    engine: Annotated[str, typer.Option(help="vllm or hf.")] = "vllm",
    limit: Annotated[int | None, typer.Option(help="Items per task, from its first.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Over the tasks': do_sample=true,temperature=0.6 ...")] = None,
    seed: Annotated[int, typer.Option(help="Of few-shot examples and sampling.")] = 1234,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as a chat.")] = False,
    system_instruction: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="Argument of lm-eval's model, such as max_model_len=4096; the value is JSON or a word."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, bfloat16, float16, float32.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time with hf; vllm chooses itself.")] = 8,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run programs that the models write, in a sandbox.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    text: Annotated[Path | None, typer.Option(help="Also score this plain text, as `svsk eval` does.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    text_engine: Annotated[str, typer.Option(help="hf (KL, NLL), vllm (NLL as served) or hf,vllm.")] = "hf",
    min_recovery: Annotated[
        float | None, typer.Option(help="Exit with 1 if any task keeps less, such as 0.98.")
    ] = None,
    work_dir: Annotated[Path, typer.Option(help="Keeps answers; a killed run goes on there.")] = Path("svsk-bench"),
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    html: HtmlFile = None,
) -> None:
    """Run lm-eval tasks for a reference and its variants, on the same items, and compare them item by item.

    Example: `svsk bench qwen3-4b-svsk --reference Qwen/Qwen3-4B --tasks svsk_reasoning --html report.html`
    """
    check_report_files(json=json_file, markdown=markdown, html=html)
    from svsk_eval.bench.command import bench_with_progress, engine_names, settings_of, shown_command
    from svsk_eval.bench.runner import BenchOptions, TextOptions, candidate
    from svsk_eval.engine_args import parse_engine_args

    settings = settings_of(
        tasks, engine=engine, limit=limit, seed=seed, gen_kwargs=gen_kwargs,
        apply_chat_template=apply_chat_template, system_instruction=system_instruction,
        model_args={
            **parse_engine_args(model_arg or (), "--model-arg"),
            **({"trust_remote_code": True} if trust_remote_code else {}),
        },
    )  # fmt: skip
    scored = text and TextOptions(text, chunks, seq_len, engine_names(text_engine, "--text-engine"))
    options = BenchOptions(
        work_dir=work_dir, dtype=dtype, include_path=include_path, batch_size=batch_size,
        consent=confirm_run_unsafe_code, text=scored or None, command=shown_command(sys.argv[1:]),
    )  # fmt: skip
    passed = bench_with_progress(
        console, [candidate(name) for name in (reference, *models)], settings, options,
        json_file=json_file, markdown=markdown, html=html, min_recovery=min_recovery,
    )  # fmt: skip
    if not passed:
        raise typer.Exit(1)


@app.command()
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of `svsk eval --json`, or of `svsk bench --json`; the first is the baseline."),
    ],
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    html: HtmlFile = None,
) -> None:
    """Compare evaluations of the same text chunk by chunk, or of the same tasks item by item.

    Example: `svsk compare published.json best.json`
    """
    check_report_files(json=json_file, markdown=markdown, html=html)
    from svsk_eval.bench.compare import compare_and_print, is_bench_report
    from svsk_eval.compare import compare_files
    from svsk_eval.console import print_comparisons

    if any(map(is_bench_report, files)):
        compare_and_print(console, files, json_file, markdown, html)
        return
    if markdown is not None or html is not None:
        raise SvskError("--markdown and --html are for files of `svsk bench --json`.")
    comparisons = compare_files(files)
    print_comparisons(console, files[0], comparisons)
    found = {"baseline": str(files[0]), "comparisons": [comparison.to_json() for comparison in comparisons]}
    _write_json(json_file, found)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Recipe to write, .yaml.")],
    target_bpw: Annotated[float | None, typer.Option(help="Bits per weight, spent where they help most.")] = None,
    budget_minutes: Annotated[float, typer.Option(help="Of all runs of this search together.")] = 60.0,
    recipe: Annotated[str, typer.Option(help="Where to start: name or YAML file.")] = "best",
    codebook: CodebookName = None,
    tile_m: TileM = None,
    tile_n: TileN = None,
    calibration: CalibrationText = "python",
    chat_template: ChatTemplate = False,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    held_out: Annotated[int, typer.Option(help="Pieces of the text to score on, not to calibrate with.")] = 16,
    work_dir: Annotated[Path | None, typer.Option(help="For trials; OUT.tune if not given.")] = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and forget a search with other inputs.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Search for a recipe that suits MODEL better, by the KL divergence on held-out text; write it to OUT.

    The recipe given is the first trial, and the result unless another is better by a standard error or more. Started
    again, a search that was killed continues; with a larger budget and `--overwrite` one that is over goes on.

    Example: `svsk tune Qwen/Qwen3-4B tuned.yaml --target-bpw 4.5 --budget-minutes 120 --calibration text.txt`
    """
    check_recipe_file(out, overwrite=overwrite)
    if work_dir is not None and work_dir.exists() and not work_dir.is_dir():
        raise SvskError(f"--work-dir {work_dir}: is a file, expected a folder.")
    calibration_path(calibration)
    from svsk_eval.tune_console import tune_with_progress
    from svsk_offline.recipe import load_recipe

    chosen = load_recipe(recipe).override(
        {
            "weights": {"codebook": codebook},
            "sidecar": {"tile_m": tile_m, "tile_n": tile_n},
            "calibration": {"samples": samples, "seq_len": seq_len, "seed": seed},
            "allocation": {"target_bpw": target_bpw},
        }
    )
    tune_with_progress(
        console, model, out, chosen,
        budget_minutes=budget_minutes, calibration=calibration, chat_template=chat_template, held_out=held_out,
        work_dir=work_dir, device=device, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Dense or SVSK model.")],
    prompt: Annotated[list[str], typer.Option(help="May be given several times: they run as one batch.")],
    engine: Annotated[str, typer.Option(help="vllm or hf.")] = "vllm",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Complete prompts with a model, through vLLM or transformers."""
    from svsk_eval.generate import generate_texts

    texts = generate_texts(
        folder, prompt, engine,
        max_tokens=max_tokens, temperature=temperature, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    for asked, answered in zip(prompt, texts, strict=True):
        console.print(Text.assemble((asked, "bold"), answered))


if __name__ == "__main__":
    app()
