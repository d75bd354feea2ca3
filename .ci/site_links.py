# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: links from docs/ to files elsewhere in the repository.

On GitHub ``[eval/tasks](../eval/tasks)`` opens the folder; the site does not hold it. There the
link becomes its text and the file's path, and a path that is not there a warning, which ends a
strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

__all__ = ["on_page_markdown"]

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[([^][]+)\]\(((?:\.\./)+[\w./-]+)\)")
_LOG = logging.getLogger("mkdocs.hooks.site_links")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Return the page with links that leave docs/ replaced by what they name."""
    source = page.file.abs_src_path
    if source is None:  # a page that a plugin made
        return markdown
    folder, docs = Path(source).parent, ROOT / "docs"

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(docs):
            return link[0]
        if not path.is_relative_to(ROOT) or not path.exists():
            _LOG.warning(
                "%s links to %s, which is not in the repository", page.file.src_uri, target
            )
            return link[0]
        name = path.relative_to(ROOT).as_posix()
        return f"`{name}`" if text.strip("`") in name else f"{text} (`{name}`)"

    return _LINK.sub(replaced, markdown)
