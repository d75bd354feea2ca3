# SPDX-License-Identifier: Apache-2.0
"""``svsk eval`` and ``generate``: one model, run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from svsk_eval.choices import ACTIVATIONS, DTYPES, ENGINES, KV_KINDS
from svsk_eval.commands.options import Chunks, check_models
from svsk_offline.choices import check_device, choose
from svsk_offline.cli_options import (
    Device,
    JsonFile,
    Quiet,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import one_of
from svsk_offline.preflight import (
    check_report_files,
    check_text,
)
from svsk_offline.terminal import console, notes, write_json

__all__ = ["evaluate", "generate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Dense or SVSK model: folder or hub name.")],
    text: Annotated[Path | None, typer.Option(help="Plain text to score.")] = None,
    reference: Annotated[str | None, typer.Option(help="Dense model to compare with.")] = None,
    chunks: Chunks = 32,
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
    check_models(model, reference)
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
    check_models(folder)
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
