# SPDX-License-Identifier: Apache-2.0
"""What all HTML pages have in common: one file each, no network, no scripts, names as text."""

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from svsk_eval.report.cells import Column, Strong
from svsk_offline.printable import printable

__all__ = ["render_page"]


def render_page(template: Path, **values: Any) -> str:
    """A page of a template, the same for the same values and versions of the packages.

    Control characters in strings are replaced, and what has a meaning in HTML is escaped.

    Args:
        template: a file that may extend ``base.html.j2`` and import ``parts.html.j2`` of this
            folder.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.get_template(template.name).render(values)


def _harmless(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _cell(text: str, column: Column) -> Markup:
    """A cell's content: numbers get a minus sign in the place of the hyphen, which is too short."""
    text = type(text)(printable(text))
    shown = Markup.escape(text.replace("-", "\N{MINUS SIGN}") if column.numeric else text)
    return Markup("<strong>{}</strong>").format(shown) if isinstance(text, Strong) else shown
