# SPDX-License-Identifier: Apache-2.0
"""What ``svsk compare`` shows of files of ``svsk eval``. Nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from svsk_eval.chat.compare import compare_chat_files, has_chat, has_text
from svsk_eval.text.compare import compare_files
from svsk_eval.text.console import COMPARED, print_comparisons

__all__ = ["compare_scores_and_print"]

_CHAT_COMPARED: Final = (
    *COMPARED,
    ("end_kl", "KL at the end", ".5f"),
    ("end_probability", "ends there", ".4f"),
    ("early_end", "ends sooner", ".4f"),
)


def compare_scores_and_print(console: Console, files: Sequence[Path]) -> dict[str, Any]:
    """Compare what all files hold: scores of a text, of answers, or of both; JSON-ready.

    Raises:
        EvalError: see :func:`svsk_eval.text.compare.compare_files` and
            :func:`svsk_eval.chat.compare.compare_chat_files`.
    """
    chat = all(map(has_chat, files))
    result: dict[str, Any] = {"baseline": str(files[0])}
    if not chat or all(map(has_text, files)):
        comparisons = compare_files(files)
        print_comparisons(console, files[0], comparisons)
        result["comparisons"] = [asdict(comparison) for comparison in comparisons]
    if chat:
        comparisons = compare_chat_files(files)
        console.print("On the reference's answers, by prompt:")
        print_comparisons(console, files[0], comparisons, _CHAT_COMPARED)
        result["chat"] = [asdict(comparison) for comparison in comparisons]
    return result
