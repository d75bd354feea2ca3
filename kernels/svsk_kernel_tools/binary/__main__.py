# SPDX-License-Identifier: Apache-2.0
"""``python -m svsk_kernel_tools.binary``.

Compile the registered kernels for GPUs that are not here, and check them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from svsk_kernel_tools.binary.aot import ARCHES, Arch, arch_name, compile_case, parse_arch
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.cases import cases
from svsk_kernel_tools.binary.checks import LIMITS, failures
from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.report import KernelFacts, read_facts

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)
_errors = Console(stderr=True, soft_wrap=True)

COLUMNS = (
    "kernel",
    "target",
    "regs",
    "spills",
    "shared",
    "mma",
    "copies",
    "loads",
    "stores",
    "loop",
    "per weight",
    "s",
)


@app.command()
def main(
    arch: Annotated[
        list[str] | None, typer.Option(help="90, gfx942, ...; repeat for several, all without.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Name of a case; repeat for several, all without.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the facts and failures there.")
    ] = None,
) -> None:
    """Compile the kernels for absent targets, print their facts, exit with 1 if a check fails."""
    try:
        targets = [parse_arch(text) for text in arch] if arch else list(ARCHES)
        rows = [_inspect(case, target) for case, target in _chosen(targets, kernel)]
    except InspectError as error:
        _errors.print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(2) from error
    table = Table(*COLUMNS, box=None, padding=(0, 1))
    for name, target, facts, failed in rows:
        table.add_row(
            *(_cells(facts) if facts else (name, target, *["-"] * 10)),
            style="red" if failed else None,
        )
    Console(width=None if console.is_terminal else 200).print(table)
    for name, target, _, failed in rows:
        for sentence in failed:
            console.print(f"[red]FAIL[/red] {escape(f'{name} {target}: {sentence}')}")
    if json_file:
        content = [
            {
                "name": name,
                "arch": target,
                "facts": asdict(facts) if facts else None,
                "failures": failed,
            }
            for name, target, facts, failed in rows
        ]
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    num_failed = sum(bool(row[-1]) for row in rows)
    console.print(f"{len(rows) - num_failed} passed, {num_failed} failed")
    raise typer.Exit(1 if num_failed else 0)


def _chosen(targets: list[Arch], names: list[str] | None) -> list[tuple[KernelCase, Arch]]:
    """The registered cases for these targets, or those of them with these names.

    Raises InspectError for a name that no target has a case of.
    """
    chosen = [
        (case, target)
        for target in targets
        for case in cases(target)
        if case.arches is None or target in case.arches
    ]
    if names is None:
        return chosen
    by_name = dict.fromkeys(case.name for case, _ in chosen)
    if unknown := sorted(set(names) - by_name.keys()):
        raise InspectError(
            f"no case {', '.join(unknown)} for {', '.join(map(arch_name, targets))}: expected one"
            f" of {', '.join(by_name) or 'none'}"
        )
    return [(case, target) for case, target in chosen if case.name in names]


def _inspect(case: KernelCase, target: Arch) -> tuple[str, str, KernelFacts | None, list[str]]:
    """Name, target, facts and failures.

    A case that does not compile fails, and the others are still looked at.
    """
    try:
        facts = read_facts(compile_case(case, target))
    except InspectError as error:
        return case.name, arch_name(target), None, [str(error)]
    return case.name, arch_name(target), facts, failures(facts, case, LIMITS[target])


def _cells(facts: KernelFacts) -> tuple[str, ...]:
    def widths(counts: Any) -> str:
        return " ".join(f"{count}x{size}B" for size, count in counts.items()) or "-"

    ratio = facts.instructions_per_weight
    return (
        escape(facts.name),
        facts.arch,
        str(facts.registers),
        str(facts.spills or facts.local_bytes or facts.stack_bytes),
        str(facts.shared_bytes),
        " ".join(f"{count}x{unit}" for unit, count in facts.mma.items()) or "-",
        widths(facts.copy_bytes),
        widths(facts.load_bytes),
        widths(facts.store_bytes),
        str(facts.loop_instructions or "-"),
        "-" if ratio is None else f"{ratio:.2f}",
        f"{facts.seconds:.1f}",
    )


if __name__ == "__main__":
    app()
