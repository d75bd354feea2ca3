# SPDX-License-Identifier: Apache-2.0
"""A run: checks, then timings or tuning, every step written to the report as soon as it is done."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.markup import escape

from svsk_kernel_tools.bench.cases import Case, cases_for
from svsk_kernel_tools.bench.correctness import Finding, check_case
from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.grid import group_key, load_weights, time_group
from svsk_kernel_tools.bench.layers import BenchLayer, layer_of_shape
from svsk_kernel_tools.bench.machine import describe, open_device
from svsk_kernel_tools.bench.report import Report, markdown
from svsk_kernel_tools.bench.shapes import (
    GROUP_SIZE,
    SHAPES,
    TOKENS,
    VARIANTS,
    Shape,
    by_name,
    bytes_needed,
    find_shapes,
)
from svsk_kernel_tools.bench.split import vllm_missing
from svsk_kernel_tools.bench.timing import FAILURES, Budget, GpuTimer, Timer, copies_needed
from svsk_kernel_tools.bench.tune import BUCKETS, bucket_key, select, time_bucket, write_table
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.matmul_op import gpu_of
from svsk_kernels.gpu.tuning import Entry
from svsk_offline.storage.atomic import write_text

__all__ = ["FAILED", "FINISHED", "UNFINISHED", "Bench", "Settings", "run"]

FINISHED: Final = 0
FAILED: Final = 1
UNFINISHED: Final = 3

_ROUNDS: Final = 15
_QUICK_ROUNDS: Final = 5
_QUICK_TOKENS: Final = (1, 16, 128, 2048)
_OUT_OF_TIME: Final = "[yellow]Time is up.[/yellow] Run the same command with --resume to go on."


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: str = "cuda"
    quick: bool = False
    tune: bool = False
    checks: bool = True
    seconds: float | None = None
    json_file: Path | None = None
    markdown_file: Path | None = None
    resume: bool = False
    configs: Path = Path("configs")
    shapes: Sequence[str] = ()
    tokens: Sequence[int] = ()
    cases: Sequence[str] = ()
    timings: bool = True
    graphs: bool = True

    @property
    def rounds(self) -> int:
        """Replays whose median counts."""
        return _QUICK_ROUNDS if self.quick else _ROUNDS

    def chosen_shapes(self) -> list[Shape]:
        """Shapes asked for."""
        return (
            list(SHAPES[:2]) if self.quick and not self.shapes else find_shapes(list(self.shapes))
        )

    def chosen_tokens(self) -> tuple[int, ...]:
        """Numbers of tokens asked for."""
        return tuple(self.tokens) or (_QUICK_TOKENS if self.quick else TOKENS)


def run(settings: Settings, console: Console) -> int:
    """Do what is asked for.

    Returns:
        FINISHED, FAILED (a check), or UNFINISHED (out of time).

    Raises:
        BenchError: it cannot be done as asked.
    """
    budget = Budget(settings.seconds)
    shapes = settings.chosen_shapes()
    device = open_device(settings.device)
    report = Report(settings.json_file, describe(device), settings.resume)
    console.print(escape(", ".join(f"{name} {value}" for name, value in report.machine.items())))
    bench = Bench(settings, device, report, budget, console)
    state = FINISHED
    if settings.checks:
        cases = cases_for(device.type != "cuda", settings.quick)
        named = {case.name: case for case in cases}
        state = bench.check(by_name("--case", named, settings.cases, "; "))
    else:
        report.note("this run left the checks out")
    if not settings.timings:
        report.note("this run left the timings out")
    elif state == FINISHED and device.type == "cuda":
        timer = GpuTimer(device)
        report.machine |= {"copy_gbs": round(timer.copy_gbs)}
        console.print(
            f"device copy {timer.copy_gbs:.0f} GB/s, second-level cache {timer.l2_bytes >> 20} MiB"
        )
        state = (bench.tune_shapes if settings.tune else bench.time_shapes)(shapes, timer)
    bench.finish(state)
    return state


@dataclass(frozen=True)
class Bench:
    """A run under way."""

    settings: Settings
    device: torch.device
    report: Report
    budget: Budget
    console: Console

    def check(self, cases: Sequence[Case]) -> int:
        """Run the checks that the report does not have yet, all of them even if some fail."""
        state = FINISHED
        for case in cases:
            group = f"check/{case.name}"
            if self.report.has(group):
                continue
            if self.budget.spent:
                return UNFINISHED
            begun = time.monotonic()
            findings = _findings(case, self.device, self.settings.graphs)
            self.report.add(
                {
                    "kind": "check",
                    "group": group,
                    "what": found.what,
                    "error": found.error if math.isfinite(found.error) else None,
                    "problems": [*found.problems],
                }
                for found in findings
            )
            failed = [found for found in findings if not found.passed]
            worst = max(found.error for found in findings)
            verdict = "[red]failed[/red]" if failed else "ok"
            seconds = time.monotonic() - begun
            self.console.print(
                f"check {escape(case.name)}: {verdict}, {len(findings)} runs,"
                f" worst error {worst:.1e}, {seconds:.1f} s"
            )
            for found in failed:
                self.console.print(
                    f"  [red]{escape(found.what)}[/red]: {escape('; '.join(found.problems))}"
                )
            if failed:
                state = FAILED
        return state

    def time_shapes(self, shapes: Sequence[Shape], timer: Timer) -> int:
        """Time the groups (shape and number of tokens) that the report does not have yet."""
        missing = vllm_missing()
        if missing is not None:
            self.report.note(
                "split (vLLM's Marlin with the sidecar apart) is left out, vLLM cannot be used:"
                f" {missing}"
            )
        for shape in shapes:
            weights = None
            for m in self.settings.chosen_tokens():
                if self.report.has(group_key(shape, m)):
                    continue
                if self.budget.spent:
                    return UNFINISHED
                weights = weights or load_weights(shape, self.device, timer, missing is None)
                for note in weights.notes:
                    self.report.note(note)
                records = time_group(weights, m, timer, self.settings.rounds)
                if not any("us" in record for record in records):
                    raise BenchError(
                        f"{shape.name}, M = {m}: nothing could be timed: {records[0].get('error')}"
                    )
                self.report.add(records)
                self._say(f"time {shape.name}, M = {m}: {_summary(records)}")
        return FINISHED

    def tune_shapes(self, shapes: Sequence[Shape], timer: Timer) -> int:
        """Time the choices of the buckets that the report does not have yet.

        Write the table after every whole shape.
        """
        gpu, variant = gpu_of(self.device), VARIANTS[0]
        for shape in shapes:
            layers: list[BenchLayer] = []
            for bucket in BUCKETS:
                if self.report.has(bucket_key(shape, bucket)):
                    continue
                if self.budget.spent:
                    return UNFINISHED
                if not layers:
                    first = layer_of_shape(shape, variant, torch.bfloat16, self.device)
                    copies = copies_needed(bytes_needed(shape, variant, 0), timer.l2_bytes)
                    layers = first.copies(copies)
                records = time_bucket(shape, layers, gpu, bucket, timer, self.settings.rounds // 2)
                self.report.add(records)
                done = sum("us" in record for record in records)
                limit = "more" if bucket is None else f"up to {bucket}"
                self._say(f"tune {shape.name}, {limit}: {done} of {len(records)} choices timed")
            path = write_table(self.settings.configs, gpu.name, [_entry(self.report, shape)])
            self._say(f"tune {shape.name}: written to {path}")
        return FINISHED

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def finish(self, state: int) -> None:
        """Write the report to its end, and say what it is worth."""
        self.report.add([])
        text = markdown(self.report)
        if self.settings.markdown_file is not None:
            self.settings.markdown_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.settings.markdown_file, text)
        if self.device.type == "cuda":
            self._say(text)
        elif state == FINISHED:
            made = "All checks passed in Triton's interpreter. " if self.settings.checks else ""
            self.console.print(f"{made}Timing and tuning need a GPU: --device cuda.")
        if state == UNFINISHED:
            self.console.print(_OUT_OF_TIME)


def _findings(case: Case, device: torch.device, graphs: bool) -> list[Finding]:
    """All findings of a case; what was raised is one of them."""
    findings = []
    try:
        for found in check_case(case, device, graphs):
            findings.append(found)
    except FAILURES as failure:
        after = f"after {findings[-1].what}" if findings else case.name
        findings.append(Finding(after, math.nan, (f"{type(failure).__name__}: {failure}"[:1000],)))
    return findings


def _summary(records: Sequence[dict[str, Any]]) -> str:
    """What is dispatched, in a line."""
    shown = [
        record
        for record in records
        if record["dispatched"] or record["kernel"] in ("cublas", "split")
    ]
    return ", ".join(
        f"{record['variant']} {record['kernel']} "
        + (f"{record['us']:.2f} µs" if "us" in record else "failed")
        for record in shown
    )


def _entry(report: Report, shape: Shape) -> Entry:
    """The table's entry for one shape; marks the chosen among the report's records."""
    records = [
        record
        for record in report.of_kind("tune")
        if record["shape"] == shape.name and "us" in record
    ]
    results: dict[int | None, dict[Choice, float]] = {}
    for record in records:
        results.setdefault(record["max_m"], {})[Choice(**record["choice"])] = record["us"]
    choices = select(results)
    for record in records:
        chosen = next(
            c for c in choices if c.max_m is None or (record["max_m"] or 1 << 62) <= c.max_m
        )
        record["chosen"] = replace(chosen, max_m=None) == Choice(**record["choice"])
    report.add([])
    return Entry(n=shape.n, k=shape.k, group_size=GROUP_SIZE, choices=choices)
