# SPDX-License-Identifier: Apache-2.0
"""What a program may use, what became of it, and the user's consent to run it at all."""

import os
from dataclasses import dataclass
from typing import Final, Literal

from svsk_eval.errors import EvalError

__all__ = ["CONSENT_VARIABLE", "CodeLimits", "Outcome", "Verdict", "check_consent", "consent_given"]

CONSENT_VARIABLE: Final = "HF_ALLOW_CODE_EVAL"
"""Environment variable by which Hugging Face's ``evaluate`` and lm-eval learn of consent.

Consent is the value 1.
"""

Outcome = Literal["passed", "failed", "timeout", "memory", "killed"]


@dataclass(frozen=True)
class CodeLimits:
    """What one program may use.

    Attributes:
        seconds: wall-clock time from the moment the program is compiled; starting Python does not
            count.
        memory_bytes: address space, the interpreter's own 13 MiB included; it takes 64 MiB to do
            anything.
        open_files: file descriptors; imports hold a few open at a time.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: whether it ran to its end; the same as ``outcome == "passed"``.
        outcome: ``failed`` by an exception or an early exit, ``timeout``, ``memory`` (MemoryError),
            or ``killed`` by a signal, such as a segmentation fault.
        detail: why, in one printable line of at most 400 characters; empty for ``passed``. It may
            hold words of the program.
    """

    passed: bool
    outcome: Outcome
    detail: str


def consent_given() -> bool:
    """Whether the environment variable named by CONSENT_VARIABLE is 1."""
    return os.environ.get(CONSENT_VARIABLE) == "1"


def check_consent(consent: bool) -> None:
    """Raise EvalError unless ``consent`` is True."""
    if consent is not True:
        raise EvalError(
            "This task runs programs that a model wrote, and nobody has read them. They run in a"
            " sandbox without network, processes or writing, but a sandbox can have holes: use a"
            " machine without secrets. To consent, pass --confirm-run-unsafe-code to `svsk bench`;"
            f" with lm-eval, pass --confirm_run_unsafe_code and set {CONSENT_VARIABLE}=1."
        )
