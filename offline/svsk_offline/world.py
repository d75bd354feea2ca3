# SPDX-License-Identifier: Apache-2.0
"""The processes that quantise one model together: who does what, and what they tell each other.

torchrun starts them, gloo or NCCL connects them. All go through the same steps in the same order,
each with its own samples. One process alone is :data:`ALONE`, and exchanges nothing.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.endings import Stopped

if TYPE_CHECKING:  # commands that start one process do without it
    import torch

__all__ = ["ALONE", "TIMEOUT", "World", "joined"]

TIMEOUT: Final = "SVSK_COLLECTIVE_TIMEOUT"
"""Environment variable: seconds that a process waits for the others."""

_PATIENCE: Final = 3600.0
"""Seconds, where nothing else is said: the others may wait for one to fit a huge matrix."""
_LAST_WORDS: Final = timedelta(seconds=10)

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is.

    What adds up or hands on is called by all of them at the same point of the work, and raises an
    ``SvskError`` if one has ended.

    Attributes:
        rank: number of this process. Number 0 leads: it speaks, and it alone writes.
        size: how many there are.
        local: number of this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def samples(self, count: int, held_out: int) -> tuple[list[int], int]:
        """Which samples are this process's.

        Args:
            count: of all.
            held_out: how many of them, the last ones, are held out.

        Returns:
            Their numbers, ascending, and how many of them are held out: perhaps none here.

        Raises:
            SvskError: there is not one to fit for each process.
        """
        fitted = count - held_out
        if fitted < self.size:
            raise SvskError(
                f"{self.size} processes, but {count} calibration samples, {held_out} of them held"
                f" out: expected {self.size} or more to fit, one for each. Raise"
                " calibration.samples (--samples) or gradients.samples, or start fewer processes."
            )
        # The last process has the fewest samples to fit, so it is the first to get others.
        others = range(fitted, count)[self.size - 1 - self.rank :: self.size]
        return [*range(fitted)[self.rank :: self.size], *others], len(others)

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Which process does each of some pieces of work, so that all have about as much.

        Args:
            costs: of the pieces.
        """
        load = [0] * self.size
        chosen = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            chosen[piece] = min(range(self.size), key=load.__getitem__)
            load[chosen[piece]] += costs[piece]
        return chosen

    def device(self, name: str) -> str:
        """Name of the device that this process computes on.

        Args:
            name: what was asked for: ``auto``, ``cpu``, ``cuda`` ...

        Raises:
            SvskError: one GPU was asked for, and there are several processes.
        """
        if self.size == 1 or (name not in ("auto", "cuda") and not name.startswith("cuda:")):
            return name
        if name.startswith("cuda:"):
            raise SvskError(
                f"--device {name}: {self.size} processes take a GPU each. Say cuda, and choose GPUs"
                " with CUDA_VISIBLE_DEVICES."
            )
        import torch

        if name == "auto" and not torch.cuda.is_available():
            return "cpu"
        if self.local < torch.cuda.device_count():
            torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def check_seen(self, made: Path) -> None:
        """Refuse a folder that this process does not see.

        Args:
            made: by the leading process.

        Raises:
            SvskError: it is not there.
        """
        if not made.exists():
            raise SvskError(
                f"{made}: was made by rank 0 and is not there for rank {self.rank}. All processes"
                " need the same folders: run them on one machine, or write where all see it."
            )

    def first(self, make: Callable[[], _T]) -> _T:
        """What the leading process makes, in all of them; the others wait for it."""
        return self.of(0, make)

    def of(self, owner: int, make: Callable[[], _T]) -> _T:
        """What one process makes, in all of them. It is pickled on the way."""
        if self.size == 1:
            return make()
        import torch
        import torch.distributed as dist

        given: list[Any] = [make() if self.rank == owner else None]
        with self._together():
            dist.broadcast_object_list(given, src=owner, device=torch.device("cpu"))
        made: _T = given[0]
        return made

    def gathered(self, value: _T) -> list[_T]:
        """The values of all processes, in the leading one; nothing in the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.leads else None
        with self._together():
            dist.gather_object(value, values)
        return values or []

    def everywhere(self, value: _T) -> list[_T]:
        """The values of all processes, in all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def add(self, total: "torch.Tensor", owner: int | None = None) -> None:
        """Add up the tensors of all processes, in place.

        Args:
            total: of one shape in all of them.
            owner: the process that gets the sum, the tensors of the others are used up; None for
                all of them.
        """
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                if owner is None:
                    dist.all_reduce(total)
                else:
                    dist.reduce(total, owner)

    def add_up(
        self,
        totals: "Iterable[torch.Tensor | None]",
        counts: Sequence[float],
        owner: int | None = None,
    ) -> list[float]:
        """Add up sums of all processes, in place, and what they were taken over.

        Args:
            totals: the sums, each of one shape in all processes, or None in all of them.
            counts: likewise of one length.
            owner: as for :meth:`add`.

        Returns:
            The counts of all processes together; of use to the owner alone, if there is one.
        """
        if self.size == 1:
            return [*counts]
        import torch

        for total in totals:
            if total is not None:
                self.add(total, owner)
        together = torch.tensor(counts, dtype=torch.float64)
        self.add(together, owner)
        found: list[float] = together.tolist()
        return found

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What the connection says when a process does not answer, in our words."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise SvskError(
                f"rank {self.rank} of {self.size}: another process has ended, or does not answer"
                f" ({one_line(error)[:200]}). Start the same command, with as many processes, again"
                f" to go on; {TIMEOUT} is how many seconds one waits for another."
            ) from error


ALONE: Final = World()


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun has started this process in; :data:`ALONE` without torchrun.

    All processes end when one does, and one of them says why: of the errors that end the block in
    several processes the first goes on, all others become a silent exit status 1.

    Raises:
        SvskError: the timeout is no number of seconds, or the processes cannot be connected.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    import torch.distributed as dist

    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    store = _connect(world)
    try:
        yield world
    except BaseException as error:
        # torchrun stops all processes at the first that ends, and must not cut the message.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if not _speaks(store):
            raise SystemExit(1) from None
        if isinstance(error, Stopped):
            raise SvskError(
                f"rank {world.rank} of {world.size}: stopped by {error}, which torchrun sends"
                " when another process has ended, or when it is stopped itself; what it says below"
                " tells which. Start the same command, with as many processes, again to go on."
            ) from None
        raise
    dist.destroy_process_group()


def _connect(world: World) -> Any:
    """Connect the processes; the store that they share."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    given = os.environ.get(TIMEOUT, str(_PATIENCE))
    try:
        seconds = float(given)
        timeout = timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        seconds = 0.0
    if not seconds > 0:
        raise SvskError(f"{TIMEOUT}={given}: expected a number of seconds over 0.")
    with world._together():
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("svsk", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    return store


def _speaks(store: Any) -> bool:
    """Whether this process is the first that ends, and so the one to say why."""
    import atexit

    try:
        first = store.add("svsk-ended", 1) == 1
    except RuntimeError:
        return True  # the store is torchrun's: nobody is left to say it twice to
    if first:
        atexit.register(_has_spoken, store)
        return True
    # Until then: when one has ended, torchrun gives the others half a minute.
    with suppress(RuntimeError):
        store.wait(["svsk-spoken"], _LAST_WORDS)
    return False


def _has_spoken(store: Any) -> None:
    with suppress(RuntimeError):
        store.set("svsk-spoken", "1")
