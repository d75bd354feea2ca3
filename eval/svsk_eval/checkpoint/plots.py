# SPDX-License-Identifier: Apache-2.0
"""Plots of a checkpoint's report as SVG files: where bits and errors are, and KL by token."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from svsk_eval.checkpoint.contents import CheckpointContents, Place
from svsk_eval.checkpoint.tables import TextFigures, kind_summaries
from svsk_eval.report.drawing import (
    GREY,
    WIDTH,
    Plot,
    dot,
    drawing_style,
    finished,
    normal_interval,
    reference_style,
    saved,
    shortened,
    variant_style,
)
from svsk_eval.report.paired_statistics import Estimate
from svsk_eval.text.by_token import KINDS, TokenGroup

__all__ = ["bit_plots", "error_plots", "text_plots"]

_ROW: Final = 0.24  # inches
_MOST_ROWS: Final = 40
_MOST_COLUMNS: Final = 200
_LOWEST: Final = 2.0
"""Percentile of errors, below which all have the lightest colour."""
_COLOURS: Final = "Blues"
"""From light to dark; turned round on a dark page, where it goes from dark to light."""

FloatArray = npt.NDArray[np.float64]


def bit_plots(contents: CheckpointContents) -> list[Plot]:
    """The plots about bits; none where no block has a quantised matrix."""
    with drawing_style():
        plot = _bits(contents)
    return [] if plot is None else [plot]


def error_plots(contents: CheckpointContents) -> list[Plot]:
    """The plots about errors, without those for which nothing is kept."""
    with drawing_style():
        made = [_errors(contents), _sidecars(contents)]
    return [plot for plot in made if plot is not None]


def text_plots(figures: TextFigures) -> list[Plot]:
    """The plots about a text that was scored."""
    with drawing_style():
        return [_kinds(figures.kinds), _positions(figures.positions)]


def _bits(contents: CheckpointContents) -> Plot | None:
    caption = (
        "Every stored bit of a matrix, sidecar and scales among them, over its weights. Hatched:"
        " the block has no such matrix, or it is kept as it was."
    )
    return _heat_map(
        "bits",
        "Bits per weight, by block and matrix",
        caption,
        contents,
        lambda place: place.bits_per_weight,
        logarithmic=False,
    )


def _errors(contents: CheckpointContents) -> Plot | None:
    caption = (
        "Error of the outputs with the sidecar, E|dW x|^2 / E|W x|^2, as the run measured it."
        " Equal steps of colour are equal factors; the smallest 2% have one colour."
    )
    return _heat_map(
        "errors",
        "Error of the outputs, by block and matrix",
        caption,
        contents,
        lambda place: place.error,
        logarithmic=True,
    )


def _heat_map(
    name: str,
    title: str,
    caption: str,
    contents: CheckpointContents,
    value: Callable[[Place], float | None],
    *,
    logarithmic: bool,
) -> Plot | None:
    """Blocks from left to right, kinds of matrices from top to bottom; None without a value."""
    kinds = list(contents.kinds)[:_MOST_ROWS]
    blocks = sorted({place.block for place in contents.places})[:_MOST_COLUMNS]
    values = np.full((len(kinds), len(blocks)), math.nan)
    rows = {kind: row for row, kind in enumerate(kinds)}
    columns = {block: column for column, block in enumerate(blocks)}
    for place in contents.places:
        found = value(place)
        drawn = found is not None and (found > 0 or not logarithmic)
        if drawn and place.kind in rows and place.block in columns:
            values[rows[place.kind], columns[place.block]] = found
    if np.isnan(values).all():
        return None
    figure = Figure(figsize=(WIDTH, 0.75 + _ROW * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if logarithmic:  # a block whose error is tiny would leave one colour for all others
        low = float(np.nanpercentile(values, _LOWEST))
    # one pixel a matrix: of a large model as many rectangles would be most of the page
    mesh = axes.imshow(
        values,
        cmap=_COLOURS,
        norm=_norm(low, high, logarithmic),
        interpolation="none",
        aspect="auto",
        extent=(0, len(blocks), len(kinds), 0),
    )
    _heat_axes(axes, kinds, blocks)
    form, spaced = (".1e", np.geomspace) if logarithmic else (".2f", np.linspace)
    below = "min" if np.nanmin(values) < low else "neither"
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18, extend=below)
    ticks = list(spaced(low, high, 4 if high > low else 1))
    bar.set_ticks(ticks, labels=[format(tick, form) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return saved(name, title, caption, figure)


def _heat_axes(axes: Axes, kinds: Sequence[str], blocks: Sequence[int]) -> None:
    """Names of rows and columns; no frame."""
    missing = Rectangle((0, 0), len(blocks), len(kinds), fill=False, hatch="//////", linewidth=0)
    missing.set(edgecolor="#bbbbbb", zorder=-1)  # seen where there is no value
    axes.add_patch(missing)
    axes.hlines(range(1, len(kinds)), 0, len(blocks), color=GREY, linewidth=0.3)
    axes.vlines(range(1, len(blocks)), 0, len(kinds), color=GREY, linewidth=0.3)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [shortened(kind) for kind in kinds])
    axes.tick_params(length=0)
    shown = [int(at) for at in MaxNLocator(15, integer=True).tick_values(0, len(blocks) - 1)]
    shown = [at for at in dict.fromkeys(shown) if 0 <= at < len(blocks)]
    axes.set_xticks([at + 0.5 for at in shown], [str(blocks[at]) for at in shown])
    axes.set_xlabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _norm(low: float, high: float, logarithmic: bool) -> Normalize:
    """Colours from the lowest to the highest value; in the middle where all are equal."""
    if logarithmic:
        return LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)
    return Normalize(low, high) if high > low else Normalize(low - 1, high + 1)


def _sidecars(contents: CheckpointContents) -> Plot | None:
    """Errors by kind of matrix, without and with the sidecar, joined by a line."""
    errors = {
        kind: (base, whole)
        for kind, (base, whole) in list(kind_summaries(contents).items())[:_MOST_ROWS]
        if base is not None and whole is not None
    }
    if not errors or not any(one.rank for one in contents.in_blocks):
        return None
    figure = Figure(figsize=(WIDTH, 0.6 + _ROW * len(errors)), layout="constrained")
    axes = figure.add_subplot()
    styles = {"base alone": reference_style(), "with the sidecar": variant_style(0)}
    for row, pair in enumerate(errors.values()):
        axes.plot(pair, (row, row), color=GREY, linewidth=1.2, zorder=1)
        for value, style in zip(pair, styles.values(), strict=True):
            dot(axes, Estimate(value, None, None), style, place=row, upright=False)
    _rows(axes, list(errors))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    axes.set_xlabel("error of the outputs, geometric mean over the blocks")
    caption = "How much of the base's error the sidecar takes away."
    return finished("sidecars", "Base and sidecar", caption, styles, figure)


def _kinds(groups: Sequence[TokenGroup]) -> Plot:
    figure = Figure(figsize=(WIDTH, 0.7 + _ROW * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, group in enumerate(groups):
        dot(left, _estimate(group), variant_style(0), place=row, upright=False)
        if group.share is not None:
            right.barh(row, group.share, 0.6, color=variant_style(0)[0], linewidth=0)
    _rows(left, [KINDS[group.name] for group in groups])
    right.grid(True, axis="x")
    right.tick_params(axis="y", length=0, labelleft=False)
    left.set_xlim(left=0)
    left.set_xlabel("KL, nats per token")
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_xlabel("share of all KL")
    caption = "By the kind of the token that is predicted; with 95% confidence intervals."
    return saved("kinds", "KL by kind of token", caption, figure)


def _positions(groups: Sequence[TokenGroup]) -> Plot:
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    means = [group.kl for group in groups]
    axes.plot(range(len(groups)), means, color=variant_style(0)[0], linewidth=1, alpha=0.6)
    for place, group in enumerate(groups):
        dot(axes, _estimate(group), variant_style(0), place=place, upright=True)
    axes.set_xticks(range(len(groups)), [group.name for group in groups])
    axes.set_ylim(bottom=0)
    axes.grid(True, axis="y")
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("KL, nats per token")
    caption = "Mean KL of the tokens that so many were read before; with 95% confidence intervals."
    return saved("positions", "KL by position", caption, figure)


def _estimate(group: TokenGroup) -> Estimate:
    return Estimate(group.kl, group.kl_se, normal_interval(group.kl, group.kl_se))


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
