# SPDX-License-Identifier: Apache-2.0
"""What the sandbox allows, worked out once for this machine.

System calls, readable files, resource limits.
"""

import ctypes
import math
import os
import platform
import resource
import site
import sys
import sysconfig
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Final

from svsk_eval.errors import EvalError
from svsk_eval.sandbox.limits import CodeLimits

__all__ = [
    "check_machine",
    "landlock_abi",
    "readable_paths",
    "resource_limits",
    "seccomp_program",
    "site_packages",
]

MACHINES: Final = ("x86_64", "aarch64")

ALLOWED: Final = tuple(
    """
    read readv pread64 preadv preadv2 write writev close close_range lseek dup dup2 dup3
    stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir umask
    mmap munmap mremap mprotect madvise brk
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait
    sigaltstack restart_syscall
    pause alarm getitimer setitimer nanosleep clock_nanosleep
    time gettimeofday clock_gettime clock_getres times getrusage getrlimit
    poll ppoll select pselect6 futex set_robust_list get_robust_list rseq set_tid_address
    sched_yield
    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgid
    getpgrp getsid
    sched_getaffinity sched_getparam sched_getscheduler getcpu uname sysinfo getrandom
    exit exit_group
    """.split()  # noqa: SIM905 - a list literal would take a line per call
)
"""Calls allowed with any arguments.

None of them makes, changes or signals anything outside the process.
"""

UNKNOWN_TO_KERNEL: Final = ("clone3", "openat2")
"""Calls refused with ENOSYS: the C library then makes calls that the filter can judge."""

# O_NOFOLLOW is one of the last two on one machine and O_LARGEFILE the other, and the reverse on the
# other machine.
_OPEN_FLAGS: Final = (
    os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOCTTY | os.O_NONBLOCK | 0o100000 | 0o400000
)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETOWN could signal others
_FCNTL: Final = (0, 1, 2, 3, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
_IOCTL: Final = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)

_SYSTEM_PATHS: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
)
_STACK_BYTES: Final = 64 << 20
_WORD: Final = (1 << 64) - 1
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_SYS_LANDLOCK_CREATE_RULESET: Final = 444


def check_machine() -> None:
    """Raise EvalError where the sandbox is not available at all."""
    system, machine = platform.system(), platform.machine()
    bits = 64 if sys.maxsize > 1 << 32 else 32
    if system != "Linux" or machine not in MACHINES or bits != 64:
        raise EvalError(
            f"Programs that a model wrote are run on Linux on {' or '.join(MACHINES)} with a 64-bit"
            f" Python only, where seccomp can confine them; this is a {bits}-bit Python on {system}"
            f" on {machine}. Leave out the tasks that run code, or use such a machine."
        )
    for needed, function in (
        ("pidfd_open (Linux 5.3)", "pidfd_open"),
        ("memfd_create", "memfd_create"),
    ):
        if not hasattr(os, function):
            raise EvalError(
                f"This Python was built without {needed}, which running code needs:"
                " use another build."
            )


def _pyseccomp() -> Any:
    try:
        import pyseccomp
    except ImportError as error:
        raise EvalError(
            "Running code needs the package pyseccomp, which is not installed:"
            " pip install pyseccomp."
        ) from error
    except (RuntimeError, OSError) as error:  # what it raises where the C library is missing
        raise EvalError(
            f"Running code needs the library libseccomp.so.2 ({error}). Install it: on Debian and"
            " Ubuntu the package is libseccomp2, on Fedora libseccomp."
        ) from error
    return pyseccomp


def _number(seccomp: Any, name: str) -> int | None:
    """Return a call's number, None if this machine has no such call."""
    number = int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name))
    if number == -1:
        raise EvalError(
            f"The installed libseccomp does not know the system call {name}:"
            " install version 2.5 or later."
        )
    return number if number >= 0 else None


@cache
def seccomp_program() -> bytes:
    """Return the filter as classic BPF for this machine, 8 bytes an instruction.

    A call that is not allowed fails with EPERM; one through another machine's numbers (x32, 32-bit)
    kills the process. Comparisons are of all 64 bits of an argument, so that no upper half can hide
    a value.

    Raises:
        EvalError: pyseccomp or libseccomp is missing or too old.
    """
    seccomp = _pyseccomp()
    equal, masked = seccomp.EQ, seccomp.MASKED_EQ
    rules = seccomp.SyscallFilter(seccomp.ERRNO(1))  # EPERM

    def add(name: str, *arguments: Any, action: int = seccomp.ALLOW) -> None:
        if (number := _number(seccomp, name)) is not None:
            rules.add_rule(action, number, *arguments)

    for name in ALLOWED:
        add(name)
    for name in UNKNOWN_TO_KERNEL:
        add(name, action=seccomp.ERRNO(38))  # ENOSYS
    add("open", seccomp.Arg(1, masked, _WORD & ~_OPEN_FLAGS, 0))
    add("openat", seccomp.Arg(2, masked, _WORD & ~_OPEN_FLAGS, 0))
    for command in _FCNTL:
        add("fcntl", seccomp.Arg(1, equal, command))
    for request in _IOCTL:
        add("ioctl", seccomp.Arg(1, equal, request))
    # Reading this process's own limits: no other process, no new limit.
    add("prlimit64", seccomp.Arg(0, equal, 0), seccomp.Arg(2, equal, 0))
    with tempfile.TemporaryFile() as stream:
        rules.export_bpf(stream)
        stream.seek(0)
        return stream.read()


@cache
def landlock_abi() -> int:
    """Return the version of the kernel's Landlock interface, 0 (with a warning) if it has none."""
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    abi = int(
        libc.syscall(
            _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION
        )
    )
    if abi < 1:
        warnings.warn(
            "This kernel has no Landlock (Linux 5.13 and later, if enabled): programs that a model"
            " wrote can read every file that you can."
            " They still cannot write, and have no network.",
            RuntimeWarning,
            stacklevel=2,
        )
    return max(abi, 0)


def site_packages() -> list[str]:
    """Return the environment's folders of installed packages.

    Folders that ``.pth`` files add are not among them.
    """
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


def readable_paths() -> list[str]:
    """Return what Python and its packages need to read: absolute paths that exist, each once."""
    library = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    paths = [
        *_SYSTEM_PATHS,
        sys.prefix,
        sys.base_prefix,
        sys.base_exec_prefix,
        *library,
        *site_packages(),
    ]
    return list(dict.fromkeys(path for path in paths if Path(path).exists()))


def resource_limits(limits: CodeLimits) -> list[tuple[int, int]]:
    """Return pairs of a resource and its limit, soft and hard alike.

    The processor's time is a second net under the supervisor's clock: it ends a loop whose
    supervisor is stopped.
    """
    return [
        (resource.RLIMIT_CPU, math.ceil(limits.seconds) + 2),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_STACK, _STACK_BYTES),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
        (resource.RLIMIT_AS, limits.memory_bytes),
    ]
