# SPDX-License-Identifier: Apache-2.0
"""Where the sandbox works.

Its test of itself finds holes, other machines are refused, an ordinary user will do.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyseccomp
import pytest

from svsk_eval.errors import EvalError
from svsk_eval.sandbox import policy, selftest, supervise
from tests.eval.support import EVAL, ROOT, run

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in policy.MACHINES,
    reason="the sandbox needs Linux",
)


class TestSelfTest:
    """The test of the sandbox finds each hole that is made in it."""

    @pytest.mark.parametrize(
        ("names", "hole"),
        [
            (["socket"], "open a socket"),
            (["socketpair"], "open a pair of sockets"),
            (["clone", "clone3", "fork", "vfork"], "make a process"),
            (["execve"], "start another program"),
            (["kill"], "signal another process"),
            (["open", "openat"], "make a file"),
            (["rename", "renameat", "renameat2"], "rename a file"),
            (["unlink", "unlinkat"], "delete a file"),
        ],
    )
    def test_finds_a_call_too_many(
        self, names: list[str], hole: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(policy, "ALLOWED", (*policy.ALLOWED, *names))
        monkeypatch.setattr(policy, "UNKNOWN_TO_KERNEL", ())
        monkeypatch.setattr(policy, "seccomp_program", policy.seccomp_program.__wrapped__)
        monkeypatch.setattr(policy, "landlock_abi", lambda: 0)
        with pytest.raises(EvalError, match=f"fails its test on this machine: .* to {hole}"):
            selftest._prove(1)

    def test_finds_readable_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not policy.landlock_abi():
            pytest.skip("this kernel has no Landlock")
        monkeypatch.setattr(policy, "readable_paths", lambda: ["/"])
        with pytest.raises(EvalError, match="to read a file of yours"):
            selftest._prove(1)

    def test_finds_that_good_programs_do_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selftest, "_GOOD", "import numpyy")
        with pytest.raises(
            EvalError, match=r"a harmless program does not run in it \(failed: ModuleNotFoundError"
        ):
            selftest._prove(1)

    def test_is_made_before_any_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        monkeypatch.setattr(selftest, "_proven", False)
        monkeypatch.setattr(selftest, "_prove", ran.append)
        run("")
        run("")
        assert ran == [1]

    def test_a_kernel_that_refuses_the_filter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing runs unprotected."""
        run("")
        monkeypatch.setattr(policy, "landlock_abi", lambda: 0)
        monkeypatch.setattr(policy, "resource_limits", lambda limits: [])
        monkeypatch.setattr(
            policy, "seccomp_program", lambda: bytes(8 * 3)
        )  # it ends without a return
        with pytest.raises(
            EvalError, match=r"could not be set up: OSError: \[Errno 22\] prctl\(22\).* No program"
        ):
            run(f"open({str(tmp_path / 'file')!r}, 'w')")
        assert list(tmp_path.iterdir()) == []

    def test_an_interpreter_that_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        with pytest.raises(EvalError, match="could not be set up: it ended with exit status 1"):
            run("")
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(EvalError, match=r"could not be started: .*nonexistent"):
            run("")

    def test_a_child_that_is_never_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervise, "_START_SECONDS", 0.2)
        monkeypatch.setattr(supervise, "_child_source", lambda: "import time\ntime.sleep(500)")
        with pytest.raises(EvalError, match="it took too long"):
            run("")


