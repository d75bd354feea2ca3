# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` does: score a text, a reference's answers, or both."""

from pathlib import Path
from typing import Any

from rich.console import Console

from svsk_eval.chat.console import evaluate_chat_with_progress
from svsk_eval.chat.scoring import ChatRequest, prepare_chat
from svsk_eval.errors import EvalError
from svsk_eval.text.console import evaluate_with_progress
from svsk_eval.text.request import TextRequest

__all__ = ["check_options", "evaluate_parts"]


def check_options(
    *,
    text: Path | None,
    chat: Path | None,
    answers: Path | None,
    reference: str | None,
    engine: str,
    kv: str | None = None,
    activations: str | None = None,
) -> None:
    """Refuse options of ``svsk eval`` that do not go together.

    Raises:
        EvalError: there is nothing to score, or an option would have no effect.
    """
    if text is None and chat is None:
        raise EvalError("Nothing to score: give --text, --chat, or both.")
    if kv is not None and chat is not None:
        raise EvalError(
            f"--kv {kv}: goes with --text only, answers are scored without a stored cache. Leave"
            " --chat out."
        )
    if activations is not None and chat is not None:
        raise EvalError(
            f"--activations {activations}: goes with --text only, answers are scored with"
            " activations as they are. Leave --chat out."
        )
    if chat is None:
        if answers is not None:
            raise EvalError(f"--answers {answers}: goes with --chat only. Leave it out.")
        return
    if reference is None:
        raise EvalError(
            f"--chat {chat}: scores the answers of a reference. Name it with --reference."
        )
    if engine != "hf":
        raise EvalError(
            f"--chat {chat}: goes with --engine hf only, {engine} does not give whole"
            " distributions. Leave one of them out."
        )


def evaluate_parts(
    console: Console,
    text: TextRequest | None,
    chat: ChatRequest | None,
    notes: Console | None = None,
) -> dict[str, Any]:
    """Score what is asked for, show the figures, and return them JSON-ready.

    Whatever can be refused of the chat is, before the text is scored. ``notes`` is where progress
    is shown, ``console`` if None.

    Raises:
        SvskError: see :func:`svsk_eval.text.request.score` and :mod:`svsk_eval.chat.scoring`.
    """
    prepared = None if chat is None else prepare_chat(chat)
    result = {} if text is None else evaluate_with_progress(console, text, notes)
    if prepared is None:
        return result
    request = prepared.request
    names = {
        "model": request.model,
        "reference": request.reference,
        "dtype": prepared.dtype,
        "engine": "hf",
    }
    scores = evaluate_chat_with_progress(console, prepared, notes)
    return {**names, **result, "chat": scores.to_json()}
