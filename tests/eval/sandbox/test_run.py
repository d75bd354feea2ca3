# SPDX-License-Identifier: Apache-2.0
"""Verdicts on programs.

What passes, what fails and how, whatever the program does to be taken for a good one.
"""

import gzip
import json
import platform
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from svsk_eval.errors import EvalError
from svsk_eval.sandbox import (
    CONSENT_VARIABLE,
    CodeLimits,
    Outcome,
    Verdict,
    consent_given,
    policy,
    run_programs,
)
from tests.eval.support import LIMITS, published_file, run

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in policy.MACHINES,
    reason="the sandbox needs Linux",
)

SHORT = CodeLimits(seconds=0.5)  # for what must run into it


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test.

    No child process, no temporary file, no open descriptor more than before.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("")  # what opens descriptors once does so now
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert psutil.Process().children(recursive=True) == []
    assert list(tmp_path.glob("svsk-code-*")) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestConsent:
    @pytest.mark.parametrize("consent", [False, None, 1, "yes"])
    def test_refused_without(self, consent: Any) -> None:
        with pytest.raises(
            EvalError, match=r"--confirm-run-unsafe-code.*--confirm_run_unsafe_code.*=1"
        ):
            run("", consent=consent)
        with pytest.raises(EvalError, match="nobody has read"):
            run_programs([], consent=consent)

    @pytest.mark.parametrize(
        ("value", "given"), [("1", True), ("0", False), ("true", False), ("", False)]
    )
    def test_variable(self, value: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", value)
        assert consent_given() is given
        monkeypatch.delenv(CONSENT_VARIABLE)
        assert consent_given() is False


def test_no_programs() -> None:
    assert run_programs([], consent=True) == []


PASSING = {
    "nothing": "",
    "asserts": "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
    "numpy": "import numpy\nassert numpy.linalg.inv(2 * numpy.eye(50))[0, 0] == 0.5",
    "caught": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
    "caught exit": "try:\n    exit(3)\nexcept SystemExit:\n    pass",
    "is not the main module": "assert __name__ != '__main__'",
    "classes find their module": (
        "import dataclasses, pickle, typing\n"
        "@dataclasses.dataclass\nclass A:\n    b: 'int'\n"
        "assert pickle.loads(pickle.dumps(A(1))) == A(1)\n"
        "assert typing.get_type_hints(A) == {'b': int}"
    ),
    "annotations are evaluated": "def f(x: int): ...\nassert f.__annotations__ == {'x': int}",
    "output": "import sys\nprint('x' * 10**7)\nprint('y', file=sys.stderr)",
    "surrogates in escapes": "assert len('\\ud800') == 1",
    "Unicode": "é = 'ß∑🙂'\nassert len(é) == 3",
    "a long text": "# " + "x" * 3_000_000,
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and 1 + f(n - 1)\nassert"
        " f(20000) == 20000"
    ),
    "exit handlers do not run": "import atexit, time\natexit.register(time.sleep, 60)",
    "reporting survives replaced functions": (
        "import builtins, os, sys\nos.write = os._exit = sys.exit = builtins.isinstance ="
        " builtins.str = None\nvars(builtins).clear()"
    ),
    "no arguments, no input": (
        "import sys\nassert len(sys.argv) == 1\nassert sys.stdin.read() == ''"
    ),
    "empty folder": "import os\nassert os.listdir('.') == []",
    "clean environment": (
        "import os\nassert set(os.environ) <= {'HOME', 'LC_ALL', 'PATH', 'TZ', 'PYTHONHASHSEED',"
        " 'LD_LIBRARY_PATH', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS',"
        " 'NUMEXPR_NUM_THREADS'}, set(os.environ)"
    ),
    "the project is not importable": (
        "import importlib.util\nassert not [n for n in ('svsk_eval', 'svsk_vllm') if"
        " importlib.util.find_spec(n)]"
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_passes(name: str) -> None:
    assert run(PASSING[name], CodeLimits()) == Verdict(True, "passed", "")


FAILING: dict[str, tuple[str, Outcome, str]] = {
    "assertion": (
        "x = 1\nassert x == 2, 'not two'",
        "failed",
        r"AssertionError: not two \(line 2\)",
    ),
    "bare assertion": ("assert False", "failed", r"AssertionError \(line 1\)"),
    "line of the program, not the library": (
        "import json\n\njson.loads('{')",
        "failed",
        r"JSONDecodeError: .* \(line 3\)",
    ),
    "syntax": ("def f(:", "failed", "SyntaxError: .*"),
    "null": (
        "x = 1\0",
        "failed",
        "(ValueError|SyntaxError): source code (string )?cannot contain null bytes",
    ),
    "lone surrogate": ("x = '\ud800'", "failed", "UnicodeEncodeError: .*"),
    "nesting": ("(" * 100_000, "failed", "SyntaxError: .*"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "failed", "SystemExit: 0 .*"),
    "exit()": ("exit()", "failed", "SystemExit .*"),
    "os._exit(0)": (
        "import os\nos._exit(0)",
        "failed",
        "ended with exit status 0 before its end.*",
    ),
    "BaseException": ("class Odd(BaseException): ...\nraise Odd", "failed", "Odd .*"),
    "recursion": ("def f(): f()\nf()", "failed", "RecursionError: .*"),
    "input": ("input()", "failed", "EOFError: .*"),
    "endless loop": ("while True: pass", "timeout", r"not done after 0.5 s"),
    "endless sleep": ("import time\ntime.sleep(1000)", "timeout", ".*"),
    "deaf to everything": (
        (
            "import signal\nsignal.pthread_sigmask(0, range(1, 64))\nwhile True:\n    try:"
            " signal.pause()\n    except: pass"
        ),
        "timeout",
        ".*",
    ),
    "endless output": ("while True: print('x' * 10**6)", "timeout", ".*"),
    "endless message": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "timeout",
        ".*",
    ),
    "exits while it is described": (
        "import os\nclass E(Exception):\n    def __str__(self):\n        os._exit(0)\nraise E",
        "failed",
        "ended with exit status 0.*",
    ),
    "message that fails": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E",
        "failed",
        "an exception that cannot be shown",
    ),
    "a huge block": ("bytearray(1 << 40)", "memory", "MemoryError .*"),
    "segmentation fault": (
        "import ctypes\nctypes.string_at(0)",
        "killed",
        "ended with signal SIGSEGV.*",
    ),
    "abort": ("import os\nos.abort()", "killed", "ended with signal SIG.*"),
    "alarm": (
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\nsignal.pause()",
        "killed",
        ".*SIGALRM.*",
    ),
    "threads": (
        "import threading\nthreading.Thread(target=print, daemon=True).start()",
        "failed",
        "RuntimeError: .*",
    ),
    "every descriptor closed": (
        "import os\nos.closerange(0, 100)",
        "failed",
        "ended with exit status 1.*",
    ),
    "closed, then endless": ("import os\nos.closerange(0, 100)\nwhile True: pass", "timeout", ".*"),
    "replaced functions": (
        (
            "import builtins, os\nos._exit = os.write = lambda *a: None\nbuiltins.isinstance ="
            " lambda *a: True\n1 / 0"
        ),
        "failed",
        "ZeroDivisionError: .*",
    ),
    "no builtins left": (
        "import builtins\nvars(builtins).clear()\n1 / 0",
        "failed",
        "ended with exit status 1.*",
    ),
    "exit handler that exits": (
        "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit()",
        "failed",
        "SystemExit .*",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_fails(name: str) -> None:
    program, outcome, detail = FAILING[name]
    verdict = run(program, SHORT if outcome == "timeout" else LIMITS)
    assert (verdict.passed, verdict.outcome) == (False, outcome), verdict
    assert re.fullmatch(detail, verdict.detail), verdict


JUNK = """
import os
for descriptor in range(64):
    for junk in ({junk}):
        try: os.write(descriptor, junk)
        except OSError: pass
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "pass", "raise KeyError"])
@pytest.mark.parametrize("junk", ["b'P', b'passed'", "b'0' * 32 + b'P',", "b'x' * 20000,"])
def test_writing_to_every_descriptor_does_not_pass(junk: str, end: str) -> None:
    verdict = run(JUNK.format(junk=junk) + end)
    assert verdict == Verdict(False, "failed", verdict.detail)
    assert "wrote into the scorer's channel" in verdict.detail


def test_a_flood_in_the_channel_does_not_stop_the_scorer() -> None:
    flood = (
        "import os\nwhile True:\n    for descriptor in range(3, 64):\n        try:"
        " os.write(descriptor, b'x' * 4096)\n"
    )
    assert run(flood + "        except OSError: pass", SHORT).outcome == "timeout"


def test_nothing_it_can_read_makes_it_pass() -> None:
    program = """
import os
found = []
own = [f'/proc/self/{name}' for name in ('environ', 'cmdline')]
for path in [*(f'/proc/self/fd/{n}' for n in range(64)), *own, *range(64)]:
    try:
        descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        found.append(os.read(descriptor, 1 << 16) if descriptor > 2 else b'')
    except OSError:
        pass
for descriptor in range(3, 64):
    for data in found:
        for message in (data, data + b'P', data[:32] + b'P'):
            try: os.write(descriptor, message)
            except OSError: pass
os._exit(0)
"""
    assert not run(program).passed


@pytest.mark.parametrize("landlock", [True, False])
def test_what_was_reported_cannot_be_read_back(
    landlock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first message, which holds the secret, may be on its way when the program begins."""
    if not landlock:
        monkeypatch.setattr(policy, "landlock_abi", lambda: 0)
    program = """
import os
seen = []
for number in range(3, 64):
    for source in (number, f'/proc/self/fd/{number}'):
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK
            descriptor = source if isinstance(source, int) else os.open(source, flags)
            seen.append((source, os.read(descriptor, 1)))
        except OSError:
            pass
assert {data for _, data in seen} <= {b''}, seen  # one end of file, of the channel
assert all(isinstance(source, int) for source, _ in seen), seen
"""
    assert run(program) == Verdict(True, "passed", "")


class TestMemory:
    @pytest.mark.parametrize(
        "bomb",
        [
            "x = []\nwhile True: x.append(bytearray(10**6))",
            "x = 'x'\nwhile True: x += x",
            "x = 0\nwhile True: x = [x]",
            "x = {}\nwhile True: x[len(x)] = str(len(x))",
        ],
    )
    def test_bomb(self, bomb: str) -> None:
        verdict = run(bomb, CodeLimits(seconds=60, memory_bytes=1 << 26))
        assert (verdict.outcome, verdict.detail[:11]) == ("memory", "MemoryError")

    def test_limit_is_the_one_asked_for(self) -> None:
        program = "x = bytearray(150 << 20)"
        assert run(program, CodeLimits(memory_bytes=1 << 28)).passed
        assert run(program, CodeLimits(memory_bytes=1 << 27)).outcome == "memory"

    def test_also_of_shared_maps(self) -> None:
        assert run("import mmap\nmmap.mmap(-1, 1 << 31)").detail.startswith("OSError: [Errno 12]")


class TestDetail:
    def test_is_short_and_printable(self) -> None:
        verdict = run("raise ValueError('\\x1b[31m\\r\\n\\u202e' + 'x' * 10**6)")
        assert verdict.outcome == "failed"
        assert verdict.detail.startswith("ValueError: ?[31m ?xxx")
        assert len(verdict.detail) <= 400
        assert verdict.detail.isprintable()

    def test_name_of_the_type_is_cut_too(self) -> None:
        assert len(run("raise type('E' * 10**6, (Exception,), {})").detail) <= 400


def test_hash_seed_is_fixed() -> None:
    details = {run("raise ValueError(hash('a'))").detail for _ in range(3)}
    assert len(details) == 1
    assert "ValueError: " in details.pop()


@pytest.mark.parametrize("workers", [None, 1, 5])
def test_order(workers: int | None) -> None:
    programs = [
        f"import time\ntime.sleep({(7 * index) % 5} * 0.03)\nraise ValueError({index})"
        for index in range(20)
    ]
    programs[3], programs[8] = "", "while True: pass"
    verdicts = run_programs(programs, consent=True, limits=CodeLimits(seconds=3), workers=workers)
    for index, verdict in enumerate(verdicts):
        expected = {3: "", 8: "not done after 3 s"}.get(index, f"ValueError: {index} (line 3)")
        assert verdict.detail == expected


def test_several_callers_at_once() -> None:
    """A batch's processes are told apart from those of another thread's batch."""

    def batch(caller: int) -> list[str]:
        programs = [f"raise ValueError('{caller}-{index}')" for index in range(5)]
        return [verdict.detail for verdict in run_programs(programs, consent=True, workers=2)]

    with ThreadPoolExecutor(4) as pool:
        for caller, details in enumerate(pool.map(batch, range(4))):
            assert details == [f"ValueError: {caller}-{index} (line 1)" for index in range(5)]


def humaneval(cut: bool) -> list[str]:
    with gzip.open(published_file("HumanEval.jsonl.gz"), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    programs = []
    for problem in problems:
        solution = problem["canonical_solution"]
        if cut:
            solution = solution[: len(solution.rstrip()) // 2]
        programs.append(
            f"{problem['prompt']}{solution}\n{problem['test']}\ncheck({problem['entry_point']})"
        )
    return programs


def test_humaneval_solutions_pass() -> None:
    verdicts = run_programs(humaneval(cut=False), consent=True)
    assert len(verdicts) == 164
    assert [(index, verdict) for index, verdict in enumerate(verdicts) if not verdict.passed] == []


def test_humaneval_halves_do_not() -> None:
    verdicts = run_programs(humaneval(cut=True), consent=True, limits=CodeLimits(seconds=3))
    assert [index for index, verdict in enumerate(verdicts) if verdict.passed] == []
    assert {verdict.outcome for verdict in verdicts} <= {"failed", "timeout"}
