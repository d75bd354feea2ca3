# SPDX-License-Identifier: Apache-2.0
"""What all plots have in common: style, colours, dots with intervals, the legend, the SVG file.

Text stays text, and the same figures give the same file.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), which people with colour
blindness can tell apart; every model also has a marker of its own.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from svsk_eval.report.paired_statistics import Estimate, Interval

__all__ = [
    "GREY",
    "WIDTH",
    "Plot",
    "dot",
    "drawing_style",
    "finished",
    "normal_interval",
    "reference_style",
    "saved",
    "shortened",
    "variant_style",
]

WIDTH: Final = 7.4  # inches; a point of the SVG is 4/3 pixels of the page
GREY: Final = "#8a8a8a"

_REFERENCE: Final = ("#444444", "o")
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: Final = ("s", "^", "D", "v", "P", "X", "<", ">")
_LONGEST_NAME: Final = 34
_LINE: Final = 96  # characters across the legend
_LEGEND_ROW: Final = 0.2  # inches
_NORMAL_95: Final = 1.96
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "svsk",
    "font.family": "sans-serif",
    # comes with matplotlib, so that the layout is the same everywhere
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Plot:
    """A picture of a report.

    Attributes:
        name: short, unique in a report: letters and hyphens.
        title: what it shows.
        caption: how to read it.
        svg: the drawing, a file.
    """

    name: str
    title: str
    caption: str
    svg: bytes


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in this style, whatever the user's settings of matplotlib are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # the reader's fonts draw the text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def reference_style() -> tuple[str, str]:
    """Colour (hexadecimal) and matplotlib marker of a reference."""
    return _REFERENCE


def variant_style(index: int) -> tuple[str, str]:
    """Colour (hexadecimal) and matplotlib marker of a variant, counted from 0."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def normal_interval(value: float, error: float | None) -> Interval | None:
    """The 95% confidence interval of a mean with this standard error; None without one."""
    if error is None:
        return None
    return Interval(value - _NORMAL_95 * error, value + _NORMAL_95 * error)


def dot(
    axes: Axes, point: Estimate, style: tuple[str, str], *, place: float, upright: bool
) -> None:
    """A figure and its interval, in a colour and with a marker.

    Upright at a place of the x axis, or level at one of the y axis.
    """
    colour, marker = style
    errors = None
    if point.interval is not None:  # an adjusted interval need not be centred on the figure
        sides = point.value - point.interval.low, point.interval.high - point.value
        errors = [[max(0.0, side)] for side in sides]
    drawn = {"markersize": 5, "linestyle": "none", "elinewidth": 1.4}
    x, y = (place, point.value) if upright else (point.value, place)
    bars: dict[str, Any] = drawn | {"yerr" if upright else "xerr": errors}
    axes.errorbar([x], [y], color=colour, marker=marker, **bars)


def shortened(name: str) -> str:
    """A name that fits beside a plot, without characters that XML does not know."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    # matplotlib leaves names that begin with an underscore out of the legend
    name = f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def finished(
    name: str, title: str, caption: str, styles: Mapping[str, tuple[str, str]], figure: Figure
) -> Plot:
    """The finished figure, with a legend above it: labels with their colours and markers."""
    keys = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linestyle="none")
        for colour, marker in styles.values()
    ]
    names = [shortened(label) for label in styles]
    columns = max(1, min(len(names), _LINE // (max(map(len, names)) + 5)))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * math.ceil(len(names) / columns))
    figure.legend(keys, names, loc="outside upper left", ncols=columns, frameon=False)
    return saved(name, title, caption, figure)


def saved(name: str, title: str, caption: str, figure: Figure) -> Plot:
    """The finished figure, as it is."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return Plot(name, title, caption, stream.getvalue())
