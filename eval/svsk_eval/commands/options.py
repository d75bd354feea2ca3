# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands take, and a check of models."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["HtmlFile", "MarkdownFile", "check_models"]

MarkdownFile = Annotated[Path | None, typer.Option(help="Write the report of tasks there.")]
HtmlFile = Annotated[
    Path | None, typer.Option(help="Write the report of tasks there, one page with plots.")
]


def check_models(*models: str | None) -> None:
    """Refuse what is no model's folder and cannot be on the hub, before anything is imported."""
    from svsk_offline.storage.hub import check_model

    for model in models:
        if model is not None:
            check_model(model)
