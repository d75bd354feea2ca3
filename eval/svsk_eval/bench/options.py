# SPDX-License-Identifier: Apache-2.0
"""What `svsk bench` is asked for, besides the settings that a report keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from svsk_eval.bench.progress import Step
from svsk_eval.report.schema import Engine

__all__ = ["BenchOptions", "BenchProgress", "Candidate", "TextOptions"]

BenchProgress = Callable[[str, Step], None]
"""Called with a model's label and what it is at."""


@dataclass(frozen=True)
class Candidate:
    """A model that takes part.

    Attributes:
        label: its name in reports.
        name: as it was given, a folder or a hub name.
    """

    label: str
    name: str


@dataclass(frozen=True)
class TextOptions:
    """A text to score, as with ``svsk eval``.

    Attributes:
        text: plain text file.
        chunks: how many to score.
        seq_len: tokens per chunk.
        engines: ``hf`` for KL, top-1 and NLL of the dequantised weights, ``vllm`` for the NLL of
            the served model.
    """

    text: Path
    chunks: int
    seq_len: int
    engines: tuple[Engine, ...]


@dataclass(frozen=True)
class BenchOptions:
    """What is not in the report's settings.

    Attributes:
        work_dir: holds answers and results by model; a run that is started again goes on there.
        dtype: of the arithmetic, ``auto`` or torch's name.
        include_path: folder of further tasks, or None.
        batch_size: prompts at a time with ``hf``.
        consent: whether code that a model writes may be run.
        reference_answers: items of each task that generates on whose reference's answers variants
            are scored token by token; 0 for none.
        merge_answers: take answers to the same requests that other hardware, versions or code
            computed, where a work folder has some; the report says how many.
        text: a text to score too, or None.
        command: for the report.
    """

    work_dir: Path
    dtype: str
    include_path: Path | None
    batch_size: int
    consent: bool
    text: TextOptions | None
    command: str
    reference_answers: int = 0
    merge_answers: bool = False
