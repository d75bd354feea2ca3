# SPDX-License-Identifier: Apache-2.0
"""Running programs side by side under a clock.

One loop, no threads, and no process left when it ends.
"""

import contextlib
import marshal
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from svsk_eval.errors import EvalError
from svsk_eval.sandbox import policy
from svsk_eval.sandbox.limits import CodeLimits, Outcome, Verdict

__all__ = ["run_all"]

_START_SECONDS: Final = 60.0
"""How long a child may take to be ready.

Far more than it needs: it says that the machine cannot run children.
"""

_MESSAGE_BYTES: Final = 4096
_SECRET_BYTES: Final = 16
_DETAIL_CHARS: Final = 400
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@cache
def _child_source() -> str:
    return Path(__file__).with_name("child.py").read_text(encoding="utf-8")


def _environment(folder: str) -> dict[str, str]:
    """Return the child's whole environment.

    The loader's variable is kept: the interpreter itself may need it.
    """
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    fixed = {
        "HOME": folder,
        "LC_ALL": "C.UTF-8",
        "PATH": os.defpath,
        "PYTHONHASHSEED": "0",
        "TZ": "UTC",
    }
    return fixed | kept | dict.fromkeys(_THREAD_VARIABLES, "1")


@dataclass(frozen=True)
class _Setting:
    """What all programs of a batch have in common."""

    folder: str
    seconds: float
    order: dict[str, Any]


def _setting(folder: str, limits: CodeLimits) -> _Setting:
    confine = {
        "parent": os.getpid(),
        "limits": policy.resource_limits(limits),
        "landlock_abi": policy.landlock_abi(),
        "readable": [*policy.readable_paths(), folder],
        "seccomp": policy.seccomp_program(),
    }
    return _Setting(
        folder, limits.seconds, {"site_packages": policy.site_packages(), "confine": confine}
    )


def _spawn(order: bytes, channel: int, folder: str) -> subprocess.Popen[bytes]:
    """Start a child that finds ``order`` on its standard input and can write to ``channel``."""
    # a file needs no one to feed it, whatever the size of the program
    stream = os.memfd_create("order")
    try:
        with os.fdopen(os.dup(stream), "wb") as writer:
            writer.write(order)
        os.lseek(stream, 0, os.SEEK_SET)
        # Not -I: it would ignore the hash seed. The environment is made here, and what -c puts
        # first on the module path is the working folder, which is empty.
        return subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-c", _child_source()],
            stdin=stream,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            pass_fds=(channel,),
            start_new_session=True,
        )
    finally:
        os.close(stream)


