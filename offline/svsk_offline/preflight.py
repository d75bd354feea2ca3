# SPDX-License-Identifier: Apache-2.0
"""Requests that would do nothing, or harm, are refused before any work.

The functions up to :func:`check_recipe` import nothing heavy: a command runs them first.
"""

import difflib
import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from svsk_kernels.errors import SvskError

if TYPE_CHECKING:
    from svsk_offline.recipe import Recipe

__all__ = [
    "check_apart",
    "check_gguf_file",
    "check_measurements",
    "check_output",
    "check_page_file",
    "check_recipe",
    "check_recipe_file",
    "check_report_files",
    "check_text",
    "refuse_file",
]

_LARGEST_CONFIG: Final = 1 << 24
"""Bytes of a config.json that is looked at."""
_GGUF_MAGIC: Final = b"GGUF"
_HTML: Final = b"<!doctype html>"


def check_output(
    out: Path, *, overwrite: bool, dense: bool = False, source: str | Path | None = None
) -> None:
    """Refuse a folder to write that exists, or that may not be replaced.

    Args:
        out: the folder.
        overwrite: replace it if it is one of ours, or empty.
        dense: a model folder of any kind may be replaced too, as ``svsk restore`` writes them.
        source: what it is made from; a folder, if it is one, must not overlap it.

    Raises:
        SvskError: it is a file, it exists, it holds something else, or its place cannot be written.
    """
    if source is not None and Path(source).is_dir():
        check_apart(out, Path(source))
    refuse_file(out, str(out))
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise SvskError(
                f"{out} exists. Choose another folder, or pass --overwrite to replace it."
            )
        if any(out.iterdir()) and not _is_ours(out, dense):
            kind = "a model" if dense else "an SVSK checkpoint"
            raise SvskError(
                f"{out}: holds something that is not {kind}, so --overwrite does not delete it."
                " Choose another folder."
            )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise SvskError(f"{out}: {parent} is a file, so no folder can be made below it.")
    if not os.access(parent, os.W_OK):
        raise SvskError(f"{out}: {parent} cannot be written. Choose a folder in another place.")


def check_apart(out: Path, source: Path) -> None:
    """Refuse a folder to write that is, holds or lies in the one it is made from.

    Raises:
        SvskError: it does.
    """
    target, folder = out.resolve(), source.resolve()
    if target == folder or target in folder.parents or folder in target.parents:
        raise SvskError(
            f"{out}: overlaps the model it is made from, {source}. Choose another folder."
        )


def check_measurements(folder: Path, others: Iterable[Path] = ()) -> None:
    """Refuse a folder to keep measurements in that is a file, or overlaps others.

    Args:
        folder: where they shall be kept; it need not be there.
        others: folders of the run, which must hold nothing else.

    Raises:
        SvskError: it is, or does.
    """
    refuse_file(folder, f"--measurements {folder}")
    target = folder.resolve()
    for other in (other.resolve() for other in others):
        if target == other or target in other.parents or other in target.parents:
            raise SvskError(f"--measurements {folder}: overlaps {other}. Choose another folder.")


def _is_ours(folder: Path, dense: bool) -> bool:
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > _LARGEST_CONFIG:
        return False
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    method = config.get("quantization_config")
    return (isinstance(method, dict) and method.get("quant_method") == "svsk") or (
        dense and "model_type" in config
    )


def refuse_file(path: Path, called: str) -> None:
    """Refuse a file, or a link to nowhere, where a folder is to be.

    Args:
        path: the place.
        called: in errors.

    Raises:
        SvskError: it is one.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise SvskError(
            f"{called}: is a file, expected a folder to write."
            " Choose another name; a file is never replaced."
        )


def check_text(path: Path) -> None:
    """Refuse a text to score that is no file.

    Raises:
        SvskError: it is missing, a folder, or something else that is not read.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise SvskError(f"--text {path}: {what}. Name a plain text file.")


