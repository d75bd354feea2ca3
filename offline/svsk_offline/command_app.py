# SPDX-License-Identifier: Apache-2.0
"""Programs of commands, as typer makes them, whose help shows no type beside a flag.

typer writes ``<bool>`` there, as if a value had to follow.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["App", "Command", "Group"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _PlainFlags:
    """Gives options without a value an empty type, ``--help`` among them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command."""


class Group(_PlainFlags, TyperGroup):
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