class _Child:
    """One program's process. ``deadline`` is of the start at first, then of the program."""

    def __init__(self, program: str, setting: _Setting) -> None:
        self._seconds = setting.seconds
        self._secret = secrets.token_hex(_SECRET_BYTES).encode()
        self._received = b""
        self._ready = False
        with contextlib.ExitStack() as undo:
            # Not a pipe: a process can open its end of one for reading, through /proc, and so see
            # what it wrote itself.
            self.channel, theirs = socket.socketpair()
            undo.callback(self.channel.close)
            with theirs:
                self.channel.setblocking(False)
                self.channel.shutdown(socket.SHUT_WR)
                fields = {
                    "secret": self._secret,
                    "channel": theirs.fileno(),
                    "program": str.__str__(program),
                }
                self._process = _spawn(
                    marshal.dumps(fields | setting.order), theirs.fileno(), setting.folder
                )
            undo.callback(self._kill)
            self.pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        self.deadline = time.monotonic() + _START_SECONDS

    def receive(self) -> bool:
        """Take what the channel holds, up to the longest message.

        Return whether more can follow.
        """
        while len(self._received) <= _MESSAGE_BYTES:
            try:
                data = self.channel.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._received += data
            if not self._ready and self._received.startswith(self._secret + b"R"):
                self._ready = True
                self.deadline = time.monotonic() + self._seconds
                self._received = self._received[len(self._secret) + 1 :]
        return False

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill the process and its session's group, reap it, and close what belongs to it."""
        self._kill()
        self.channel.close()
        os.close(self.pidfd)

    def verdict(self, late: bool) -> Verdict:
        """Judge the process, which has ended, or whose time is up (``late``).

        Raises:
            EvalError: it ended before it was ready to run the program, so that nothing is known
                about the program.
        """
        letter, text = b"", ""
        if self._received.startswith(self._secret):
            letter = self._received[len(self._secret) :][:1]
            text = _printable(self._received[len(self._secret) + 1 :])
        if not self._ready:
            reason = text or ("it took too long" if late else f"it ended with {self._ending()}")
            raise EvalError(
                f"The sandbox for running code could not be set up: {reason}. No program was run"
                " in it."
            )
        if late:
            return _fail("timeout", f"not done after {self._seconds:g} s")
        if letter == b"P" and len(self._received) == len(self._secret) + 1:
            return Verdict(True, "passed", "")
        if letter == b"M":
            return _fail("memory", text)
        if letter == b"F":
            return _fail("failed", text)
        stray = " and wrote into the scorer's channel" if self._received else ""
        killed = self._process.returncode < 0
        return _fail(
            "killed" if killed else "failed",
            f"ended with {self._ending()} before its end was reached{stray}",
        )

    def _ending(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"exit status {status}"
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
        return f"signal {-status}"


def _fail(outcome: Outcome, detail: str) -> Verdict:
    return Verdict(False, outcome, detail)


def _printable(message: bytes) -> str:
    """Return a child's text as one line without control characters, which a terminal could obey."""
    text = " ".join(message.decode("utf-8", "replace").split())
    return "".join(character if character.isprintable() else "?" for character in text)[
        :_DETAIL_CHARS
    ]


def _start(program: str, setting: _Setting) -> _Child:
    try:
        return _Child(program, setting)
    except OSError as error:
        raise EvalError(
            f"A process for running code could not be started: {error}. Close other programs or use"
            " fewer workers; pidfd_open needs Linux 5.3."
        ) from error


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    """Yield a folder for the programs to stand in; it stays empty, for they cannot write."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="svsk-code-")
    except OSError as error:
        raise EvalError(
            f"No temporary folder could be made: {error}. Set TMPDIR to a folder to write in."
        ) from error
    with folder as path:
        yield path


class _Batch:
    """The children that run at a time, and the verdicts so far."""

    def __init__(self, setting: _Setting, selector: selectors.BaseSelector) -> None:
        self.verdicts: dict[int, Verdict] = {}
        self.running: dict[int, _Child] = {}
        self._setting = setting
        self._selector = selector

    def start(self, index: int, program: str) -> None:
        child = self.running[index] = _start(program, self._setting)
        self._selector.register(child.channel, selectors.EVENT_READ, index)
        self._selector.register(child.pidfd, selectors.EVENT_READ, index)

    def wait(self) -> None:
        """Wait for news of a child or the next deadline, and judge those that are done."""
        now = time.monotonic()
        nearest = min(child.deadline for child in self.running.values())
        for key, _ in self._selector.select(max(0.0, nearest - now)):
            child = self.running.get(key.data)
            if child is None:  # its other descriptor came first
                continue
            more = child.receive()
            if key.fd == child.pidfd:
                self._finish(key.data, late=False)
            elif not more:
                self._selector.unregister(child.channel)
        now = time.monotonic()
        for index in [index for index, child in self.running.items() if child.deadline <= now]:
            self._finish(index, late=True)

    def _finish(self, index: int, *, late: bool) -> None:
        child = self.running.pop(index)
        with contextlib.suppress(KeyError):  # it is not there after the end of its messages
            self._selector.unregister(child.channel)
        self._selector.unregister(child.pidfd)
        child.close()
        self.verdicts[index] = child.verdict(late)


def run_all(programs: Sequence[str], limits: CodeLimits, workers: int) -> list[Verdict]:
    """Run the programs, ``workers`` at a time, and return their verdicts in order.

    Asks for no consent and trusts the sandbox: callers see to both.

    Raises:
        EvalError: a child could not be started or confined, or this process ignores SIGCHLD.
    """
    # an ended child's number could be another process's by then
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise EvalError(
            "Running code: this process ignores SIGCHLD, perhaps because its parent did, so that"
            " the ends of programs cannot be told. Set it back first: signal.signal(signal.SIGCHLD,"
            " signal.SIG_DFL)."
        )
    with _empty_folder() as folder, selectors.DefaultSelector() as selector:
        batch = _Batch(_setting(folder, limits), selector)
        waiting = iter(enumerate(programs))
        try:
            while len(batch.verdicts) < len(programs):
                while len(batch.running) < workers and (job := next(waiting, None)) is not None:
                    batch.start(*job)
                batch.wait()
        finally:
            for child in batch.running.values():
                child.close()
        return [batch.verdicts[index] for index in range(len(programs))]
