# SPDX-License-Identifier: Apache-2.0
"""How a command ends: one line and an exit status, whatever stopped it.

A traceback is for the program's own bugs only, and goes into a file.
"""

import errno
import os
import platform
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

import typer

from svsk_kernels.errors import SvskError, one_line
from svsk_vllm.version import __version__

__all__ = ["Stopped", "plain_endings"]

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
_EXITS: Final = (
    typer.Exit,
    typer.Abort,
    *(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)
"""How typer ends a command itself; the last, for wrong arguments, is click's or its copy of it."""
_DEBUG: Final = "SVSK_DEBUG"


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def plain_endings(
    say: Callable[[str], None], continues: Callable[[], str | None] = lambda: None
) -> Iterator[None]:
    """Turn whatever ends the block into one line and an exit status.

    Status 1: the request, the disk, the memory, or a bug of this program, whose traceback is then
    in a file that the line names; with ``SVSK_DEBUG`` in the environment it is shown instead. 130:
    Ctrl-C. 143, 129: SIGTERM, SIGHUP.

    Args:
        say: prints a line for the user.
        continues: what becomes of a run that is started again after it was stopped, a sentence;
            None if it keeps nothing. Asked at the end.

    Raises:
        SystemExit: the block did not end well.
    """
    _open_standard_streams()
    try:
        with _signals_raise():
            yield
            if sys.stdout is not None:
                # a full disk or a closed pipe shows now rather than after the last handler
                sys.stdout.flush()
    except KeyboardInterrupt:
        say(" ".join(filter(None, ("stopped by Ctrl-C.", continues()))))
        raise SystemExit(128 + signal.SIGINT) from None
    except Stopped as stopped:
        say(" ".join(filter(None, (f"stopped by {stopped}.", continues()))))
        raise SystemExit(128 + stopped.number) from None
    except BrokenPipeError as error:
        if not _drop_stdout():
            say(_short(error))
        raise SystemExit(1) from None
    except Exception as error:
        if isinstance(error, _EXITS) or os.environ.get(_DEBUG):
            raise
        say(_line(error, continues()))
        raise SystemExit(1) from None


def _line(error: Exception, continues: str | None) -> str:
    """What to say of an error."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return " ".join(
            filter(None, (f"{where}no room ({error.strerror}). Make room for it.", continues))
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder. Was it removed while the program ran?"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {error.strerror}."
    if _is_memory(error):
        return " ".join(filter(None, (f"not enough memory ({_short(error)}).", continues)))
    if isinstance(error, OSError):  # of a library, with a message of its own
        return _short(error)
    if isinstance(error, SvskError):
        return str(error)
    if type(error).__name__ == "AcceleratorError":  # torch's, of the device and its driver
        return f"the device failed ({_short(error)})."
    return (
        f"{type(error).__name__}: {_short(error)}. This is a bug in svsk {__version__}:"
        f" {_report(error)}"
    )


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, on the device or not."""
    # The latter is torch's.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def _short(error: BaseException) -> str:
    return one_line(error).removesuffix(".")[:500] or type(error).__name__


def _report(error: Exception) -> str:
    """Write the traceback to a file; what to do with it."""
    where = _tracker()
    to = f" at {where}" if where else ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="svsk-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(
                f"svsk {__version__}, Python {platform.python_version()},"
                f" {platform.platform()}\n{sys.argv}\n\n"
            )
            log.writelines(traceback.format_exception(error))
    except OSError:
        return f"please report it{to} with what it prints when {_DEBUG}=1 is set."
    return f"please report it{to} with the file {log.name} ({_DEBUG}=1 shows what is in it)."


def _tracker() -> str | None:
    """Address of the issue tracker in the metadata of the package, if there is one."""
    import importlib.metadata  # only where something is wrong

    with suppress(importlib.metadata.PackageNotFoundError):
        for entry in importlib.metadata.metadata("svsk-vllm").get_all("Project-URL") or ():
            label, _, address = entry.partition(",")
            if label.strip().lower() in ("issues", "bug tracker", "tracker"):
                return str(address.strip())
    return None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that end a program unwind it: locks are released, its processes are ended.

    Signals that are ignored (``nohup``) or have a handler stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        if os.getpid() != owner:  # a fork that has the handler from us
            os.kill(os.getpid(), number)
        raise Stopped(number)

    handled = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is stop:  # nobody has said otherwise meanwhile
                signal.signal(number, signal.SIG_DFL)


def _open_standard_streams() -> None:
    """Put the null device where standard input, output or error is closed.

    Else a data file takes its number, and what a library prints lands in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _drop_stdout() -> bool:
    """Whether nobody reads standard output any more; what is left of it then goes nowhere.

    The pipe itself is asked: what could not be written may be in no buffer any more.
    """
    with suppress(OSError, ValueError):  # standard output may be closed, or no file
        number = sys.stdout.fileno()
        poll = select.poll()
        poll.register(number, 0)
        if any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
            return True
    return False
