# SPDX-License-Identifier: Apache-2.0
"""Processes of the sandbox: a program starts none, keeps to its limits, and leaves none behind."""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from svsk_eval.errors import EvalError
from svsk_eval.sandbox import CodeLimits, Verdict, policy, supervise
from tests.eval.support import EVAL, assert_refused, run

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in policy.MACHINES,
    reason="the sandbox needs Linux",
)

SHORT = CodeLimits(seconds=0.5)  # for what must run into it


class TestProcesses:
    @pytest.mark.parametrize(
        "program",
        [
            "import os\nwhile True: os.fork()",
            "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()",
            "import os\nos.setsid()",
            "import subprocess\nsubprocess.run(['true'])",
            "import os\nos.posix_spawn('/bin/true', ['true'], {})",
            "import os\nos.execv('/bin/true', ['true'])",
            "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
            "import os\nos.kill(os.getppid(), 9)",
            "import os\nos.kill(-1, 9)",
            "import os\nos.kill(0, 9)",
            "import signal, os\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
            "import os\nos.setpriority(os.PRIO_PROCESS, 0, 5)",
            "import os\nos.sched_setaffinity(0, [0])",
            "import os\nos.setuid(1)",
        ],
    )
    def test_refused(self, program: str) -> None:
        assert_refused(program)

    def test_shell(self, tmp_path: Path) -> None:
        run(f"import os\nassert os.system('touch {tmp_path}/made') == 0")
        assert list(tmp_path.iterdir()) == []

    def test_fork_bomb_that_minds_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups, spawn = set(), supervise._spawn

        def recording(*arguments: Any) -> subprocess.Popen[bytes]:
            process = spawn(*arguments)
            groups.add(process.pid)
            return process

        monkeypatch.setattr(supervise, "_spawn", recording)
        assert (
            run(
                "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", SHORT
            ).outcome
            == "timeout"
        )
        assert groups
        assert not [pid for pid in psutil.pids() if group_of(pid) in groups]

    def test_thread_bomb(self) -> None:
        bomb = "import threading, time\nthreading.stack_size(32768)\nfor _ in range(3):\n    "
        bomb += (
            "try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError:"
            " pass\n"
        )
        assert run(
            bomb + "assert threading.active_count() == 1\nassert len(threading.enumerate()) == 1"
        ).passed
        assert run("import _thread\n_thread.start_new_thread(print, ())").detail.startswith(
            "RuntimeError: can't start"
        )

    def test_limits_cannot_be_raised(self) -> None:
        for name in ("CPU", "AS", "NOFILE", "NPROC", "FSIZE", "CORE"):
            lower = (
                f"import resource as r\nr.setrlimit(r.RLIMIT_{name}, (0,"
                f" r.getrlimit(r.RLIMIT_{name})[1]))"
            )
            assert run(lower).detail.startswith(
                "ValueError: not allowed"
            )  # what Python makes of EPERM
        assert_refused("import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CORE)")

    def test_limits_are_those_asked_for(self) -> None:
        limits = CodeLimits(seconds=2.5, memory_bytes=1 << 28, open_files=20)
        program = """
import resource as r
kinds = (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_NOFILE, r.RLIMIT_FSIZE, r.RLIMIT_CORE)
found = [r.getrlimit(n) for n in kinds]
assert found == [(n, n) for n in (5, 1 << 28, 20, 0, 0)], found
"""
        assert run(program, limits) == Verdict(True, "passed", "")
        assert run("x = [open('/dev/null') for _ in range(20)]", limits).detail.startswith(
            "OSError: [Errno 24]"
        )

    def test_no_rights_are_left(self) -> None:
        status = child_status("import time\ntime.sleep(5)")
        assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")

    def test_ends_with_its_supervisor(self, tmp_path: Path) -> None:
        call = (
            "run_programs(['import time; time.sleep(500)'], consent=True, limits=CodeLimits(600))"
        )
        code = f"from svsk_eval.sandbox import *\n{call}"
        environment = {**os.environ, "PYTHONPATH": str(EVAL), "TMPDIR": str(tmp_path)}
        supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment)
        sleeper = wait_for(lambda: confined_child(supervisor.pid))
        supervisor.kill()
        supervisor.wait()
        wait_for(lambda: not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE)

    def test_a_child_whose_supervisor_is_gone_runs_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("")
        monkeypatch.setattr(os, "getpid", os.getppid)  # what the child is told
        with pytest.raises(EvalError, match="could not be set up: it ended with exit status 1"):
            run("")

    def test_waits_without_spinning_for_one_that_closed_its_channel(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits, wait = [], supervise._Batch.wait

        def counting(batch: supervise._Batch) -> None:
            waits.append(1)
            wait(batch)

        monkeypatch.setattr(supervise._Batch, "wait", counting)
        assert (
            run("import os, time\nos.closerange(0, 64)\ntime.sleep(60)", SHORT).outcome == "timeout"
        )
        assert len(waits) < 20

    def test_interrupt_leaves_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(supervise._Batch, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            supervise.run_all(["import time\ntime.sleep(500)"] * 3, CodeLimits(), 3)


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def status_of(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def confined_child(parent: int) -> psutil.Process | None:
    """Return a child of the process that sleeps behind its filter, None if there is none (yet)."""
    for child in psutil.Process(parent).children():
        status = status_of(child.pid)
        if status.get("Seccomp") == "2" and status["State"].startswith("S"):
            return child
    return None


def child_status(program: str) -> dict[str, str]:
    """Return what /proc says of a process that runs the program, which sleeps."""
    setting = supervise._setting(tempfile.gettempdir(), CodeLimits())
    child = supervise._start(program, setting)
    try:
        wait_for(lambda: confined_child(os.getpid()))
        return status_of(child._process.pid)
    finally:
        child.close()


def test_a_caller_that_lets_the_kernel_reap_is_refused() -> None:
    run("")
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(EvalError, match=r"this process ignores SIGCHLD, .*signal\.SIG_DFL"):
            run("")
    finally:
        signal.signal(signal.SIGCHLD, previous)
