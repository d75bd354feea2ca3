# SPDX-License-Identifier: Apache-2.0
"""Pages that name files name those that are there, and docs/architecture.md names all of them."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SOURCES = ("", "kernels", "offline", "eval", "kernels/svsk_kernels", "svsk_vllm")
SOURCES += ("offline/svsk_offline", "eval/svsk_eval")
WRITTEN_LATER = {"docs/benchmarks/gpu.md"}  # by whoever runs the checks on a GPU


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|yaml|md|json))`", text))
    links = {name for name in re.findall(r"\]\(([\w./-]+)", text) if not name.startswith("http")}
    missing = {name for name in named if not any((ROOT / at / name).exists() for at in SOURCES)}
    missing |= {name for name in links if not (ROOT / page).parent.joinpath(name).exists()}
    assert not re.search(r"@[A-Z]+@|TODO|TBD", text)
    assert missing <= WRITTEN_LATER


@pytest.mark.parametrize(("page", "least"), [("reliability.md", 50), ("serving.md", 20)])
def test_tests_that_a_page_names_are_there(page: str, least: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text)
    assert len(named) > least
    for file, function in named:
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), (file, function)


def test_the_tree_of_the_architecture_page_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    page = set()
    for section in text.split("\n### `")[1:]:
        folder = section.partition("`")[0]
        page |= {
            f"{folder}/{name}" for name in re.findall(r"^- `([\w.]+)`: ", section, re.MULTILINE)
        }
    packages = ["svsk_vllm", "kernels", "offline", "eval/svsk_eval"]
    listed = subprocess.run(
        ["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout of git")
    files = {
        name
        for name in listed.stdout.split()
        if name.endswith((".py", ".cpp", ".h", ".j2")) and not name.endswith("__init__.py")
    }
    assert page == {name for name in files if (ROOT / name).is_file()}


def test_the_page_of_models_has_the_table(tmp_path: Path) -> None:
    from tests.support.models_page import page_rows, written_rows

    assert page_rows(tmp_path) == written_rows(), "python -m tests.support.models_page writes it"
