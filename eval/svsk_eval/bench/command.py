# SPDX-License-Identifier: Apache-2.0
"""What ``svsk bench`` does: run, show, write, and hold the variants to a minimum."""

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from svsk_eval.bench.options import BenchOptions, Candidate
from svsk_eval.bench.progress import RunProgress, Step
from svsk_eval.bench.runner import bench, package_versions
from svsk_eval.cards import bench_rows, note_in_card
from svsk_eval.errors import EvalError
from svsk_eval.report.analysis import analyze
from svsk_eval.report.console import print_report
from svsk_eval.report.merge import below_minimum, page_writer
from svsk_eval.report.schema import BenchReport, BenchSettings, Engine
from svsk_eval.task_data import DATA_VARIABLE
from svsk_offline.preflight import check_text
from svsk_offline.terminal import write_json

__all__ = ["bench_with_progress", "engine_name", "engine_names", "settings_of", "shown_command"]

_PATH_OPTIONS: Final = (
    "--text",
    "--json",
    "--markdown",
    "--html",
    "--work-dir",
    "--include-path",
    "--reference",
)
_PATH_STARTS: Final = ("/", "./", "../", "~")
_WORDS_OPTION: Final = "--system-instruction"


def engine_name(text: str, option: str = "--engine") -> Engine:
    """Check the name of an engine.

    Raises:
        EvalError: there is no such engine.
    """
    for name in get_args(Engine):
        if text == name:
            return name  # type: ignore[no-any-return]
    raise EvalError(f"{option} {text}: expected {' or '.join(get_args(Engine))}.")


def engine_names(text: str, option: str) -> tuple[Engine, ...]:
    """Engines separated by commas."""
    return tuple(engine_name(name.strip(), option) for name in text.split(","))


def settings_of(
    tasks: str,
    *,
    engine: str,
    limit: int | None,
    seed: int,
    gen_kwargs: str | None,
    apply_chat_template: bool,
    system_instruction: str | None,
    model_args: dict[str, Any],
    repeats: int = 1,
) -> BenchSettings:
    """What all models have in common, from the command line's words.

    Raises:
        EvalError: one is out of range, or a package is missing.
    """
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise EvalError(
            f"--tasks {tasks!r}: expected names separated by commas, such as svsk_smoke."
        )
    if limit is not None and limit < 1:
        raise EvalError(f"--limit {limit}: expected 1 or more items per task.")
    chosen = engine_name(engine)
    versions = package_versions(chosen)
    from lm_eval.utils import simple_parse_args_string

    for pair in (gen_kwargs or "").split(","):  # lm-eval takes a word alone for a key
        if pair.strip() and "=" not in pair:
            raise EvalError(f"--gen-kwargs {gen_kwargs}: expected KEY=VALUE,KEY=VALUE, got {pair}.")
    generation = simple_parse_args_string(gen_kwargs)
    _check_sampling(generation)
    if system_instruction is not None and not apply_chat_template:
        raise EvalError(
            "--system-instruction needs --apply-chat-template: a plain prompt has no place for it."
        )
    return BenchSettings(
        tasks=names,
        engine=chosen,
        limit=limit,
        seed=seed,
        repeats=repeats,
        gen_kwargs=generation,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        system_instruction=system_instruction,
        model_args=model_args,
        data="local" if os.environ.get(DATA_VARIABLE) else "hub",
        versions=versions,
    )


def _check_sampling(generation: dict[str, Any]) -> None:
    """Refuse a temperature that would have no effect.

    The tasks say do_sample: false, and lm-eval keeps to that.

    Raises:
        EvalError: the temperature is above 0 without do_sample=true, or is not a number of 0 or
            more.
    """
    if "temperature" not in generation:
        return
    stated, sampled = generation["temperature"], generation.get("do_sample", "absent")
    try:
        temperature = float(stated)
    except (TypeError, ValueError):
        temperature = math.nan
    if not 0 <= temperature < math.inf:
        raise EvalError(
            f"--gen-kwargs temperature={stated}: expected a number of 0 or more, such as 0.6."
        )
    if temperature > 0 and sampled is not True:
        raise EvalError(
            f"--gen-kwargs temperature={stated} with do_sample {sampled}: expected do_sample=true,"
            " because the tasks turn sampling off and answers would be greedy. Add it:"
            f" --gen-kwargs do_sample=true,temperature={stated}"
        )


def shown_command(arguments: Sequence[str]) -> str:
    """The command line with paths cut to their last part: the rest says nothing to others.

    Args:
        arguments: after the program's name.
    """
    shown = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        words = before == _WORDS_OPTION or argument.startswith(f"{_WORDS_OPTION}=")
        shown.append(argument if words else _shown(argument, before in _PATH_OPTIONS))
    return shlex.join(["svsk", *shown])


def _shown(argument: str, is_path: bool) -> str:
    """An argument, or what follows ``=`` in it, by its last part if it is a path."""
    # Unlike pathlib's these two take any text, however long.
    on_disk = os.path.exists(os.path.expanduser(argument))  # noqa: PTH110, PTH111
    if on_disk or (is_path and argument.startswith(_PATH_STARTS)):
        return Path(argument).name or argument
    head, sign, tail = argument.partition("=")
    return f"{head}={_shown(tail, is_path or head in _PATH_OPTIONS)}" if sign else argument


def bench_with_progress(
    console: Console,
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    options: BenchOptions,
    *,
    json_file: Path | None,
    markdown: Path | None,
    html: Path | None,
    min_recovery: float | None,
    notes: Console | None = None,
) -> bool:
    """Run :func:`svsk_eval.bench.runner.bench` with a progress bar, show and write its report.

    ``notes`` is where progress is shown, ``console`` if None.

    Returns:
        Whether every variant keeps ``min_recovery`` of the reference's score on every task; true
        without a minimum.

    Raises:
        EvalError: see there; the minimum is not a share; a package that a page needs is absent; or
            the models cannot be compared, in which case ``json_file`` is written all the same.
    """
    if min_recovery is not None and not 0 < min_recovery <= 1:
        raise EvalError(
            f"--min-recovery {min_recovery}:"
            " expected a share of the reference's score, such as 0.98."
        )
    write_pages = page_writer(markdown, html)
    if options.text is not None:
        check_text(options.text.text)
    report = _run(notes or console, candidates, settings, options)
    if json_file is not None:  # before anything that can fail: it took hours
        write_json(json_file, report.model_dump(mode="json"))
    analysis = analyze(report)
    print_report(console, analysis)
    for one in candidates[1:]:
        note_in_card(notes or console, one.name, bench_rows(analysis, one.label))
    write_pages(analysis)
    if min_recovery is None:
        return True
    failures = below_minimum(analysis, min_recovery)
    for failure in failures:
        console.print(f"[red]below the minimum:[/] {escape(failure)}")
    return not failures


def _run(
    console: Console,
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    options: BenchOptions,
) -> BenchReport:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    # A log gets lines instead of a bar.
    run = RunProgress([one.label for one in candidates], log=not console.is_terminal)
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task("", total=None, detail="")

        def show(label: str, step: Step) -> None:
            shown = run.take(label, step)
            for line in shown.lines:
                console.print(line, markup=False)
            bar.update(
                row,
                description=escape(shown.title),
                completed=step.done,
                total=step.known or None,
                detail=shown.detail,
            )

        return bench(candidates, settings, options, show)
