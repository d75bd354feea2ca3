# SPDX-License-Identifier: Apache-2.0
"""``svsk quantize`` in several processes, as torchrun starts them: forks of one that has torch."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch.distributed as dist

from tests.support.forked import ForkedPopen, ForkServer

__all__ = ["Ranks", "together"]

_LONGEST = 400.0
"""Seconds for all processes to end."""


class _Rank(ForkedPopen):
    server = ForkServer(
        "accelerate",
        "pydantic",
        "torch.distributed",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
        "typer",
    )
    modules: ClassVar[tuple[str, ...]] = ("svsk_offline",)


@dataclass
class Ranks:
    """Processes that were started together.

    Attributes:
        processes: one per rank.
        outputs: files with what each wrote to standard output and error.
        store: what connects them: torchrun's, which lives as long as this.
    """

    processes: list[_Rank]
    outputs: list[Path]
    store: dist.TCPStore = field(repr=False)

    def wait(self) -> list[int]:
        """Their exit codes."""
        return [process.wait(_LONGEST) for process in self.processes]

    def said(self) -> list[str]:
        """What each of them wrote."""
        return [path.read_text() for path in self.outputs]

    def kill(self, rank: int) -> None:
        """``kill -9``."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)


@contextlib.contextmanager
def together(
    folder: Path,
    size: int,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    others: Mapping[int, tuple[object, ...]] | None = None,
) -> Iterator[Ranks]:
    """Start the command in several processes; those that are left are killed at the end.

    Args:
        folder: for files with what they write.
        size: how many.
        arguments: of ``svsk``.
        environment: more variables of theirs.
        others: further arguments of single processes.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "COLUMNS": "300",
        **(environment or {}),
    }
    processes, outputs = [], []
    try:
        for rank in range(size):
            outputs.append(folder / f"rank-{rank}.txt")
            own = (others or {}).get(rank, ())
            with outputs[-1].open("w") as file:
                processes.append(
                    _Rank(
                        [sys.executable, "-m", "svsk_offline", *map(str, (*arguments, *own))],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                    )
                )
        yield Ranks(processes, outputs, store)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def stop_server() -> None:
    """End the process that is forked."""
    _Rank.server.stop()
