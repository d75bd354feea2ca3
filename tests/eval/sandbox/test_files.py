# SPDX-License-Identifier: Apache-2.0
"""Files are safe from programs in the sandbox.

Behind both of its layers, and behind either of them alone.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.sandbox import CodeLimits, policy, supervise
from tests.eval.support import assert_refused, run

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in policy.MACHINES,
    reason="the sandbox needs Linux",
)


FILE_ATTACKS = [
    "shutil.rmtree(folder, ignore_errors=True)",
    "attempt(os.remove, file)",
    "attempt(os.rmdir, folder + '/empty')",
    "attempt(os.truncate, file, 0)",
    "attempt(open, file, 'w')",
    "attempt(open, file, 'a')",
    "attempt(open, file, 'r+')",
    "attempt(os.open, file, os.O_RDONLY | os.O_TRUNC)",
    "attempt(open, folder + '/new', 'x')",
    "attempt(os.open, folder, os.O_TMPFILE | os.O_RDWR)",
    "attempt(os.rename, file, folder + '/new')",
    "attempt(os.replace, file, folder + '/empty/new')",
    "attempt(os.link, file, folder + '/new')",
    "attempt(os.symlink, file, folder + '/new')",
    "attempt(os.mkdir, folder + '/new')",
    "attempt(os.mkfifo, folder + '/new')",
    "attempt(os.mknod, folder + '/new')",
    "attempt(os.chmod, file, 0)",
    "attempt(os.chmod, folder, 0o777)",
    "attempt(os.chown, file, 1, 1)",
    "attempt(os.utime, file, (0, 0))",
    "attempt(os.setxattr, file, 'user.a', b'b')",
    "attempt(shutil.copy, file, folder + '/new')",
    "attempt(shutil.move, file, folder + '/new')",
    "attempt(os.fchmod, os.open('.', os.O_RDONLY), 0)",
]


def tree(folder: Path) -> dict[str, Any]:
    """Return everything about a folder's files that an attack could change."""
    facts_by_path = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        facts = path.lstat()
        content = path.read_text() if path.is_file() else ""
        mine = (
            facts.st_mode,
            facts.st_uid,
            facts.st_gid,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
            facts.st_nlink,
        )
        facts_by_path[path.name] = (content, mine)
    return facts_by_path


class TestFiles:
    @pytest.mark.parametrize("attack", FILE_ATTACKS)
    @pytest.mark.parametrize("landlock", [True, False])
    def test_nothing_changes(
        self, attack: str, landlock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without Landlock too: the filter of system calls refuses all of it by itself."""
        if not landlock:
            monkeypatch.setattr(policy, "landlock_abi", lambda: 0)
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("kept")
        before = tree(tmp_path)
        program = f"""
import os, shutil
folder = {str(tmp_path)!r}
file = folder + '/file'
def attempt(function, *arguments):
    try: function(*arguments)
    except OSError: pass
    else: raise Exception('it could')
{attack}
"""
        verdict = run(program)
        assert tree(tmp_path) == before
        assert verdict.passed or "PermissionError" in verdict.detail

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert_refused(f"open({str(tmp_path / 'file')!r}, 'w')")
        assert_refused("import os\nopen(os.path.expanduser('~/file'), 'w')")
        assert list(tmp_path.iterdir()) == []

    def test_own_memory_as_a_file(self) -> None:
        assert_refused("open('/proc/self/mem', 'r+b')")

    def test_shared_memory(self) -> None:
        before = set(Path("/dev/shm").glob("psm_*"))
        assert_refused(
            "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True,"
            " size=64)"
        )
        assert set(Path("/dev/shm").glob("psm_*")) <= before

    def test_no_temporary_files(self) -> None:
        assert not run("import tempfile\ntempfile.TemporaryFile()").passed

    def test_others_files_cannot_be_read(self, tmp_path: Path) -> None:
        if not policy.landlock_abi():
            pytest.skip("this kernel has no Landlock")
        (tmp_path / "file").write_text("secret")
        for path in (
            tmp_path / "file",
            Path(__file__),
            Path(f"/proc/{os.getpid()}/environ"),
            Path("/etc/passwd"),
        ):
            assert_refused(f"open({str(path)!r}).read()")
        for path in (tmp_path, Path("/home"), Path("/")):
            assert_refused(f"import os\nos.listdir({str(path)!r})")
        assert run("import os\nopen(os.__file__).read()\nopen('/dev/urandom', 'rb').read(1)").passed


class TestLandlockAlone:
    """The second layer by itself: with a filter that allows every call, files are still safe."""

    @pytest.fixture(autouse=True)
    def allow_all_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not policy.landlock_abi():
            pytest.skip("this kernel has no Landlock")
        monkeypatch.setattr(
            policy, "seccomp_program", lambda: bytes.fromhex("060000000000ff7f")
        )  # return ALLOW

    @pytest.mark.parametrize(
        "attack", [a for a in FILE_ATTACKS if not re.search("chmod|chown|utime|xattr", a)]
    )
    def test_nothing_changes(self, attack: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("kept")
        before = tree(tmp_path)
        program = f"import os, shutil\nfolder = {str(tmp_path)!r}\nfile = folder + '/file'\n"
        program += f"attempt = lambda function, *arguments: function(*arguments)\n{attack}"
        supervise.run_all([program], CodeLimits(), 1)
        assert tree(tmp_path) == before
