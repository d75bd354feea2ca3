# SPDX-License-Identifier: Apache-2.0
"""Where the commands write, and how much: nothing that a terminal would obey gets there.

Names, notes and answers come from checkpoints, which anybody may have made. Control characters in
them are shown as a replacement character, whatever prints them.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from svsk_offline.printable import printable

__all__ = [
    "STDOUT",
    "Steps",
    "Terminal",
    "console",
    "duration",
    "log_libraries",
    "notes",
    "reset",
    "results_to_stdout",
    "say_note",
    "steps",
    "write_json",
]

STDOUT: Final = Path("-")
"""What ``--json`` takes for standard output."""

_EVERY: Final = 15.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


class Terminal(Console):
    """A console whose strings never are anything that a terminal obeys."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(soft_wrap=True, highlight=False, stderr=stderr)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control or text.isprintable():
                yield segment
            else:
                yield Segment(printable(text), segment.style)


console: Final = Terminal()
"""For what a command is asked for: tables, figures, names of what was written."""

notes: Final = Terminal()
"""For what it says on the way. Silent under ``--quiet``."""


def say_note(text: str) -> None:
    """Show a line on the way, as it is."""
    notes.print(text, markup=False)


def reset() -> None:
    """Begin a command: results and notes on standard output, nothing silent."""
    for one in (console, notes):
        one.stderr, one.quiet = False, False


def results_to_stdout() -> None:
    """Leave standard output to the JSON that ``--json -`` writes there."""
    for one in (console, notes):
        one.stderr = True


def log_libraries() -> None:
    """Show what libraries log, on standard error; ``--verbose``."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def write_json(target: Path | None, value: Any) -> None:
    """Write the figures of a command where ``--json`` says, if it was given."""
    if target is None:
        return
    if target == STDOUT:
        print(json.dumps(value, indent=2))  # all of it ASCII: nothing that a terminal obeys
        return
    from svsk_offline.storage.atomic import write_json as write

    write(target, value)


def duration(seconds: float) -> str:
    """A time for people: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Steps:
    """Progress through counted steps.

    Args:
        show: draws it: what is counted, how much is done, of how much if that is known, about how
            many seconds the rest takes, None where nothing tells, and a line that says all of it,
            None where none is due.
        clock: seconds.
        every: seconds between two lines.
    """

    def __init__(
        self,
        show: Callable[[str, int, int | None, float | None, str | None], None],
        clock: Callable[[], float] = time.monotonic,
        every: float = _EVERY,
    ) -> None:
        self._show, self._clock, self._every = show, clock, every
        self._what, self._done = "", 0
        self._started = self._said = clock()
        self._before, self._paced = 0, self._started

    def update(self, what: str, done: int, total: int | None, *, skipped: bool = False) -> None:
        """Say that ``done`` steps of ``total`` are done; fewer than before begin a new pass.

        Args:
            what: is counted.
            done: steps.
            total: of them; None where that is not known.
            skipped: those so far were done before: they do not tell how long the others take.
        """
        now = self._clock()
        anew = what != self._what or done < self._done
        if anew:
            self._what, self._started = what, now
        if anew or skipped:
            self._before, self._paced = done, now
        advanced, self._done = done != self._done, done
        finished = total is not None and done >= total
        left = None
        if total is not None and not finished and done > self._before and now > self._paced:
            left = (now - self._paced) / (done - self._before) * (total - done)
        line = None
        if done and advanced and (finished or now - self._said >= self._every):
            self._said = now
            line = f"{what} {done}/{'?' if total is None else total}"
            line += f", {duration(now - self._started)}"
            if left is not None:
                line += f", about {duration(left)} left"
        self._show(what, done, total, left, line)


@contextmanager
def steps(on: Console, first: str, *, transient: bool = False) -> Iterator[Steps]:
    """A bar on a terminal, elsewhere a line now and then.

    Args:
        on: where it is shown, with whatever else is printed there meanwhile.
        first: what is being done before anything is counted.
        transient: take the bar away at the end.
    """
    if not on.is_terminal:

        def say(
            what: str, done: int, total: int | None, left: float | None, line: str | None
        ) -> None:
            if line is not None:
                on.print(line, markup=False)

        yield Steps(say)
        return
    from rich.progress import (  # takes a while; most commands show no bar
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=on, transient=transient) as bar:
        task = bar.add_task(first, total=None, left="")

        def draw(
            what: str, done: int, total: int | None, left: float | None, line: str | None
        ) -> None:
            words = "" if left is None else f"about {duration(left)} left"
            bar.update(task, description=what, completed=done, total=total, left=words)

        yield Steps(draw)
