# SPDX-License-Identifier: Apache-2.0
"""The site of docs/: it builds strictly, needs nothing from elsewhere, and its guides are true."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make setup` installs it")
    pytest.importorskip("material", reason="its theme is not installed; `make setup` installs it")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there_and_is_read_as_on_github(site: Path) -> None:
    """Tables, lists and code that one of the two would take for plain text are none there."""
    for page in (ROOT / "docs").rglob("*.md"):
        html = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text("utf-8")
        article = html.partition("<article")[2].partition("</article>")[0]
        assert "<h1" in article, page
        fences = page.read_text("utf-8").count("\n```") // 2
        assert article.count('<div class="highlight') >= fences, page
        article = re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL)
        assert not re.search(r"<p>\s*(\||[-*] |\d+\. |```)|\n(\||- |\d\. )\S", article), page
    assert (site / "benchmarks" / "tokens-per-width.svg").is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\s>]*",
            page.read_text("utf-8"),
        )
        assert not fetched, page


@pytest.mark.usefixtures("site")
def test_what_is_broken_ends_the_build(tmp_path: Path) -> None:
    for source in ("docs/format.md", ".ci/site_links.py"):
        (tmp_path / source).parent.mkdir()
        shutil.copy(ROOT / source, tmp_path / source)
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT}/mkdocs.yml\nnav: [index.md, gone.md]\n")
    links = ("nowhere.md", "format.md#nowhere", "/format.md", "../eval/nowhere", "../../beyond")
    text = "# Start\n\n[sound](format.md#5-packing)\n" + "".join(f"[x]({to})\n" for to in links)
    (tmp_path / "docs" / "index.md").write_text(text)
    done = build(tmp_path, tmp_path / "site")
    said = done.stdout + done.stderr
    assert done.returncode == 1
    warnings = [line for line in said.splitlines() if line.startswith("WARNING")]
    for what in ("gone.md", "nowhere.md", "#nowhere", "/format.md", "../eval/nowhere", "beyond"):
        assert any(what in line for line in warnings), (what, said)
    assert "5-packing" not in said


@pytest.fixture(scope="module")
def messages_page() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / ".ci")
        yield importlib.import_module("messages_page")
    sys.modules.pop("messages_page", None)


def test_the_page_of_messages_is_current(messages_page: ModuleType) -> None:
    current = messages_page.PAGE.read_text(encoding="utf-8") == messages_page.page_text()
    assert current, "python .ci/messages_page.py --write"


def test_messages_are_read_from_the_source(messages_page: ModuleType) -> None:
    classes = messages_page.error_classes()
    assert {"SvskError", "SvskFormatError", "EvalError", "DownloadError", "TuningError"} <= classes
    assert "ValueError" not in classes
    source = """
def read(path, count, error):
    what = f"{path.name}: no such file."
    raise SvskError(what)
    raise errors.EvalError(f"{len(path)} rows, expected {count:,} " + "or more. " + ADVICE)
    raise SvskFormatError(
        f"{one_line(error)}: not {'JSON' if count else 'YAML'}, {', '.join(sorted(names))}"
    ) from error
    raise SvskError(str(error))
    raise ValueError("not of ours, but two words")
    raise SvskError(what)
"""
    assert messages_page.messages(ast.parse(source), classes) == [
        "<name>: no such file.",
        "<number> rows, expected <count> or more. <advice>",
        "<error>: not JSON / YAML, <names>",
    ]


@pytest.mark.parametrize("page", ["choosing-bits.md", "comparison.md", "index.md"])
def test_figures_of_a_guide_are_those_of_the_benchmarks(page: str) -> None:
    measured = "\n".join(
        path.read_text("utf-8") for path in (ROOT / "docs/benchmarks").glob("*.md")
    )
    rows = [
        line for line in (ROOT / "docs" / page).read_text("utf-8").splitlines() if line[:1] == "|"
    ]
    figures = {figure for row in rows for figure in re.findall(r"(?<![\d.])\d\.\d{3,}", row)}
    assert len(figures) > 5
    assert {figure for figure in figures if figure not in measured} == set()