class TestMachine:
    @pytest.mark.parametrize(
        ("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")]
    )
    def test_others_are_refused(
        self, system: str, machine: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(selftest, "_proven", False)
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        with pytest.raises(EvalError, match=f"this is a 64-bit Python on {system} on {machine}"):
            run("")

    def test_another_build_of_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selftest, "_proven", False)
        monkeypatch.delattr(os, "memfd_create")
        with pytest.raises(
            EvalError, match="This Python was built without memfd_create, which running code needs"
        ):
            run("")

    def test_no_place_for_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(
            EvalError, match=r"No temporary folder could be made: .*gone.*Set TMPDIR"
        ):
            run("")

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
        with pytest.raises(EvalError, match="pip install pyseccomp"):
            policy.seccomp_program.__wrapped__()

    def test_missing_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "pyseccomp")
        monkeypatch.setattr(
            "ctypes.util.find_library", lambda name: None if name == "seccomp" else "libc.so.6"
        )
        with pytest.raises(
            EvalError, match=r"code needs the library libseccomp\.so\.2 \(.*libseccomp2"
        ):
            policy.seccomp_program.__wrapped__()

    def test_old_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policy, "ALLOWED", ("read", "no_such_call"))
        with pytest.raises(
            EvalError, match=r"does not know the system call no_such_call: install version 2\.5"
        ):
            policy.seccomp_program.__wrapped__()

    def test_no_landlock_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policy, "_SYS_LANDLOCK_CREATE_RULESET", 100_000)
        with pytest.warns(RuntimeWarning, match="has no Landlock.* can read every file"):
            assert policy.landlock_abi.__wrapped__() == 0

    def test_every_name_exists_on_a_machine(self) -> None:
        architectures = (pyseccomp.Arch.X86_64, pyseccomp.Arch.AARCH64)
        for name in policy.ALLOWED:
            assert max(pyseccomp.resolve_syscall(arch, name) for arch in architectures) >= 0, name


ORDINARY = """
import os, sys
from svsk_eval.sandbox import CodeLimits, run_programs
folder = sys.argv[1]
assert os.getuid() == 65534 and os.access(folder + "/file", os.W_OK)
programs = [
    "assert 1 + 1 == 2",
    f"import shutil\\nshutil.rmtree({folder!r})",
    f"open({folder!r} + '/file', 'w')",
    "import os\\nwhile True: os.fork()",
    "import os\\nos.kill(os.getppid(), 9)",
    "import os\\nos.kill(-1, 9)",
    "import socket\\nsocket.socket()",
    "while True: pass",
    "bytearray(1 << 40)",
]
for verdict in run_programs(programs, consent=True, limits=CodeLimits(seconds=1)):
    print(verdict.outcome, verdict.detail.partition(":")[0].partition(" (")[0])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an ordinary user then")
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """In an interpreter that such a user can run; only what the sandbox needs is on its path."""
    spec = importlib.util.find_spec("pyseccomp")
    assert spec is not None
    assert spec.origin is not None
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        shutil.copy(spec.origin, folder)
        package = folder / "svsk_eval"
        shutil.copytree(
            EVAL / "svsk_eval" / "sandbox",
            package / "sandbox",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for source in ("__init__.py", "errors.py"):
            shutil.copy(EVAL / "svsk_eval" / source, package)
        (folder / "svsk_kernels").mkdir()  # the root of the errors, which needs nothing else
        for source in ("__init__.py", "errors.py"):
            shutil.copy(ROOT / "kernels" / "svsk_kernels" / source, folder / "svsk_kernels")
        (folder / "victim").mkdir()
        (folder / "victim" / "file").write_text("kept")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65534, 65534)
        environment = {
            "PYTHONPATH": str(folder),
            "TMPDIR": str(folder),
            "PATH": os.defpath + ":/usr/sbin:/sbin",
        }

        def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                arguments,
                user=65534,
                group=65534,
                extra_groups=(),
                env=environment,
                cwd="/",
                capture_output=True,
                text=True,
                check=False,
            )

        usable = "import sys; sys.exit(sys.version_info < (3, 10))"
        for python in (sys.executable, "/usr/bin/python3"):
            try:
                if as_nobody(python, "-c", usable).returncode == 0:
                    break
            except OSError:
                continue
        else:
            pytest.skip("no Python of 3.10 or later that every user can run")
        done = as_nobody(python, "-c", ORDINARY, str(folder / "victim"))
        assert done.stdout.splitlines() == [
            "passed ",
            *["failed PermissionError"] * 6,
            "timeout not done after 1 s",
            "memory MemoryError",
        ], done.stderr
        assert (folder / "victim" / "file").read_text() == "kept"
