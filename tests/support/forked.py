# SPDX-License-Identifier: Apache-2.0
"""Processes that need not import torch, transformers, lm-eval or vLLM: forks of one that has.

Importing them takes longer than everything that a tiny model does afterwards. A server, ``python -m
tests.support.forked SOCKET MODULE ...``, imports them once and forks at each start. The process is
one of its own all the same: it has its memory, its files, its environment and its end, and runs the
project's own modules, which the server has not imported, from the start.
"""

import fcntl
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

ROOT: Final = Path(__file__).parents[2]

_FREE: Final = 200
"""Descriptors from here on are taken by nobody else."""

_LONGEST: Final = 1 << 17
"""Bytes of an order."""


class ForkServer:
    """A process to fork, started by the first who needs it and ended by :meth:`stop`.

    Args:
        imported: modules that the process imports before it is forked: none of the project's own,
            and none that reads its environment once and for all.
        environment: of the process that imports; every fork has its own.
    """

    def __init__(self, *imported: str, environment: Mapping[str, str] | None = None) -> None:
        self.imported = imported
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(self, order: Mapping[str, Any], files: Sequence[int]) -> int:
        """Fork a process for an order, which gets these descriptors, and return its number."""
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.support.forked", str(theirs.fileno())]
            with theirs:
                self._process = _POPEN(
                    [*command, *self.imported],
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        socket.send_fds(self._socket, [json.dumps(order).encode()], list(files))
        answer = self._socket.recv(16)
        assert answer, "the process that is forked has ended; see above"
        return int(answer)

    def stop(self) -> None:
        """End the server."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()
            self._socket = self._process = None


_POPEN: Final = subprocess.Popen


class ForkedPopen(subprocess.Popen[bytes]):
    """``subprocess.Popen`` that forks a process of the server for ``python -m`` with some modules.

    Attributes:
        server: who forks.
        modules: which modules it runs; anything else is started as ever.
    """

    server = ForkServer(
        "lm_eval.evaluator",
        "lm_eval.models.huggingface",
        "lm_eval.tasks",
        "transformers.models.llama.modeling_llama",
    )
    modules: ClassVar[tuple[str, ...]] = ("svsk_eval.bench.worker", "svsk_eval.text.worker")

    _status = -1
    """Read end of a pipe that brings the exit code; -1 if the process is no fork."""

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        if list(args[:2]) != [sys.executable, "-m"] or args[2] not in self.modules:
            super().__init__(args, env=env, **options)
            return
        stdin, stdout, stderr = (options.pop(name, None) for name in ("stdin", "stdout", "stderr"))
        passed = list(options.pop("pass_fds", ()))
        assert not options, f"ForkedPopen does not know {options}"
        assert stdin in (subprocess.PIPE, subprocess.DEVNULL)
        self.args, self.returncode = args, None
        self.stdin = self.stdout = self.stderr = None
        read, write = os.pipe()
        if stdin == subprocess.PIPE:
            theirs, ours = os.pipe()
            self.stdin = os.fdopen(ours, "wb", 0)
        else:
            theirs = os.open(os.devnull, os.O_RDONLY)
        environment = dict(os.environ if env is None else env)
        order = {
            "arguments": list(args[2:]),
            "environment": environment,
            "folder": str(Path.cwd()),
            "path": sys.path,
        }
        order |= {"numbers": [0, 1, 2, *passed]}
        try:
            self.pid = self.server.fork(
                order, [write, theirs, stdout.fileno(), stderr.fileno(), *passed]
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
            os.close(theirs)
        self._status = read

    def poll(self) -> int | None:
        return super().poll() if self._status < 0 else self._collect(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._status < 0:
            return super().wait(timeout)
        code = self._collect(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _collect(self, timeout: float | None) -> int | None:
        """The exit code once there is one, None after the timeout."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 16))
            os.close(self._status)
        return self.returncode


@contextmanager
def forked_processes() -> Iterator[None]:
    """While it lasts, ``subprocess`` starts the modules of :class:`ForkedPopen` as forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPopen)
        yield


def stop_server() -> None:
    """End the server: some tests ask that no process is left."""
    ForkedPopen.server.stop()


def serve(number: int, imported: Sequence[str]) -> None:
    """The server: fork at each order that comes through a socket, until the socket is closed."""
    for name in imported:
        importlib.import_module(name)
    orders = socket.socket(fileno=number)
    # Process, and pipe for its exit code, by a descriptor of the process.
    running: dict[int, tuple[int, int]] = {}
    while True:
        ready = select.select([orders, *running], [], [])[0]
        for ended in (one for one in ready if one is not orders):
            pid, status = running.pop(ended)
            os.write(status, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os.close(status)
            os.close(ended)
        if orders in ready:
            text, files, _, _ = socket.recv_fds(orders, _LONGEST, 32)
            if not text:
                return
            status, *files = files
            if not (pid := os.fork()):
                for other in (
                    number,
                    status,
                    *(one for pair in running.items() for one in (pair[0], pair[1][1])),
                ):
                    os.close(other)
                run(json.loads(text), files)
            for file in files:
                os.close(file)
            running[os.pidfd_open(pid)] = pid, status
            orders.send(str(pid).encode())


def run(order: dict[str, Any], files: Sequence[int]) -> None:
    """The rest of a forked process: ``python -m`` as an order says."""
    code = 1
    try:
        received = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _FREE) for file in files]
        for file in files:
            os.close(file)
        for there, here in zip(order["numbers"], received, strict=True):
            assert there < 3 or not _is_open(there), f"descriptor {there} is taken"
            os.dup2(here, there)
            os.close(here)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv, sys.path[:] = order["arguments"], order["path"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2:])
