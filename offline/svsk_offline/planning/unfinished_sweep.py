# SPDX-License-Identifier: Apache-2.0
"""What a sweep that was interrupted has measured, kept block by block in the run's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from svsk_offline.planning.measured import Measurements
from svsk_offline.storage.atomic import write_tensors
from svsk_offline.world import ALONE, World
from svsk_vllm.format import ShardedReader, SvskFormatError

__all__ = ["UnfinishedSweep"]

_GRADIENT: Final = "svsk-sweep-gradient.safetensors"


class UnfinishedSweep:
    """Files of a sweep: what was measured of each block, and the gradient at the last of them.

    Args:
        folder: of the run, which no other run uses meanwhile.
        key: all that is measured depends on.
        world: the processes that measure together. The leading one writes.
    """

    def __init__(self, folder: Path, key: str, world: World = ALONE) -> None:
        self._folder, self._key, self._world = folder, key, world

    def found(
        self, blocks: int, say: Callable[[str], None]
    ) -> tuple[int, torch.Tensor, list[Measurements]] | None:
        """Where to go on.

        Args:
            blocks: how many the model has.
            say: is told where, or what is wrong with the files.

        Returns:
            The last block that was measured (the sweep goes from the last one to the first), the
            gradient with respect to its inputs of this process's samples, float [samples, tokens,
            features], and, in the leading process, what was measured of it and of all behind it;
            None where the sweep begins anew.
        """
        found = self._found(blocks, say) if self._world.leads else None
        last = self._world.first(lambda: found and found[0])
        if self._world.leads or last is None:
            return found
        reader = ShardedReader(self._folder, shards=[_GRADIENT])
        return last, reader.read(_gradient_of(self._world.rank)), []

    def _found(
        self, blocks: int, say: Callable[[str], None]
    ) -> tuple[int, torch.Tensor, list[Measurements]] | None:
        path = self._folder / _GRADIENT
        if not path.exists():
            return None
        try:
            reader = ShardedReader(self._folder, shards=[_GRADIENT])
            metadata = reader.metadata(_GRADIENT)
            if metadata.get("key") != self._key:
                return None  # of another model, text or recipe: written over
            last = int(metadata["block"])
            measured = [Measurements.load(self._part(i), self._key) for i in range(last, blocks)]
            gradient = reader.read(_gradient_of(0))
        except (SvskFormatError, LookupError, TypeError, ValueError, OSError) as error:
            say(f"{path} cannot be used, so the measuring begins anew: {error}")
            return None
        say(f"Blocks {last} to {blocks - 1} were measured before the interruption")
        return last, gradient, measured

    def note(self, block: int, measured: Measurements, gradient: torch.Tensor) -> None:
        """Keep what was measured of a block.

        Args:
            block: its number, one less than the one before.
            measured: of its linears.
            gradient: with respect to its inputs, of this process's samples.
        """
        gradients = self._world.gathered(gradient)
        if not self._world.leads:
            return
        measured.save(self._part(block), self._key)
        # Last: a gradient stands for all parts from its block on.
        metadata = {"key": self._key, "block": str(block)}
        tensors = {_gradient_of(rank): given for rank, given in enumerate(gradients)}
        write_tensors(self._folder / _GRADIENT, tensors, metadata)

    def remove(self, blocks: int) -> None:
        """Remove the files: what was measured is somewhere else now."""
        if not self._world.leads:
            return
        for path in (self._folder / _GRADIENT, *map(self._part, range(blocks))):
            path.unlink(missing_ok=True)

    def _part(self, block: int) -> Path:
        return self._folder / f"svsk-sweep-{block}.safetensors"


def _gradient_of(rank: int) -> str:
    """Name of what is stored of a process."""
    return f"gradient-{rank}" if rank else "gradient"
