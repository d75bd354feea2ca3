# SPDX-License-Identifier: Apache-2.0
"""Proof that the sandbox holds on this machine, before it runs what nobody has read."""

import tempfile
import threading
from pathlib import Path
from typing import Final

from svsk_eval.errors import EvalError
from svsk_eval.sandbox import policy
from svsk_eval.sandbox.limits import CodeLimits, Verdict
from svsk_eval.sandbox.supervise import run_all

__all__ = ["prove_sandbox"]

_GOOD: Final = (
    "import decimal, hashlib, json, math, random, re\nassert math.prod(range(1, 5)) == 24"
)
_EARLY_EXIT: Final = "import os\nos._exit(0)"
_CONTENT: Final = "kept\n"

_lock = threading.Lock()
_proven = False


def _forbidden(victim: Path) -> dict[str, str]:
    """Return programs that do by name what the sandbox must refuse.

    Each runs to its end if it does not.
    """
    path, new = repr(str(victim)), repr(str(victim.with_name("new")))
    programs = {
        "open a socket": "import socket\nsocket.socket()",
        "open a pair of sockets": "import socket\nsocket.socketpair()",
        "make a process": "import os\nif os.fork() == 0:\n    os._exit(0)",
        "start another program": "import os\nos.execv('/bin/true', ['true'])",
        "signal another process": "import os\nos.kill(os.getppid(), 0)",
        "make a file": f"open({new}, 'x')",
        "write to a file": f"open({path}, 'a').write('more')",
        "rename a file": f"import os\nos.rename({path}, {new})",
        "delete a file": f"import os\nos.unlink({path})",
    }
    if policy.landlock_abi():
        programs["read a file of yours"] = f"open({path}).read()"
    return programs


def _prove(workers: int) -> None:
    policy.check_machine()
    with tempfile.TemporaryDirectory(prefix="svsk-code-test-") as folder:
        victim = Path(folder) / "victim"
        victim.write_text(_CONTENT, encoding="utf-8")
        forbidden = _forbidden(victim)
        verdicts = run_all([_GOOD, _EARLY_EXIT, *forbidden.values()], CodeLimits(), workers)
        good, early, *refused = verdicts
        if not good.passed:
            raise EvalError(_message("a harmless program does not run in it", good))
        if early.passed:
            raise EvalError(_message("a program passes that ends before its end", early))
        for name, verdict in zip(forbidden, refused, strict=True):
            if not verdict.detail.startswith("PermissionError"):
                raise EvalError(
                    _message(f"it does not keep a program from trying to {name}", verdict)
                )
        if [path.name for path in victim.parent.iterdir()] != [
            victim.name
        ] or victim.read_text() != _CONTENT:
            raise EvalError(_message("a program changed a file", good))


def _message(what: str, verdict: Verdict) -> str:
    became = f"{verdict.outcome}{f': {verdict.detail}' if verdict.detail else ''}"
    return (
        f"The sandbox for running code fails its test on this machine: {what} ({became}). Nothing"
        " was run. Use another machine or container, one that leaves seccomp filters to its"
        " programs, or leave out the tasks that run code."
    )


def prove_sandbox(workers: int) -> None:
    """Test the sandbox once in the life of this process.

    The first call takes some tenths of a second.

    Raises:
        EvalError: the machine is not supported, something is missing, or the sandbox lets through
            what it must refuse.
    """
    global _proven
    with _lock:
        if not _proven:
            _prove(workers)
            _proven = True
