# SPDX-License-Identifier: Apache-2.0
"""What answers and scores depend on besides models and settings: code and the environment.

Whatever only shows results (reports, the command's tables) or serves developers is not among it, so
that a change there leaves what is kept of a run as it is.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import svsk_eval
import svsk_kernels
import svsk_vllm
from svsk_eval.task_data import tasks_folder

__all__ = [
    "answer_sources",
    "environment_settings",
    "model_sources",
    "source_files",
    "source_hash",
    "task_sources",
    "text_sources",
]

_SOURCES: Final = (".py", ".cpp", ".yaml", ".json", ".jsonl")
_EVAL: Final = Path(svsk_eval.__file__).parent
_ENGINES: Final = (
    "engines",
    "journal",
    "journaled_model",
    "repeats",
    "vllm_engine",
    "worker",
)
_NOT_SCORING: Final = ("compare.py", "compared.py", "console.py", "generate.py")

_HARMLESS: Final = (
    "SVSK_DATA",  # the items it gives are hashed themselves
    "VLLM_LOGGING_LEVEL",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_CACHE_ROOT",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_HOST_IP",
    "VLLM_PORT",
)


def model_sources() -> list[Path]:
    """The code that makes a model's answers from its weights."""
    return [Path(svsk_vllm.__file__).parent, Path(svsk_kernels.__file__).parent]


def task_sources(include_path: Path | None) -> list[Path]:
    """What makes prompts and scores of items; lm-eval's own is known by its version.

    Args:
        include_path: folder of the user's tasks, or None.
    """
    tasks = tasks_folder()
    files = [*tasks.glob("*.yaml"), *(tasks / "data").glob("*.jsonl")]
    files += [_EVAL / "bench" / f"{name}.py" for name in _ENGINES]
    folders = [_EVAL / "task_data", _EVAL / "sandbox", *([include_path] if include_path else [])]
    return files + folders


def text_sources() -> list[Path]:
    """The code that scores a text."""
    return [path for path in (_EVAL / "text").glob("*.py") if path.name not in _NOT_SCORING]


def answer_sources() -> list[Path]:
    """The code that scores a reference's own answers."""
    chat = [path for path in (_EVAL / "chat").glob("*.py") if path.name not in _NOT_SCORING]
    return [*text_sources(), *chat, _EVAL / "bench" / "reference_answers.py"]


def source_files(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """Source, task and data files among some files and in some folders, with relative names."""
    files = []
    for path in paths:
        within = sorted(path.rglob("*")) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        files += [
            (file.relative_to(root).as_posix(), file)
            for file in within
            if file.suffix in _SOURCES and file.is_file()
        ]
    return sorted(files)


def source_hash(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of :func:`source_files`."""
    hashed = hashlib.sha256()
    for name, path in source_files(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        hashed.update(f"{name} {content}\n".encode())
    return hashed.hexdigest()


def environment_settings() -> dict[str, str]:
    """Variables that choose kernels or change how vLLM computes."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("SVSK_", "VLLM_")) and name not in _HARMLESS
    }
