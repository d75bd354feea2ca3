# SPDX-License-Identifier: Apache-2.0
"""System calls that the sandbox keeps programs from making, those of the network among them.

Each attack would leave a trace that the test looks for.
"""

import platform
import socket
from pathlib import Path

import pyseccomp
import pytest

from svsk_eval.sandbox import CodeLimits, Verdict, policy
from tests.eval.support import assert_refused, run

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in policy.MACHINES,
    reason="the sandbox needs Linux",
)

RAW = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def number(name: str) -> int:
    found: int = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    return found


def allowed_numbers() -> set[int]:
    """The numbers on this machine of all calls that the filter allows with some arguments."""
    names = (*policy.ALLOWED, "open", "openat", "fcntl", "ioctl", "prlimit64")
    return {known for name in names if (known := number(name)) >= 0}


class TestSystemCalls:
    def test_every_other_call_is_refused(self) -> None:
        """Those of later kernels too: the numbers go far beyond any that is in use."""
        unknown = {number("clone3"), number("openat2")}
        # The kernel lets two calls of x86-64 past every filter, uretprobe and uprobe; they do
        # nothing outside a probe.
        past = {335, 336} if platform.machine() == "x86_64" else set()
        program = f"""{RAW}
wrong = []
for number in sorted(set(range(1200)) - {allowed_numbers() | past}):
    ctypes.set_errno(0)
    result = libc.syscall(number, -1, -1, -1, -1, -1, -1)
    if (result, ctypes.get_errno()) != (-1, 38 if number in {unknown} else 1):
        wrong.append(number)
assert not wrong, wrong
"""
        assert run(program, CodeLimits()) == Verdict(True, "passed", "")

    @pytest.mark.parametrize(
        "name",
        [
            *(
                "socket",
                "socketpair",
                "connect",
                "bind",
                "sendto",
                "sendmsg",
                "io_uring_setup",
                "io_uring_enter",
            ),
            *(
                "clone",
                "clone3",
                "fork",
                "vfork",
                "execve",
                "execveat",
                "unshare",
                "setns",
                "ptrace",
                "pidfd_open",
            ),
            *(
                "pidfd_getfd",
                "pidfd_send_signal",
                "process_vm_readv",
                "process_vm_writev",
                "process_madvise",
                "kill",
            ),
            *(
                "tkill",
                "tgkill",
                "rt_sigqueueinfo",
                "rt_tgsigqueueinfo",
                "timer_create",
                "setsid",
                "setpgid",
            ),
            *(
                "openat2",
                "creat",
                "unlink",
                "unlinkat",
                "rename",
                "renameat",
                "renameat2",
                "link",
                "linkat",
                "symlink",
            ),
            *(
                "symlinkat",
                "mkdir",
                "mkdirat",
                "rmdir",
                "mknod",
                "mknodat",
                "truncate",
                "ftruncate",
                "fallocate",
            ),
            *(
                "chmod",
                "fchmod",
                "fchmodat",
                "chown",
                "fchown",
                "lchown",
                "fchownat",
                "utimensat",
                "utime",
                "utimes",
                "futimesat",
                "setxattr",
            ),
            *(
                "fsetxattr",
                "removexattr",
                "mount",
                "umount2",
                "move_mount",
                "open_tree",
                "fsopen",
                "pivot_root",
            ),
            *(
                "chroot",
                "open_by_handle_at",
                "name_to_handle_at",
                "memfd_create",
                "shmget",
                "mq_open",
                "msgget",
            ),
            *(
                "bpf",
                "perf_event_open",
                "keyctl",
                "add_key",
                "request_key",
                "userfaultfd",
                "seccomp",
                "prctl",
            ),
            *(
                "setrlimit",
                "setuid",
                "setgid",
                "setgroups",
                "setresuid",
                "capset",
                "personality",
                "splice",
                "sendfile",
            ),
            *(
                "copy_file_range",
                "flock",
                "inotify_init1",
                "fanotify_init",
                "init_module",
                "kexec_load",
                "reboot",
            ),
            *(
                "landlock_create_ruleset",
                "sched_setscheduler",
                "sched_setaffinity",
                "setpriority",
                "vhangup",
                "sync",
            ),
        ],
    )
    def test_is_not_on_the_list(self, name: str) -> None:
        found = number(name)
        assert found != -1, "libseccomp does not know it: is it misspelt?"
        assert found not in allowed_numbers()

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has these")
    def test_other_numberings_kill(self) -> None:
        x32 = run(f"{RAW}libc.syscall(0x40000000 + 41, 2, 1, 0)")
        assert (x32.outcome, x32.detail[:24]) == ("killed", "ended with signal SIGSYS")
        code = "b8 14 00 00 00 cd 80 c3"  # mov eax, 20 (getpid of 32-bit x86); int 0x80; ret
        old = run(
            "import ctypes, mmap\npage = mmap.mmap(-1, 4096,"
            f" prot=7)\npage.write(bytes.fromhex('{code}'))\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
        )
        assert old.outcome == "killed"

    @pytest.mark.parametrize(
        "flags",
        [
            "O_WRONLY",
            "O_RDWR",
            "O_WRONLY | os.O_RDWR",
            "O_CREAT",
            "O_TRUNC",
            "O_APPEND",
            "O_TMPFILE",
            "O_PATH",
        ],
    )
    def test_open_for_anything_but_reading(self, flags: str) -> None:
        assert_refused(f"import os\nos.open('/dev/null', os.{flags})")

    @pytest.mark.parametrize(
        "call",
        [
            "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
            "fcntl.fcntl(1, 10, 9)",  # F_SETSIG
            "fcntl.fcntl(1, fcntl.F_SETFL, os.O_APPEND)",
            "fcntl.ioctl(0, termios.TIOCSTI, b'x')",
            "fcntl.ioctl(1, termios.FIOASYNC, b'\\1\\0\\0\\0')",
            "fcntl.flock(0, fcntl.LOCK_EX)",
        ],
    )
    def test_control_of_descriptors(self, call: str) -> None:
        assert_refused(f"import fcntl, os, termios\n{call}")

    def test_upper_halves_of_arguments_hide_nothing(self) -> None:
        program = f"""{RAW}
def call(*arguments):
    ctypes.set_errno(0)
    return libc.syscall(*map(ctypes.c_ulong, arguments)), ctypes.get_errno()
high = 1 << 32
assert call({number("ioctl")}, 0, high | 0x5412, 0) == (-1, 1)
assert call({number("fcntl")}, 0, high | 8, os.getppid()) == (-1, 1)
path = ctypes.create_string_buffer(b'/dev/null')
at = ctypes.c_ulong(-100).value
assert call({number("openat")}, at, ctypes.addressof(path), high | 1) == (-1, 1)
assert call({number("openat")}, at, ctypes.addressof(path), 0)[0] > 0
"""
        assert run(program) == Verdict(True, "passed", "")


class TestNetwork:
    def test_no_connection_is_seen(self, tmp_path: Path) -> None:
        with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
            server.bind(("127.0.0.1", 0))
            local.bind(str(tmp_path / "socket"))
            for listener in (server, local):
                listener.listen()
                listener.setblocking(False)
            port = server.getsockname()[1]
            assert_refused(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
            path = str(tmp_path / "socket")
            assert_refused(f"import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})")
            raw = f"{RAW}assert libc.syscall({number('socket')}, 2, 1, 0) >= 0"
            assert run(raw).detail.startswith("AssertionError")
            for listener in (server, local):
                with pytest.raises(BlockingIOError):
                    listener.accept()

    def test_no_names_are_resolved(self) -> None:
        assert run("import socket\nsocket.getaddrinfo('localhost.example', 80)").detail.startswith(
            "gaierror"
        )
