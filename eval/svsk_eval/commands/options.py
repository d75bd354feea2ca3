# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands take, and a check of models."""

from pathlib import Path
from typing import Annotated

import typer

from svsk_eval.choices import DTYPES, ENGINES
from svsk_offline.completion import one_of

__all__ = [
    "ApplyChatTemplate",
    "BatchSize",
    "Chunks",
    "ConfirmRunUnsafeCode",
    "Dtype",
    "Engine",
    "HtmlFile",
    "IncludePath",
    "Limit",
    "MarkdownFile",
    "ModelArg",
    "check_models",
]

MarkdownFile = Annotated[Path | None, typer.Option(help="Write the report of tasks there.")]
HtmlFile = Annotated[
    Path | None, typer.Option(help="Write the report of tasks there, one page with plots.")
]
Chunks = Annotated[
    int, typer.Option(min=1, help="Chunks of --seq-len tokens, from the start of the text.")
]

# Of lm-eval's tasks.
Engine = Annotated[
    str, typer.Option(help="That runs the tasks: vllm or hf.", autocompletion=one_of(ENGINES))
]
Limit = Annotated[int | None, typer.Option(help="Items per task, from its first.")]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Ask as a chat.")]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        help="Argument of lm-eval's model, such as max_model_len=4096; the value is JSON or a word."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Arithmetic of tasks: auto, bfloat16, float16, float32.",
        autocompletion=one_of(DTYPES),
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Prompts at a time with hf; vllm chooses itself.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder of further task files.")]
ConfirmRunUnsafeCode = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code", help="Run programs that the models write, in a sandbox."
    ),
]


def check_models(*models: str | None) -> None:
    """Refuse what is no model's folder and cannot be on the hub, before anything is imported."""
    from svsk_offline.storage.hub import check_model

    for model in models:
        if model is not None:
            check_model(model)
