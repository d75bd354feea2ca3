# SPDX-License-Identifier: Apache-2.0
"""The files of a model folder besides its weights: tokenizer, templates, licence and the like."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from svsk_offline.storage.layer_report import REPORT_NAME
from svsk_vllm.format import SvskFormatError
from svsk_vllm.format.files import copy_regular

__all__ = ["copy_side_files"]

_WEIGHTS: Final = tuple(
    """
    .safetensors .bin .pt .pth .ckpt .gguf .ggml .h5 .msgpack .onnx .onnx_data .ot .tflite
    .index.json
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
_OURS: Final = ("config.json", "README.md", REPORT_NAME)
_NOT_OF_THE_MODEL: Final = (".git", ".cache", "__pycache__", "runs")
_OF_TRAINING: Final = re.compile(
    r"checkpoint-\d+$|adapter_(config|model)\b|events\.out\.tfevents|global_step\d+$"
)
"""What training leaves beside a model: its other states, adapters that are not meant, logs."""


def copy_side_files(source: Path, target: Path, say: Callable[[str], None], *, code: bool) -> None:
    """Copy what a model folder holds besides its weights.

    Left out are weights of any kind, config.json, the model card, and what training left.

    Links are followed, as those of a hub cache must be. What is no regular file is left out, and
    named.

    Args:
        source: model folder.
        target: folder to copy into; is there.
        say: told of each file that is left out although it is none of those.
        code: copy Python files too.

    Raises:
        OSError: a file cannot be read or written.
    """
    for path in _files(source):
        name = path.relative_to(source)
        if (
            path.name.lower().endswith(_WEIGHTS)
            or str(name) in _OURS
            or (path.suffix == ".py" and not code)
        ):
            continue
        if _OF_TRAINING.match(path.name):
            continue
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_regular(path, to)
        except SvskFormatError as error:
            say(f"{error} It is left out.")


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder by name; a folder that links lead to counts once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        stat = Path(parent).stat()
        folders[:] = sorted(
            name
            for name in folders
            if name not in _NOT_OF_THE_MODEL and not _OF_TRAINING.match(name)
        )
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield from (Path(parent) / name for name in sorted(files))
