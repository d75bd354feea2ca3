# SPDX-License-Identifier: Apache-2.0
"""``python -m svsk_kernel_tools.bench``: the command line."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import svsk_kernels
from svsk_kernel_tools.bench.errors import BenchError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_CONFIGS = Path(svsk_kernels.__file__).parent / "configs"


@app.command()
def main(
    device: Annotated[
        str, typer.Option(help="cuda, cuda:1, ...; cpu: checks only, in Triton's interpreter.")
    ] = "cuda",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer checks, shapes, tokens and replays.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Instead of timing, find the best blocks.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Begin nothing new after this time.")
    ] = None,
    json_file: Annotated[
        Path, typer.Option("--json", help="Results, written as they come.")
    ] = Path("svsk_bench.json"),
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the tables there.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what --json has.")] = False,
    configs: Annotated[
        Path, typer.Option(help="Folder for --tune's table; the package's own by default.")
    ] = _CONFIGS,
    shape: Annotated[
        list[str] | None, typer.Option(help="Name of a shape; repeat for several.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of tokens; repeat for several.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Check only this layer; repeat for several.")
    ] = None,
    skip_checks: Annotated[
        bool, typer.Option("--skip-checks", help="Time without checking first.")
    ] = False,
    no_graphs: Annotated[
        bool, typer.Option("--no-graphs", help="Check without CUDA graphs, for a sanitizer.")
    ] = False,
    checks_only: Annotated[
        bool, typer.Option("--checks-only", help="Check, and time nothing.")
    ] = False,
) -> None:
    """Check the kernels on this GPU, then time them or, with --tune, write its table of blocks.

    Exits with 1 if a check fails, 2 if it cannot run as asked, 3 if --seconds were over before the
    end.
    """
    if device == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are defined
    if skip_checks and checks_only:
        raise typer.BadParameter("--checks-only and --skip-checks together leave nothing to do")
    console = Console(soft_wrap=True)
    try:
        from svsk_kernel_tools.bench.runner import Settings, run

        settings = Settings(
            device,
            quick,
            tune,
            not skip_checks,
            seconds,
            json_file,
            markdown_file,
            resume,
            configs,
            tuple(shape or ()),
            tuple(tokens or ()),
            tuple(case or ()),
            not checks_only,
            not no_graphs,
        )
        state = run(settings, console)
    except BenchError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(2) from error
    raise typer.Exit(state)


if __name__ == "__main__":
    app()
