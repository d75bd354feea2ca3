# SPDX-License-Identifier: Apache-2.0
"""The code tasks: from a model's answers to programs, and their score pass@k.

The programs run in the sandbox of :mod:`svsk_eval.sandbox`, only with consent. lm-eval's own code
tasks run them with the package ``evaluate`` instead, which downloads its metric. What makes a
program of an answer is the same as there (lm-eval, MIT licence, tasks humaneval and mbpp), but for
:func:`first_code_block`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from svsk_eval.errors import EvalError

__all__ = [
    "estimate_pass_at_k",
    "first_code_block",
    "humaneval_instruct_programs",
    "humaneval_programs",
    "mbpp_instruct_programs",
    "mbpp_programs",
    "pass_at_k",
    "require_sandbox",
]

Answers = Sequence[Sequence[str]]
"""The model's answers: per document one for each repeat."""

Documents = Sequence[Mapping[str, Any]]

_FENCE: Final = "```"
_BLOCK: Final = re.compile(r"```(?:\w*\n)?(.*?)\n?```", re.DOTALL)
"""lm-eval's pattern, but a word after the fence names a language only if its line ends there.

lm-eval drops the ``def`` of an answer that starts with it, as answers do where the model's
chat template strips the newline that the prompt ends with.
"""


def estimate_pass_at_k(answers: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k answers is correct.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv:2107.03374), section 2.1.

    Args:
        answers: n, that were drawn for the problem.
        correct: c of them that passed.
        k: answers that may be submitted.

    Raises:
        EvalError: there are fewer answers than k.
    """
    if not 1 <= k <= answers:
        raise EvalError(
            f"pass@{k}: got {answers} answer(s) per problem, expected at least {max(k, 1)}. Raise"
            " `repeats` in the task's file (and let the model sample), or ask for a smaller k of"
            " at least 1."
        )
    return 1.0 - math.comb(answers - correct, k) / math.comb(answers, k)


def pass_at_k(
    references: Sequence[str],
    predictions: Sequence[str | Sequence[str]],
    k: int | Sequence[int] = 1,
) -> dict[str, float]:
    """Run the programs of some problems and estimate pass@k.

    lm-eval calls this for one problem at a time.

    Args:
        references: per problem the tests that are put after the program.
        predictions: per problem the program, or the programs of its repeats.
        k: one or several.

    Returns:
        ``{"pass@1": ...}``: the mean over the problems for every k, 0 to 1.

    Raises:
        EvalError: there is no consent to running code, or fewer answers than k.
    """
    from svsk_eval.sandbox import consent_given, run_programs

    ks = [k] if isinstance(k, int) else list(k)
    estimates: dict[str, list[float]] = {f"pass@{each}": [] for each in ks}
    for tests, answers in zip(references, predictions, strict=True):
        drawn = [answers] if isinstance(answers, str) else answers
        verdicts = run_programs([f"{answer}\n{tests}" for answer in drawn], consent=consent_given())
        correct = sum(verdict.passed for verdict in verdicts)
        for each in ks:
            estimates[f"pass@{each}"].append(estimate_pass_at_k(len(verdicts), correct, each))
    return {name: math.fsum(values) / len(values) for name, values in estimates.items()}


def require_sandbox(task: str) -> None:
    """Find out before a model writes answers, and not hours later, whether they can be scored.

    Raises:
        EvalError: there is no consent to running code, or the sandbox does not work here.
    """
    from svsk_eval.sandbox import consent_given, run_programs

    if not consent_given():
        raise EvalError(
            f"{task} runs programs that the model writes, and HF_ALLOW_CODE_EVAL is not 1. If you"
            " accept that, set HF_ALLOW_CODE_EVAL=1 (lm-eval also wants --confirm_run_unsafe_code;"
            " `svsk bench` wants nothing but --confirm-run-unsafe-code); else leave this task out."
        )
    verdict = run_programs(["assert 1 + 1 == 2"], consent=True)[0]
    if not verdict.passed:
        raise EvalError(
            f"{task} runs programs in a sandbox, and one that cannot fail did: {verdict.outcome}"
            f" ({verdict.detail}). Run it where the sandbox works, or leave this task out."
        )


def humaneval_programs(answers: Answers, documents: Documents) -> list[list[str]]:
    """A program is the prompt and its continuation."""
    return [
        [doc["prompt"] + answer for answer in drawn]
        for drawn, doc in zip(answers, documents, strict=True)
    ]


def humaneval_instruct_programs(answers: Answers, documents: Documents) -> list[list[str]]:
    """The same, the continuation up to the end of the code block that the prompt opened."""
    return humaneval_programs(
        [[answer.partition(_FENCE)[0] for answer in drawn] for drawn in answers], documents
    )


def mbpp_programs(answers: Answers, documents: Documents) -> list[list[str]]:
    """A program is the answer as it is; the stop string ended it."""
    return [list(drawn) for drawn in answers]


def mbpp_instruct_programs(answers: Answers, documents: Documents) -> list[list[str]]:
    """A program is the first code block."""
    return [[first_code_block(answer) for answer in drawn] for drawn in answers]


def first_code_block(text: str) -> str:
    """The code in an answer's first block between fences, which the prompt has opened.

    An answer that opens a block of its own is understood as well.

    Returns:
        The code; empty if no block ends.
    """
    opened = _BLOCK.findall(_FENCE + text)
    blocks = opened or _BLOCK.findall(text.replace(f"{_FENCE}python", _FENCE))
    return str(blocks[0]) if blocks else ""
