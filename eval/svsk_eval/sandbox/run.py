# SPDX-License-Identifier: Apache-2.0
"""Run programs: consent is checked, then the sandbox."""

import os
from collections.abc import Sequence

from svsk_eval.sandbox.limits import CodeLimits, Verdict, check_consent
from svsk_eval.sandbox.selftest import prove_sandbox
from svsk_eval.sandbox.supervise import run_all

__all__ = ["run_programs"]

_DEFAULT_LIMITS = CodeLimits()


def run_programs(
    programs: Sequence[str],
    *,
    consent: bool,
    limits: CodeLimits = _DEFAULT_LIMITS,
    workers: int | None = None,
) -> list[Verdict]:
    """Run each program in a sandbox of its own, several at a time.

    The first call in a process tests the sandbox. An interrupted call leaves nothing behind. If the
    calling process is killed, the programs are too; an empty temporary folder stays.

    Args:
        programs: Python source, any text at all: what does not compile has failed.
        consent: the user's explicit consent to run code that nobody has read.
        limits: of each program.
        workers: programs at a time; by default one per processor that this process may use.

    Returns:
        Verdicts in the order of ``programs``.

    Raises:
        EvalError: no consent, or the sandbox is not available or does not hold on this machine.
    """
    check_consent(consent)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not programs:
        return []
    prove_sandbox(workers)
    return run_all(programs, limits, workers)
