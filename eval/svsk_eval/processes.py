# SPDX-License-Identifier: Apache-2.0
"""A model in a process of its own: starting it, following it, and ending it with all it started.

:func:`run_request` starts a module on a request, a file of JSON, and :func:`answer_request` is what
that module calls.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from svsk_eval.errors import EvalError
from svsk_kernels.errors import SvskError

__all__ = ["answer_request", "run_request"]

_LOG_LINES: Final = 25
_LOG_WIDTH: Final = 400

_GRACE: Final = 20.0
"""Seconds a process that is ended early has to end its workers."""

_FAILED: Final = 3
_ORPHANED: Final = 4


def run_request(
    module: str,
    request: BaseModel,
    folder: Path,
    name: str,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Run a module that answers a request, to its end.

    Args:
        module: calls :func:`answer_request`.
        request: goes into ``request.json`` in the folder.
        folder: also takes ``log.txt``, all that the process prints.
        name: of the model, for errors.
        report: called with what the module reports.

    Raises:
        EvalError: the module cannot do it, or its process failed.
    """
    (folder / "request.json").write_text(request.model_dump_json(indent=1), encoding="utf-8")
    log = folder / "log.txt"
    errors: list[str] = []

    def take(line: str) -> None:
        message = json.loads(line)
        if "error" in message:
            errors.append(message["error"])
        else:
            report(message)

    code = _run_module(module, folder / "request.json", log, take)
    if errors:
        raise EvalError(f"{name}: {errors[0]}")
    if code:
        raise EvalError(
            f"{name}: its process failed ({_ending(code)}). The end of {log}:\n{_log_tail(log)}"
        )


def answer_request(work: Callable[[Path, Callable[..., None]], None]) -> None:
    """In a process of :func:`run_request`: do the work, and tell the parent why it cannot be done.

    Args:
        work: called with the request's file and a function that reports its keyword arguments.
    """
    _die_with_parent()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the parent shows the progress
    request, pipe = sys.argv[1:]
    with os.fdopen(int(pipe), "w", buffering=1) as parent:

        def report(**values: Any) -> None:
            parent.write(json.dumps(values) + "\n")

        try:
            work(Path(request), report)
        except SvskError as error:
            report(error=str(error))
            sys.exit(_FAILED)


def _run_module(module: str, request: Path, log: Path, report: Callable[[str], None]) -> int:
    """Run a module to its end; its exit code, negative for a signal.

    It gets the request's file and the number of a pipe whose lines go to ``report``. It is ended
    when this process is interrupted and, by :func:`_die_with_parent`, when this one is killed.
    """
    read, write = os.pipe()
    # The engine in the process itself: one process less to start, to wait for and to end.
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    } | os.environ
    # what it prints stands in the log before the error that ends it
    environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-m", module, str(request), str(write)]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[write],
                env=environment,
            )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    try:
        _follow(process, read, report)
    finally:  # also when this process is interrupted
        os.close(read)
        code = _end(process)
    return code


def _die_with_parent() -> None:
    """End a process of :func:`run_request` when its parent is gone, which closes standard input."""

    def wait() -> None:
        # not sys.stdin, whose lock this thread would hold when the process ends
        while os.read(0, 1024):
            pass
        os._exit(_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def _ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}, as when memory runs out" if name == "SIGKILL" else f"ended by {name}"


def _log_tail(path: Path) -> str:
    """The end of a log, without empty lines."""
    lines = [
        line.rstrip()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return "\n".join(line[:_LOG_WIDTH] for line in lines[-_LOG_LINES:]) or "(it is empty)"


def _follow(process: subprocess.Popen[bytes], pipe: int, report: Callable[[str], None]) -> None:
    """Report lines from the pipe until the process has ended."""
    pending = b""
    while True:
        ended = process.poll() is not None
        if select.select([pipe], [], [], 0 if ended else 0.5)[0]:
            data = os.read(pipe, 1 << 16)
            if not data:
                process.wait()
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                report(line.decode())
        # workers inherit the pipe and may outlive a process that was killed: its end may not come
        elif ended:
            return


def _end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which is ended if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()
