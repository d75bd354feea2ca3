# SPDX-License-Identifier: Apache-2.0
"""Processes of this interpreter that need not import torch, transformers and lm-eval: copies of one that has.

Importing them takes longer than everything that a tiny model does afterwards. A server imports them once and forks at
each start. The process is one of its own all the same: it has its memory, its files, its environment and its end, and
runs the project's own modules, which the server has not imported, from the start.
"""

import fcntl
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any, ClassVar

import pytest

IMPORTED = (
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "transformers.models.llama.modeling_llama",
)
MODULES = ("svsk_eval.bench.worker", "svsk_offline.cli")
FREE = 200
"""Descriptors from here on are taken by nobody else."""


class ForkedPopen(subprocess.Popen[bytes]):
    """``subprocess.Popen`` that forks a process of the server for the modules in :data:`MODULES`."""

    context: ClassVar[Any] = None
    process: Any = None

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        if list(args[:2]) != [sys.executable, "-m"] or args[2] not in MODULES:
            super().__init__(args, env=env, **options)
            return
        if ForkedPopen.context is None:
            ForkedPopen.context = multiprocessing.get_context("forkserver")
            ForkedPopen.context.set_forkserver_preload(list(IMPORTED))
        self.args, self.returncode, self.stdout, self.stderr = args, None, None, None
        self.stdin, files = self._files(options)
        environment = dict(os.environ if env is None else env)
        self.process = ForkedPopen.context.Process(target=run, args=(list(args[2:]), environment, files))
        try:
            self.process.start()
        finally:
            os.close(files.numbers[0])
        self.pid = self.process.pid

    @staticmethod
    def _files(options: dict[str, Any]) -> tuple[Any, "Files"]:
        """The end of standard input that stays here, and what the process gets, by its number there."""
        stdin, stdout, stderr = (options.pop(name, None) for name in ("stdin", "stdout", "stderr"))
        numbers = {number: number for number in options.pop("pass_fds", ())}
        assert not options, f"ForkedPopen does not know {options}"
        ours = None
        if stdin == subprocess.PIPE:
            numbers[0], write = os.pipe()
            ours = os.fdopen(write, "wb", 0)
        else:
            assert stdin == subprocess.DEVNULL
            numbers[0] = os.open(os.devnull, os.O_RDONLY)
        return ours, Files(numbers | {1: stdout.fileno(), 2: stderr.fileno()})

    def poll(self) -> int | None:
        if self.process is not None:
            self.returncode = self.process.exitcode
            return self.returncode
        return super().poll()

    def wait(self, timeout: float | None = None) -> int:
        if self.process is None:
            return super().wait(timeout)
        self.process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.process is None:
            super().send_signal(sig)
        elif self.poll() is None:
            os.kill(self.pid, sig)

    def __del__(self, *arguments: Any, **options: Any) -> None:
        if self.process is None:
            super().__del__(*arguments, **options)


class Files:
    """Open files on their way to a process: their numbers here by their numbers there."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({there: DupFd(here) for there, here in self.numbers.items()},)


def run(arguments: list[str], environment: dict[str, str], files: dict[int, Any]) -> None:
    """In the new process: ``python -m`` with these arguments, environment and files."""
    received = {}
    for there, file in files.items():
        here = file.detach()
        received[there] = fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, FREE)
        os.close(here)
    for there, here in received.items():
        assert there < 3 or not is_open(there), f"descriptor {there} is taken"
        os.dup2(here, there)
        os.close(here)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def is_open(number: int) -> bool:
    """Whether a descriptor is in use."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@contextmanager
def forked_processes() -> Iterator[None]:
    """While it lasts, ``subprocess`` starts the modules in :data:`MODULES` as forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPopen)
        yield