def check_recipe_file(out: Path, *, overwrite: bool) -> None:
    """Refuse a recipe to write whose name is no recipe's, that exists, or whose folder is missing.

    Raises:
        SvskError: it cannot be written.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise SvskError(f"{out}: expected a name ending in .yaml, as a recipe has.")
    _check_file(out, overwrite=overwrite)


def check_gguf_file(what: str, out: Path, *, overwrite: bool) -> None:
    """Refuse a GGUF file to write whose name is none's, that exists, or whose folder is missing.

    Args:
        what: the argument that names it.
        out: the file.
        overwrite: replace it if it is a GGUF file.

    Raises:
        SvskError: it cannot be written.
    """
    if out.suffix != ".gguf":
        raise SvskError(f"{what} {out}: expected a name ending in .gguf.")
    _check_file(out, overwrite=overwrite)
    if out.exists():
        with out.open("rb") as handle:
            if handle.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                raise SvskError(
                    f"{what} {out}: holds something that is not GGUF, so --overwrite does not"
                    " replace it. Choose another name."
                )


def check_page_file(out: Path, *, overwrite: bool) -> None:
    """Refuse a page to write whose name is none's, that exists, or whose folder is missing.

    Raises:
        SvskError: it cannot be written, or is not HTML and would be replaced.
    """
    if out.suffix not in (".html", ".htm"):
        raise SvskError(f"--html {out}: expected a name ending in .html.")
    _check_file(out, overwrite=overwrite)
    if out.exists():
        with out.open("rb") as handle:
            if not handle.read(len(_HTML)).lower() == _HTML:
                raise SvskError(
                    f"--html {out}: holds something that does not begin as a page, so --overwrite"
                    " does not replace it. Choose another name."
                )


def _check_file(out: Path, *, overwrite: bool) -> None:
    if out.exists() and (not out.is_file() or not overwrite):
        raise SvskError(f"{out} exists. Choose another file, or pass --overwrite to replace it.")
    if not out.absolute().parent.is_dir():
        raise SvskError(f"{out}: its folder does not exist.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise SvskError(f"{out}: its folder cannot be written. Choose a file in another place.")


def check_report_files(**files: Path | None) -> None:
    """Refuse files to write, by their option, that are folders or whose folder is missing.

    Raises:
        SvskError: one cannot be written.
    """
    for option, target in files.items():
        if target is None:
            continue
        if not target.absolute().parent.is_dir():
            raise SvskError(f"--{option} {target}: cannot be written, its folder does not exist.")
        if target.is_dir():
            raise SvskError(f"--{option} {target}: cannot be written, it is a folder.")


def check_recipe(
    recipe: "Recipe", linears: Collection[str], message: Callable[[str], None] = lambda text: None
) -> None:
    """Refuse entries of a recipe that match none of a model's linear layers.

    What the shipped recipes say for all models (the entries of ``USUAL_IGNORE``, the names of the
    sink's targets) need not fit this one: of the sink a message tells that it has no effect. Nor
    need ``lm_head``, which they once said too and files made from them still say.

    Args:
        recipe: the recipe, with what the user added.
        linears: names of the linear layers of the model, its head among them.
        message: told what has no effect.

    Raises:
        SvskError: an entry of the user's has no match.
    """
    from svsk_offline.recipe import USUAL_IGNORE, PublishedRecipe, SinkArgs
    from svsk_vllm.format.targets import matches

    for entry in recipe.ignore:
        if entry not in (*USUAL_IGNORE, "lm_head") and not any(
            matches(name, (entry,)) for name in linears
        ):
            raise SvskError(
                f"--ignore {entry}: matches no linear layer of the model{_nearest(entry, linears)}."
            )
    if isinstance(recipe, PublishedRecipe):
        return
    sink = recipe.sink
    if not sink.weight or any(matches(name, sink.targets) for name in linears):
        return
    if sink.targets == SinkArgs.model_fields["targets"].default:
        message(f"No linear matches sink.targets {sink.targets}: the sink weight has no effect.")
        return
    raise SvskError(
        f"sink.targets {list(sink.targets)}: none matches a linear layer of the model, so"
        f" sink.weight {sink.weight} has no effect. Name its layers, or leave the sink out."
    )


def _nearest(entry: str, linears: Collection[str]) -> str:
    """What may have been meant."""
    names = list(linears)
    below = [name for name in names if name.startswith(f"{entry}.")]
    if below:
        pattern = entry.replace(".", r"\.")
        return f", which has {len(below)} below it: name them, or give 're:{pattern}\\..*'"
    ends = [
        name for name in names if name.rpartition(".")[2] == entry or name.endswith(f".{entry}")
    ]
    if ends:
        pattern = entry.replace(".", r"\.")
        return (
            f", but the end of {len(ends)} such as {ends[0]}: name them whole, or give"
            f" 're:.*\\.{pattern}$'"
        )
    close = difflib.get_close_matches(entry, names, 1)
    nearest = close or names[:1]
    return f" (there is {nearest[0]})" if nearest else ""
