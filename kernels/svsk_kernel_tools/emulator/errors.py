# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a kernel that is emulated, or with the emulator."""

from svsk_kernels.errors import SvskError

__all__ = ["BarrierError", "EmulateError", "MemoryFaultError", "RaceError", "UnsupportedError"]


class EmulateError(SvskError, RuntimeError):
    """A launch cannot be emulated or went wrong.

    The message names the kernel and the line of its PTX.
    """


class UnsupportedError(EmulateError):
    """The PTX holds something the emulator does not know; it never guesses."""


class MemoryFaultError(EmulateError):
    """An access outside of what the launch may touch, unaligned, or to what nobody wrote."""


class RaceError(EmulateError):
    """Accesses of different threads, or of asynchronous operations, that nothing orders."""


class BarrierError(EmulateError):
    """Threads that had to arrive together did not."""
