# SPDX-License-Identifier: Apache-2.0
"""``svsk recipes``."""

from typing import Annotated

import typer

from svsk_offline.cli_options import (
    JsonFile,
    Quiet,
    Verbose,
)
from svsk_offline.completion import one_of
from svsk_offline.preflight import check_report_files
from svsk_offline.recipe_files import recipe_names
from svsk_offline.terminal import console, say_note, write_json

__all__ = ["recipes"]


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print this one, to edit and give to --recipe.",
            autocompletion=one_of(recipe_names),
        ),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the recipes shipped with the package, or print one as YAML."""
    from svsk_offline.recipe_files import print_recipes, recipe_names, recipe_text, recipe_values

    check_report_files(json=json_file)
    if name is not None:
        typer.echo(recipe_text(name), nl=False, err=console.stderr)
        write_json(json_file, recipe_values(name))
        return
    shipped = {name: recipe_values(name) for name in recipe_names()}
    print_recipes(console, shipped)
    say_note("`svsk recipes NAME` prints one; --recipe takes a name, or your edited file.")
    write_json(json_file, shipped)
