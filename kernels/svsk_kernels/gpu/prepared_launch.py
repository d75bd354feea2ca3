# SPDX-License-Identifier: Apache-2.0
"""Launching a Triton kernel again and again at little cost to the host.

Triton finds the binary of every launch by the type, class of values and alignment of each argument,
compile-time constants included. For the 33 arguments of a product that takes longer than all else
that a call does.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import triton
from triton.runtime import driver

__all__ = ["INTERPRETED", "Grid", "PreparedLaunch", "Where", "current"]

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU and in float32."""

Grid = tuple[int, int, int]


class Where(NamedTuple):
    """Where launches go, and how."""

    device: Any  # the current one, as Triton's driver names it
    stream: int  # its current stream
    watched: bool  # a profiler has hooks that Triton is to call around launches


def current() -> Where:
    """Where launches go at the moment."""
    if INTERPRETED:
        return _INTERPRETER
    active, hooks = driver.active, triton.knobs.runtime
    device = active.get_current_device()
    watched = _has_calls(hooks.launch_enter_hook) or _has_calls(hooks.launch_exit_hook)
    return Where(device, active.get_current_stream(device), watched)


_INTERPRETER: Final = Where(None, 0, False)


def _has_calls(hook: Any) -> bool:
    """Whether a hook calls anything: None, a function, or in later versions a list of them."""
    return bool(getattr(hook, "calls", hook))


class PreparedLaunch:
    """A kernel with its compile-time constants and compiler options.

    The binary of the first launch on a device is kept, and later ones only pass their arguments.

    Args:
        kernel: of Triton.
        constants: values of its compile-time constants by name, which follow all other arguments.
        options: of the compiler; the interpreter takes none.
    """

    def __init__(
        self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self._kernel = kernel
        self._named = dict(constants) if INTERPRETED else {**constants, **options}
        self._constants = constants
        self._kept: dict[Any, _Binary] = {}

    def __call__(self, where: Where, grid: Grid, arguments: tuple[Any, ...], alike: bool) -> None:
        """Launch once.

        Args:
            where: :func:`current`.
            grid: numbers of programs.
            arguments: all but the constants, in the kernel's order.
            alike: these arguments are what Triton takes for the same as in all launches of which
                this was said: tensors have the same dtypes and begin at multiples of 16 bytes, and
                integers that the kernel is specialised for are the same, or all multiples of 16
                below 2**31. Otherwise Triton finds the binary.
        """
        kept = self._kept.get(where.device) if alike and not where.watched else None
        if kept is not None:
            run, function, metadata, constants = kept
            run(*grid, where.stream, function, metadata, None, None, None, *arguments, *constants)
            return
        compiled = self._kernel[grid](*arguments, **self._named)
        if alike and not INTERPRETED:
            names = compiled.src.fn.arg_names[len(arguments) :]
            constants = tuple(self._constants[name] for name in names)
            self._kept[where.device] = _Binary(
                compiled.run, compiled.function, compiled.packed_metadata, constants
            )


class _Binary(NamedTuple):
    """What :meth:`triton.compiler.CompiledKernel.__getitem__` passes on, and the constants.

    Between ``metadata`` and the arguments ``run`` takes what only hooks around launches read.
    """

    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
