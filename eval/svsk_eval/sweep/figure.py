# SPDX-License-Identifier: Apache-2.0
"""Quality against bits: KL of a sweep's models, and how much of the tasks' scores they keep."""

from collections.abc import Callable, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from svsk_eval.report.drawing import (
    GREY,
    WIDTH,
    Plot,
    dot,
    drawing_style,
    finished,
    normal_interval,
    variant_style,
)
from svsk_eval.report.paired_statistics import Estimate, Interval
from svsk_eval.sweep.schema import Size, SweepReport, SweepRow

__all__ = ["sweep_figure"]

_OWN: Final = variant_style(0)
_LINEARS: Final = "bits per weight, linears"
_ALL: Final = "bits per weight, whole file"
_CAPTION: Final = (
    "With 95% confidence intervals. Fewer bits are cheaper; a low KL and a high recovery are good."
)


def sweep_figure(reports: Sequence[SweepReport]) -> Plot | None:
    """The figure of one or several sweeps; None where nothing was scored.

    SVSK checkpoints with a bit budget are joined by a line.

    Args:
        reports: sweeps of one text.
    """
    rows = [row for report in reports for row in report.rows if row.text is not None]
    if not rows:
        return None
    styles = _styles(rows)
    panels: list[tuple[str, Callable[[Size], float], bool]] = [
        (_LINEARS, lambda size: size.bits_per_weight, False),
        (_ALL, lambda size: size.bits_per_weight_of_all, False),
    ]
    if any(row.recovery is not None for row in rows):
        panels.append((_LINEARS, lambda size: size.bits_per_weight, True))
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        for place, (heading, bits, recovery) in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            _draw(axes, rows, styles, bits, _recovery if recovery else _kl)
            axes.set_xlabel(heading)
            if recovery:
                axes.set_title("mean recovery")
                axes.axhline(1, color=GREY, linewidth=1, linestyle="--", zorder=1)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            else:
                axes.set_title("KL, nats per token")
                _kl_scale(axes, rows)
            axes.margins(0.12)
            axes.grid(True)
        return finished("sweep", "Quality against size", _CAPTION, _legend(rows, styles), figure)


def _kl_scale(axes: Axes, rows: Sequence[SweepRow]) -> None:
    """Equal steps for equal factors; from zero where a model is its reference."""
    if any(row.text is not None and row.text.kl_mean <= 0 for row in rows):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw(
    axes: Axes,
    rows: Sequence[SweepRow],
    styles: dict[str, tuple[str, str]],
    bits: Callable[[Size], float],
    figure_of: Callable[[SweepRow], Estimate | None],
) -> None:
    line = []
    for row in rows:
        point = figure_of(row)
        if row.size is None or point is None:
            continue
        dot(axes, point, styles[_key(row)], place=bits(row.size), upright=True)
        if _key(row) == "SVSK":
            line.append((bits(row.size), point.value))
    if len(line) > 1:
        xs, ys = zip(*sorted(line), strict=True)
        axes.plot(xs, ys, color=_OWN[0], linewidth=1, zorder=1)


def _kl(row: SweepRow) -> Estimate | None:
    if row.text is None:
        return None
    value, error = row.text.kl_mean, row.text.kl_mean_se
    return Estimate(value, error, normal_interval(value, error))


def _recovery(row: SweepRow) -> Estimate | None:
    if row.recovery is None:
        return None
    found = row.recovery
    limits = None
    if found.low is not None and found.high is not None:
        limits = Interval(found.low, found.high)
    return Estimate(found.mean, None, limits)


def _key(row: SweepRow) -> str:
    """What a row is called in the legend: budgets of SVSK have one entry."""
    return "SVSK" if row.label.startswith("svsk-") else row.title


def _styles(rows: Sequence[SweepRow]) -> dict[str, tuple[str, str]]:
    keys = dict.fromkeys(["SVSK", *map(_key, rows)])
    return {key: variant_style(number) for number, key in enumerate(keys)}


def _legend(
    rows: Sequence[SweepRow], styles: dict[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    shown = {_key(row) for row in rows}
    return {key: style for key, style in styles.items() if key in shown}
