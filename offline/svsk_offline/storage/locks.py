# SPDX-License-Identifier: Apache-2.0
"""One run at a time: a lock that a second run is told about and a killed one does not leave."""

import errno
import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from svsk_kernels.errors import SvskError

__all__ = ["LOCK_NAME", "locked"]

LOCK_NAME: Final = ".lock"
"""Of a lock inside the folder that it guards."""

_HELD: Final = (errno.EAGAIN, errno.EACCES)
_NOT_SUPPORTED: Final = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """Hold ``lock`` so that no other run works on ``what``.

    The kernel drops the lock when the process ends, however it does. The file says who holds it,
    for the message, and is removed at the end: a run that opened it before and locks it after sees
    that it has no name any more, and takes the new one.

    Args:
        lock: the file, in a folder that is there.
        what: what it guards, named in the message.

    Raises:
        SvskError: another run holds it.
        OSError: the file cannot be written.
    """
    descriptor = _acquire(lock, what)
    try:
        yield
    finally:
        if descriptor is not None:
            # The folder may be gone, or not be writable any more; the lock goes all the same.
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _acquire(lock: Path, what: Path) -> int | None:
    """The descriptor that holds the lock; None, with a warning, where there are no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(descriptor, lock):
                _sign(descriptor)
                return descriptor
        except OSError as error:
            holder = _holder(descriptor) if error.errno in _HELD else ""
            os.close(descriptor)
            if error.errno in _HELD:
                raise SvskError(
                    f"{what}: another run is under way there{holder}."
                    " Wait until it ends, or choose another folder."
                ) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            with suppress(OSError):
                lock.unlink()
            warnings.warn(
                f"{what}: its file system has no locks ({error.strerror}). See to it that no other"
                " run writes there.",
                stacklevel=4,
            )
            return None
        except BaseException:
            os.close(descriptor)
            raise
        # The one that held it has removed it: take the file that has the name now.
        os.close(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = {"pid": os.getpid(), "host": platform.node(), "started": started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, for a message; empty when it is being signed."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f": process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return ""
