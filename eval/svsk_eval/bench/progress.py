# SPDX-License-Identifier: Apache-2.0
"""How far a run of hours is, how fast it goes, and about how long it will still take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["NOTE", "RunProgress", "Shown", "Step", "duration"]

NOTE: Final = "note: "
"""Begins a step that is something to know, which is shown for good."""

_LOG_SECONDS: Final = 60.0
"""A log gets a line of progress this often."""


@dataclass(frozen=True)
class Step:
    """What a model is at.

    Attributes:
        what: a task's name, ``starting``, ``text, ENGINE``, or ``note: ...``.
        done: requests that have an answer, or chunks of a text that are scored.
        known: of how many; 0 where that is not known.
        kept: of those done, the ones that had an answer when the task began.
        tokens: that were generated in this task so far, also of answers that are not finished.
        items: of the task; 0 where there are none.
        place: of the task among those of the run, from 1; 0 where it is none.
        places: tasks of the run.
    """

    what: str
    done: int = 0
    known: int = 0
    kept: int = 0
    tokens: int = 0
    items: int = 0
    place: int = 0
    places: int = 0


@dataclass(frozen=True)
class Shown:
    """A step in words.

    Attributes:
        title: model and task, with their places.
        detail: items, tokens per second and time left; empty where there is nothing to say.
        lines: what a log, or the screen above the bar, gets now.
    """

    title: str
    detail: str
    lines: tuple[str, ...]


@dataclass
class _Pace:
    """How a model does on a task: since when, and what was there then."""

    label: str
    what: str
    since: float
    logged: float
    over: bool = False


@dataclass
class RunProgress:
    """Follows the steps of a run.

    Attributes:
        labels: of the models, in their order.
        log: whether lines are wanted from time to time, and not at ends alone.
        now: a clock, seconds.
    """

    labels: Sequence[str]
    log: bool
    now: Callable[[], float] = time.monotonic
    _pace: _Pace | None = None
    _names: dict[int, tuple[str, int]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

    def take(self, label: str, step: Step) -> Shown:
        """Take a step in, and say what is to be shown of it."""
        now, lines = self.now(), []
        model = label
        if len(self.labels) > 1 and label in self.labels:
            model += f" ({self.labels.index(label) + 1} of {len(self.labels)})"
        place = f" ({step.place} of {step.places})" if step.places > 1 else ""
        title = f"{model}: {step.what}{place}"
        pace = self._pace
        if pace is None or (pace.label, pace.what) != (label, step.what):
            pace = self._pace = _Pace(label, step.what, now, now)
            if self.log or step.what.startswith(NOTE):
                lines.append(title)
        if step.place:
            self._names[step.place] = (step.what, step.items)
        detail = self._detail(pace, step, now)
        new = step.done - step.kept
        if step.known and step.done == step.known and step.items and new and not pace.over:
            pace.over = True
            lines.append(f"{title}: {_ending(step, now - pace.since)}")
        elif self.log and detail and now - pace.logged >= _LOG_SECONDS:
            pace.logged = now
            lines.append(f"{title}: {detail}")
        return Shown(title, detail, tuple(lines))

    def _detail(self, pace: _Pace, step: Step, now: float) -> str:
        if not step.known:
            return ""
        seconds, new = now - pace.since, step.done - step.kept
        count = f"{_items(step, step.done)} of {step.items} items"
        parts = [count if step.items else f"{step.done} of {step.known}"]
        if step.tokens and seconds > 0:
            parts.append(f"{_speed(step.tokens / seconds)} tokens/s")
        if new > 0 and seconds > 0:
            left = (step.known - step.done) * seconds / new
            if step.items:
                self._seconds[step.what] = seconds / new * step.known / step.items
            whole = self._left_in_all(pace.label, step, left)
            parts.append(
                f"about {duration(left)} left"
                + (f", {duration(whole)} in all" if whole is not None and whole > left else "")
            )
        return " · ".join(parts)

    def _left_in_all(self, label: str, step: Step, left: float) -> float | None:
        """Seconds that the tasks to come will take as well, as long as they did last time.

        None where a task to come has not been seen at work yet.
        """
        if not step.place or label not in self.labels:
            return None
        expected = {}
        for place in range(1, step.places + 1):
            name, items = self._names.get(place, ("", 0))
            if name in self._seconds:
                expected[place] = self._seconds[name] * items
        others = len(self.labels) - 1 - self.labels.index(label)
        needed = range(1 if others else step.place + 1, step.places + 1)
        if any(place not in expected for place in needed):
            return None
        rest = sum(expected[place] for place in needed if place > step.place)
        return left + rest + others * sum(expected[place] for place in needed)


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _items(step: Step, requests: int) -> int:
    """Items that a number of requests amounts to: those of multiple choice have several each."""
    return requests * step.items // step.known


def _ending(step: Step, seconds: float) -> str:
    """A finished task in words."""
    parts = [f"{step.items} items"]
    if step.kept:
        parts[0] += f", {_items(step, step.kept)} of which had an answer already"
    if step.tokens and seconds > 0:
        parts.append(f"{step.tokens} tokens at {_speed(step.tokens / seconds)} tokens/s")
    return " · ".join([*parts, f"answered in {duration(seconds)}"])


def _speed(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"
