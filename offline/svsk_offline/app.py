# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command without its subcommands."""

from typing import Annotated, Any, ClassVar

import typer
from rich.markup import escape

from svsk_offline.command_app import App, Command, Group
from svsk_offline.endings import plain_endings
from svsk_offline.terminal import Terminal, console, notes, reset
from svsk_offline.world import joined
from svsk_vllm.version import __version__

__all__ = ["Commands", "Together", "app"]


class Commands(Group):
    """All subcommands end in one line instead of a traceback, whatever stops them.

    Attributes:
        continues: by subcommand, what becomes of a run that is started again after it was stopped.
    """

    continues: ClassVar[dict[str, str]] = {
        "quantize": (
            "Start it again with the same arguments to go on after the last finished block."
        ),
    }

    def make_context(self, *args: Any, **options: Any) -> Any:
        with plain_endings(_say_error):  # `--install-completion` writes files
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        reset()
        with plain_endings(_say_error, lambda: self.continues.get(ctx.invoked_subcommand)):
            return super().invoke(ctx)


class Together(Command):
    """A subcommand that several processes may run together; ``ctx.obj`` is their world."""

    def invoke(self, ctx: Any) -> Any:
        with joined() as ctx.obj:
            console.quiet |= not ctx.obj.leads
            notes.quiet |= not ctx.obj.leads
            return super().invoke(ctx)


app = App(
    name="svsk",
    cls=Commands,
    no_args_is_help=True,
)
_errors = Terminal(stderr=True)


def _say_error(text: str) -> None:
    _errors.print(f"[bold red]error:[/] {escape(text)}")


def _version(value: bool) -> None:
    if value:
        console.print(f"svsk {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Quantise language models to SVSK checkpoints.

    Inspect, check, export, evaluate and run them.
    """
