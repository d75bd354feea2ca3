# SPDX-License-Identifier: Apache-2.0
"""What answers and scores depend on besides models and settings.

The code that makes them, and the environment.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["environment_settings", "source_hash"]

_SOURCES: Final = (".py", ".cpp", ".yaml", ".json", ".jsonl")

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


def source_hash(folders: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of all source, task and data files in some folders."""
    hashed = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                hashed.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return hashed.hexdigest()


def environment_settings() -> dict[str, str]:
    """Variables that choose kernels or change how vLLM computes."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("SVSK_", "VLLM_")) and name not in _HARMLESS
    }
