# SPDX-License-Identifier: Apache-2.0
"""What ``svsk bench`` does: run, show, write, and hold the variants to a minimum."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from svsk_eval.bench.analysis import analyse
from svsk_eval.bench.compare import GateResult, recovery_gate
from svsk_eval.bench.console import print_report
from svsk_eval.bench.report_markdown import markdown_report
from svsk_eval.bench.runner import BenchOptions, Candidate, bench, package_versions
from svsk_eval.bench.schema import BenchReport, BenchSettings, Engine
from svsk_eval.errors import EvalError
from svsk_eval.task_data import DATA_VARIABLE
from svsk_offline.atomic import write_text

__all__ = ["bench_with_progress", "engine_name", "engine_names", "settings_of", "shown_command"]


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
) -> BenchSettings:
    """What all models have in common, from the command line's words.

    Raises:
        EvalError: one is out of range, or a package is missing.
    """
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise EvalError(f"--tasks {tasks!r}: expected names separated by commas, such as svsk_smoke.")
    if limit is not None and limit < 1:
        raise EvalError(f"--limit {limit}: expected 1 or more items per task.")
    chosen = engine_name(engine)
    versions = package_versions(chosen)
    from lm_eval.utils import simple_parse_args_string

    try:
        generation = simple_parse_args_string(gen_kwargs)
    except (ValueError, IndexError) as error:
        raise EvalError(f"--gen-kwargs {gen_kwargs}: expected KEY=VALUE,KEY=VALUE ({error}).") from error
    if system_instruction is not None and not apply_chat_template:
        raise EvalError("--system-instruction needs --apply-chat-template: a plain prompt has no place for it.")
    return BenchSettings(
        tasks=names,
        engine=chosen,
        limit=limit,
        seed=seed,
        gen_kwargs=generation,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        system_instruction=system_instruction,
        model_args=model_args,
        data="local" if os.environ.get(DATA_VARIABLE) else "hub",
        versions=versions,
    )


def shown_command(arguments: Sequence[str]) -> str:
    """The command line without folders, which say nothing to other people.

    Args:
        arguments: after the program's name.
    """
    shown = []
    for argument in arguments:
        name, sign, value = argument.partition("=")
        head, tail = (name + sign, value) if sign else ("", argument)
        shown.append(head + (Path(tail).name if tail.startswith(("/", ".", "~")) else tail))
    return shlex.join(["svsk", *shown])


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
) -> list[GateResult]:
    """Run :func:`svsk_eval.bench.runner.bench` with a progress bar, show its report and write it where asked.

    Returns:
        What does not keep ``min_recovery`` of the reference's score; nothing without a minimum.

    Raises:
        EvalError: see there; a file could not be written there; or the minimum is not a share.
    """
    for option, path in (("--json", json_file), ("--markdown", markdown), ("--html", html)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise EvalError(f"{option} {path}: cannot be written. Name a file in a folder that exists.")
    if min_recovery is not None and not 0 < min_recovery <= 1:
        raise EvalError(f"--min-recovery {min_recovery}: expected a share of the reference's score, such as 0.98.")
    if html is not None:
        import svsk_eval.bench.html  # noqa: F401  # its packages are missed now rather than after hours
    if options.text is not None and not options.text.text.is_file():
        raise EvalError(f"--text {options.text.text}: no such file.")
    report = _run(console, candidates, settings, options)
    analysis = analyse(report)
    if json_file is not None:
        write_text(json_file, report.model_dump_json(indent=1) + "\n")
    print_report(console, analysis)
    if markdown is not None:
        write_text(markdown, markdown_report(analysis))
    if html is not None:
        from svsk_eval.bench.html import html_report

        write_text(html, html_report(analysis))
    if min_recovery is None:
        return []
    return [result for result in recovery_gate(analysis, min_recovery) if not result.passed]


def _run(
    console: Console, candidates: Sequence[Candidate], settings: BenchSettings, options: BenchOptions
) -> BenchReport:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("", total=None)
        last = ""

        def show(label: str, what: str, done: int, asked: int) -> None:
            nonlocal last
            text = f"{label}: {what}"
            if text != last and not console.is_terminal:
                console.print(text, highlight=False, markup=False)  # a log gets a line per task
            last = text
            bar.update(line, description=text.replace("[", r"\["), completed=done, total=asked or None)

        return bench(candidates, settings, options, show)
