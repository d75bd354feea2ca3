# SPDX-License-Identifier: Apache-2.0
"""Writes docs/troubleshooting.md: the messages of the errors that the packages raise.

    python .ci/messages_page.py [--write]

They are read from the source: every call of ``SvskError`` or of a class derived from it, with the
words of its first argument, and a name in angle brackets for each value that is put in. Folders
stand with the question that docs/architecture.md says they answer. Left out are the developers'
tools (``svsk_kernel_tools``) and calls whose words are all put in. Without ``--write`` the command
says whether the page is up to date. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["PAGE", "error_classes", "messages", "page_text", "trees"]

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "troubleshooting.md"
PACKAGES: Final = (
    "offline/svsk_offline",
    "svsk_vllm",
    "kernels/svsk_kernels",
    "eval/svsk_eval",
)
_ROOT_CLASS: Final = "SvskError"
_LEAST_WORDS: Final = 2
"""Of a message's own: what has fewer is made of other messages."""

_HEAD: Final = """\
# Messages

What `svsk`, the vLLM plugin and the transformers loader say when they refuse something: {count}
messages, by the folder of the code that raises them and the question that folder answers. Search
this page for words of yours; `<name>` stands for a value that your message has in its place. Each
says what was found and what to do. Kinds of trouble, and the tests that provoke them, are in
[reliability.md](reliability.md), exit codes in [command.md](command.md#exit-codes).

Not here: wrong values of options and recipes, which pydantic and the command line word themselves,
and what vLLM, transformers and PyTorch say. A bug of the program itself ends in one line that names
a file with the traceback.

Written by `python .ci/messages_page.py --write`.
"""


@cache
def trees() -> dict[Path, ast.Module]:
    """Every file of the packages, parsed."""
    return {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted(
            (ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path.name)
        )
    }


def error_classes() -> set[str]:
    """Names of ``SvskError`` and of the classes derived from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {_ROOT_CLASS}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def messages(tree: ast.AST, classes: set[str]) -> list[str]:
    """Messages of a file's errors, each once, in the order of the file."""
    found: dict[str, None] = {}

    def visit(node: ast.AST, texts: dict[str, ast.expr]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            texts = _assigned_once(node)
        if isinstance(node, ast.Call) and _name(node.func) in classes and node.args:
            text = " ".join(_words(node.args[0], texts).split())
            if len(re.findall(r"[A-Za-z]+", re.sub(r"<[^>]*>", "", text))) >= _LEAST_WORDS:
                found[text] = None
        for child in ast.iter_child_nodes(node):
            visit(child, texts)

    visit(tree, {})
    return list(found)


def _assigned_once(function: ast.AST) -> dict[str, ast.expr]:
    """Texts by the name that a function gives them, where it does so once."""
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    return {name: found[0] for name, found in values.items() if len(found) == 1}


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _words(value: ast.expr, texts: dict[str, ast.expr]) -> str:
    """The words of a text, with what is put in named in angle brackets."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_words(part, texts) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _words(left, texts) + _words(right, texts)
        case ast.FormattedValue(value=inner):
            return _words(inner, texts)
        case ast.IfExp(body=body, orelse=other):
            either = [_words(part, texts) for part in (body, other)]
            return " / ".join(either) if all(either) else f"<{''.join(either).strip(' <>')}>"
        case ast.Name(id=name) if _is_text(texts.get(name)):
            return _words(texts[name], {key: text for key, text in texts.items() if key != name})
    return f"<{_label(value)}>"


def _is_text(value: ast.expr | None) -> bool:
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def _label(value: ast.expr) -> str:
    """What a value is called in the source, in words."""
    match value:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Name(id="len")):
            return "number"
        case ast.Call(args=[first, *_], func=function) if _name(function) != "get":
            return _label(first)
        case ast.Call(func=ast.Attribute(value=inner)) | ast.Subscript(value=inner):
            return _label(inner)
        case ast.Call(func=function):
            return _label(function)
        case ast.GeneratorExp(generators=[loop, *_]) | ast.ListComp(generators=[loop, *_]):
            return _label(loop.iter)
        case ast.BoolOp(values=[first, *_]) | ast.BinOp(left=first) | ast.Starred(value=first):
            return _label(first)
        case ast.IfExp(body=body):
            return _label(body)
    return "..."


def _questions() -> dict[str, str]:
    """What each folder answers, by its path, as the page of the architecture says."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^### `([^`]+)`\n\n(.+)$", text, re.MULTILINE))


def page_text() -> str:
    """The whole page."""
    classes, questions = error_classes(), _questions()
    folders: dict[str, list[str]] = {}
    count = 0
    for path, tree in trees().items():
        if found := messages(tree, classes):
            count += len(found)
            lines = folders.setdefault(path.parent.relative_to(ROOT).as_posix(), [])
            lines += ["", f"**`{path.name}`**", "", *map(_item, found)]
    page = _HEAD.format(count=count)
    for folder, lines in folders.items():
        page += "\n".join(["", f"## `{folder}`", "", questions[folder], *lines, ""])
    return page


def _item(message: str) -> str:
    marks = "`" * (1 + max(map(len, re.findall("`+", message)), default=0))
    blank = " " if len(marks) > 1 else ""
    return f"- {marks}{blank}{message}{blank}{marks}"


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the page")
    page = page_text()
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE.name} is not up to date: python .ci/messages_page.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
