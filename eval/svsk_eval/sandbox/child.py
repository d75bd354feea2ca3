# SPDX-License-Identifier: Apache-2.0
"""The process that one program runs in.

Its source is run by ``python -c``; nothing of the project is imported.

Standard input holds the order, a marshalled dictionary. The process first gives up its rights for
good, then compiles and runs the program, then reports through a socket. Every message begins with a
secret of this run, so that what the program itself writes into the socket is no message. The secret
is followed by one letter: R ready, P passed, F failed, M out of memory, S the sandbox could not be
set up; F, M and S by a text.

This start-up is paid for every program, so only modules that load in milliseconds are imported.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than all of the above
if TYPE_CHECKING:
    from collections.abc import Callable

    Report = Callable[[bytes, str], None]

_FILE = "<program>"
_MODULE = "program"
_DETAIL_CHARS = 400
_RESERVE_BYTES = 1 << 20

# From linux/prctl.h, linux/capability.h, linux/seccomp.h and linux/landlock.h.
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x20080522
# on every machine
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


class _BpfProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: int = 0) -> None:
    _check(_libc.prctl(option, value, pointer, 0, 0), f"prctl({option})")


def _drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets.

    The kernel empties the ambient one with them.
    """
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _confine_files(abi: int, readable: list[str]) -> None:
    """Let Landlock refuse every access to files but reading beneath ``readable``, and the network.

    Each version of Landlock's interface handles rights that the one before does not know, see
    https://docs.kernel.org/userspace-api/landlock.html.
    """
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    network = 0b11 if abi >= 4 else 0
    scoped = 0b11 if abi >= 6 else 0  # abstract Unix sockets, signals
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = (ctypes.c_uint64 * 3)((1 << rights) - 1, network, scoped)
    ruleset = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    _check(ruleset, "landlock_create_ruleset")
    for path in readable:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE  # noqa: PTH112
        rule = struct.pack("=Qi", access, folder)  # struct landlock_path_beneath_attr is packed
        status = _libc.syscall(
            _SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0
        )
        _check(status, f"landlock_add_rule for {path}")
        os.close(folder)
    _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def confine(
    *,
    parent: int,
    limits: list[tuple[int, int]],
    landlock_abi: int,
    readable: list[str],
    seccomp: bytes,
) -> None:
    """Give up this process's rights; there is no way back.

    Args:
        parent: the supervisor's process, with which this one ends.
        limits: pairs of a resource and its limit, in the resource's own unit.
        landlock_abi: version of the kernel's Landlock interface, 0 for none.
        readable: files and folders that stay readable under Landlock.
        seccomp: classic BPF instructions of 8 bytes each.

    Raises:
        OSError: the kernel refused a step.
    """
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    if landlock_abi:
        _confine_files(landlock_abi, readable)
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))
    program = _BpfProgram(len(seccomp) // 8, seccomp)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _describe(error: BaseException) -> str:
    """Return type, message and line of an exception; its methods may do anything."""
    try:
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == _FILE:
                line = trace.tb_lineno
            trace = trace.tb_next
        text = f"{type(error).__name__}: {error}"[:_DETAIL_CHARS].removesuffix(": ")
        return f"{text} (line {line})" if line else text
    except BaseException:
        return "an exception that cannot be shown"


def run(program: str, report: Report) -> None:
    """Compile and run the program as a module of its own, and report."""
    module = type(sys)(_MODULE)
    sys.modules[_MODULE] = module
    reserve = bytearray(_RESERVE_BYTES)  # so that there is memory left to report that there is none
    try:
        exec(compile(program, _FILE, "exec", dont_inherit=True), module.__dict__)
    except MemoryError as error:
        del reserve
        report(b"M", _describe(error))
    except BaseException as error:
        report(b"F", _describe(error))
    else:
        report(b"P", "")


def main() -> None:
    """Read the order, confine the process, run the program; never returns."""
    end = os._exit  # the program may replace os._exit and os.write
    write = os.write
    with os.fdopen(0, "rb") as stream:
        order = marshal.loads(stream.read())
    os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
    secret: bytes = order["secret"]
    channel: int = order["channel"]

    def report(letter: bytes, text: str) -> None:
        write(channel, secret + letter + text.encode("utf-8", "backslashreplace"))
        end(0)

    try:
        try:
            sys.path[:] = [path for path in sys.path if path] + order["site_packages"]
            sys.argv[:] = [_MODULE]
            # these come from the module site, which is not loaded
            vars(builtins).update(exit=sys.exit, quit=sys.exit)
            confine(**order["confine"])
            write(channel, secret + b"R")
        except BaseException as error:
            report(b"S", _describe(error))
        else:
            run(order.pop("program"), report)
    finally:
        end(1)


if __name__ == "__main__":
    main()
