# SPDX-License-Identifier: Apache-2.0
"""``python -m svsk_kernel_tools.emulator``.

Execute the kernels as compiled for GPUs that are not here, and check them.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from svsk_kernel_tools.emulator.driver import CAPABILITIES
from svsk_kernel_tools.emulator.sweep import Result, sweep

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)
_errors = Console(stderr=True, soft_wrap=True)


@app.command()
def main(
    arch: Annotated[
        list[int] | None, typer.Option(help="80, 86, 89, 90 or 120; 80 and 90 without.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer layers, and no runs without inline PTX.")
    ] = False,
) -> None:
    """Run every kernel on small layers, print the results, exit with 1 if something was wrong."""
    unknown = sorted(set(arch or ()) - set(CAPABILITIES))
    if unknown:
        supported = ", ".join(map(str, CAPABILITIES))
        _errors.print(f"[red]error:[/red] --arch {unknown[0]}: expected one of {supported}")
        raise typer.Exit(2)
    results: list[Result] = []
    for target in arch or (80, 90):
        for result in sweep(target, quick):
            results.append(result)
            _errors.print(
                f"{len(results)}: {escape(result.name)}, sm_{target}, M = {result.tokens},"
                f" {result.kernel}"
            )
    table = Table(
        "case",
        "target",
        "M",
        "kernel",
        "instructions",
        "error",
        "verdict",
        box=None,
        padding=(0, 1),
    )
    for one in results:
        verdict = "[red]FAIL[/red]" if one.problems else "passed"
        row = (
            escape(one.name),
            f"sm_{one.arch}",
            str(one.tokens),
            one.kernel,
            f"{one.instructions:,}",
        )
        table.add_row(*row, f"{one.error:.1e}", verdict)
    Console(width=None if console.is_terminal else 160).print(table)
    for one in results:
        for problem in one.problems:
            place = f"{one.name}, sm_{one.arch}, M = {one.tokens}, {one.kernel}"
            console.print(f"[red]FAIL[/red] {escape(place)}: {escape(problem)}")
    for remark in sorted({remark for one in results for remark in one.remarks}):
        console.print(f"[yellow]remark[/yellow] {escape(remark)}")
    failed = sum(bool(one.problems) for one in results)
    console.print(f"{len(results) - failed} passed, {failed} failed")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    app()
