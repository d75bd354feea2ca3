# SPDX-License-Identifier: Apache-2.0
"""Plots of task scores as SVG files, with a legend in each.

Text stays text, and the same report gives the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.drawing import (
    GREY,
    WIDTH,
    Plot,
    dot,
    drawing_style,
    finished,
    normal_interval,
    reference_style,
    shortened,
    variant_style,
)
from svsk_eval.report.paired_statistics import Estimate
from svsk_eval.report.tables import headline_text

__all__ = ["Plot", "all_plots", "model_style"]

_ROW: Final = 0.17  # inches per model
_RECOVERY: Final = "mean recovery"
_KL: Final = "KL, nats per token"


def all_plots(analysis: Analysis) -> list[Plot]:
    """The plots of a report in their order, without those for which there is nothing to draw."""
    makers: tuple[Callable[[Analysis], Plot | None], ...] = (
        _scores,
        _differences,
        _flips,
        _quality,
        _answers,
    )
    with drawing_style():
        return [plot for plot in (make(analysis) for make in makers) if plot is not None]


def model_style(analysis: Analysis, label: str) -> tuple[str, str]:
    """Colour (hexadecimal) and matplotlib marker of a model, the same in all plots."""
    index = [run.label for run in analysis.report.models].index(label)
    return variant_style(index - 1) if index else reference_style()


def _scores(analysis: Analysis) -> Plot:
    labels = [run.label for run in analysis.report.models]
    figure, axes = _canvas(len(analysis.tasks), len(labels))
    rows = {
        task: {label: analysis.estimates[label][task].score for label in labels}
        for task in analysis.tasks
    }
    _dots(axes, analysis, rows)
    axes.set_xlabel("score, with 95% confidence interval")
    where = (
        "the differences below" if analysis.variants else "the differences, once there is a variant"
    )
    caption = (
        "Each model's own interval. Models are compared in pairs of items, so overlap here decides"
        f" nothing: see {where}."
    )
    return _plot(analysis, "scores", "Score per task", caption, labels, figure)


def _differences(analysis: Analysis) -> Plot | None:
    if not analysis.variants:
        return None
    rows: dict[str, dict[str, Estimate]] = {task: {} for task in analysis.tasks}
    last = "mean of all tasks"
    for variant in analysis.variants:
        for task in variant.tasks:
            rows[task.task][variant.label] = Estimate(
                task.score.difference, None, task.score.interval
            )
        if len(analysis.tasks) > 1:
            over = Estimate(variant.pooled.difference, None, variant.pooled.interval)
            rows.setdefault(last, {})[variant.label] = over
    labels = [variant.label for variant in analysis.variants]
    figure, axes = _canvas(len(rows), len(labels))
    _dots(axes, analysis, rows)
    axes.axvline(0, color="#222222", linewidth=1, zorder=1)
    axes.set_xlabel("score of the variant minus the reference's, with 95% confidence interval")
    caption = (
        "Right of the line the variant scores higher. An interval that crosses the line is no"
        " evidence of equality."
    )
    return _plot(analysis, "differences", "Paired difference per task", caption, labels, figure)


def _flips(analysis: Analysis) -> Plot | None:
    if not analysis.variants:
        return None
    pairs = [{task.task: task.score for task in variant.tasks} for variant in analysis.variants]
    tasks = [task for task in analysis.tasks if all(scores[task].binary for scores in pairs)]
    if not tasks:
        return None
    labels = [variant.label for variant in analysis.variants]
    figure, axes = _canvas(len(tasks), len(labels))
    most = 0.0
    for offset, label, scores in zip(_offsets(len(labels)), labels, pairs, strict=True):
        colour, _ = model_style(analysis, label)
        for row, score in enumerate(scores[task] for task in tasks):
            lost, gained = score.lost / score.n, score.gained / score.n
            most = max(most, lost, gained)
            height = 0.7 / len(labels)
            axes.barh(row + offset, -lost, height, color=colour, alpha=0.95, linewidth=0)
            axes.barh(row + offset, gained, height, color=colour, alpha=0.5, linewidth=0)
            for value, count, side in ((-lost, score.lost, -1), (gained, score.gained, 1)):
                axes.annotate(
                    str(count),
                    (value, row + offset),
                    xytext=(3 * side, 0),
                    textcoords="offset points",
                    ha="right" if side < 0 else "left",
                    va="center",
                    fontsize=7,
                    color="#333333",
                )
    _task_axis(axes, tasks)
    limit = (most or 0.1) * 1.15
    axes.set_xlim(-limit, limit)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * abs(value):g}%")
    axes.set_xlabel("share of items: lost to the left, gained to the right")
    partly = "; only tasks whose answers are right or wrong"
    caption = (
        "Items that only the reference gets right (left) and only the variant (right), with their"
        f" number{partly * (len(tasks) < len(analysis.tasks))}."
    )
    return _plot(analysis, "flips", "Items lost and gained", caption, labels, figure)


def _quality(analysis: Analysis) -> Plot | None:
    """Mean recovery and KL against bits per weight, where two variants or more have both."""
    panels = {title: points for title, points in _against_size(analysis).items() if len(points) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    for number, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for label, (bpw, point) in points.items():
            dot(axes, point, model_style(analysis, label), place=bpw, upright=True)
        axes.set_title(title)
        axes.set_xlabel("bits per weight")
        axes.margins(0.12)
        axes.grid(True)
        if title == _RECOVERY:
            axes.axhline(1, color=GREY, linewidth=1, linestyle="--", zorder=1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylim(bottom=0)
    labels = [
        run.label
        for run in analysis.report.models
        if any(run.label in points for points in panels.values())
    ]
    caption = (
        "With 95% confidence intervals."
        " Fewer bits are cheaper; a high recovery and a low KL are good."
    )
    return _plot(analysis, "quality", "Quality against size", caption, labels, figure)


def _against_size(analysis: Analysis) -> dict[str, dict[str, tuple[float, Estimate]]]:
    """Per panel and label: bits per weight, and the figure with its interval."""
    panels: dict[str, dict[str, tuple[float, Estimate]]] = {_RECOVERY: {}, _KL: {}}
    for variant, run in zip(analysis.variants, analysis.report.models[1:], strict=True):
        if run.bpw is None:
            continue
        over = variant.pooled
        if over.recovery is not None:
            panels[_RECOVERY][run.label] = (
                run.bpw,
                Estimate(over.recovery, None, over.recovery_interval),
            )
        text = headline_text(run)
        if text is not None and text.kl_mean is not None:
            limits = normal_interval(text.kl_mean, text.kl_mean_se)
            panels[_KL][run.label] = (run.bpw, Estimate(text.kl_mean, text.kl_mean_se, limits))
    return panels


def _answers(analysis: Analysis) -> Plot | None:
    labels = [run.label for run in analysis.report.models]
    tasks = [
        task
        for task in analysis.tasks
        if any(analysis.estimates[label][task].output_tokens for label in labels)
    ]
    if not tasks:
        return None
    figure = Figure(figsize=(WIDTH, _height(len(tasks), len(labels))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in ((left, "terminated"), (right, "output_tokens")):
        figures = {
            task: {label: getattr(analysis.estimates[label][task], name) for label in labels}
            for task in tasks
        }
        rows = {
            task: {label: figure for label, figure in points.items() if figure is not None}
            for task, points in figures.items()
        }
        _dots(axes, analysis, rows)
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_xlabel("answers that ended by themselves")
    right.set_xlabel("tokens per answer")
    right.tick_params(labelleft=False)
    caption = (
        "With 95% confidence intervals. Answers that hit the limit of tokens, or become longer,"
        " cost scores and time."
    )
    return _plot(analysis, "answers", "How answers end, and their length", caption, labels, figure)


def _height(rows: int, models: int) -> float:
    """Inches for that many tasks of that many models."""
    return 0.85 + rows * (models * _ROW + 0.16)


def _canvas(rows: int, models: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, _height(rows, models)), layout="constrained")
    return figure, figure.add_subplot()


def _offsets(count: int) -> list[float]:
    """Where the models of a task are drawn, relative to its row: 0.7 of a row together."""
    return [0.7 * ((index + 0.5) / count - 0.5) for index in range(count)]


def _dots(axes: Axes, analysis: Analysis, rows: Mapping[str, Mapping[str, Estimate]]) -> None:
    """A row for each task, and in it a dot with its interval for each model."""
    present = {label for points in rows.values() for label in points}
    labels = [run.label for run in analysis.report.models if run.label in present]
    for offset, label in zip(_offsets(len(labels)), labels, strict=True):
        for row, points in enumerate(rows.values()):
            if label in points:
                style = model_style(analysis, label)
                dot(axes, points[label], style, place=row + offset, upright=False)
    _task_axis(axes, list(rows))


def _task_axis(axes: Axes, tasks: Sequence[str]) -> None:
    axes.set_yticks(range(len(tasks)), [shortened(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    for edge in range(1, len(tasks)):
        axes.axhline(edge - 0.5, color="#eeeeee", linewidth=0.7, zorder=0)


def _plot(
    analysis: Analysis, name: str, title: str, caption: str, labels: Sequence[str], figure: Figure
) -> Plot:
    """The finished figure, with a legend of these models above it."""
    styles = {label: model_style(analysis, label) for label in labels}
    return finished(name, title, caption, styles, figure)
