# SPDX-License-Identifier: Apache-2.0
"""Programs of commands, as typer makes them, with help and completion set right.

typer writes ``<bool>`` beside a flag, as if a value had to follow.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["App", "Command", "Group"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Common:
    """Flags with an empty type, and values that are not looked at where there is none.

    typer hands every value but True and False to pydantic, also None, for an option that was not
    given, and also while a shell completes: both would wait for its import.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            if "process_value" not in vars(param):
                param.process_value = partial(_process, param, param.process_value)
        return params

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """As typer does; the process ends with the answer.

        typer wraps what is said of each option at the width of the terminal, and fish takes the
        second line for a value.
        """
        os.environ["COLUMNS"] = "10000"
        offered: list[Any] = super().shell_complete(ctx, incomplete)  # type: ignore[misc]
        return offered


def _process(param: Any, process: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    """What typer's ``process_value`` returns, without asking pydantic about nothing."""
    if ctx.resilient_parsing:  # a shell completes, which uses no value
        return value
    if value is not None or param.required:
        return process(ctx, value)
    if param.multiple or param.nargs == -1:
        value = ()
    return param.callback(ctx, param, value) if param.callback else value


class Command(_Common, TyperCommand):
    """A command."""


class Group(_Common, TyperGroup):
    """A command with subcommands."""


class App(typer.Typer):
    """A program; its commands are of the classes above unless told otherwise.

    Square brackets in help are text, which rich's own markup would swallow. A bug shows Python's
    traceback, not typer's with everything that was in memory.
    """

    def __init__(self, *, cls: type[TyperGroup] = Group, **options: Any) -> None:
        super().__init__(
            cls=cls, pretty_exceptions_enable=False, rich_markup_mode="markdown", **options
        )

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **options: Any
    ) -> Callable[[_Function], _Function]:
        return super().command(name, cls=cls, **options)
