# SPDX-License-Identifier: Apache-2.0
"""How much memory one linear takes to quantise, in float32 matrices of its input's width squared.

``python -m svsk_eval.speed.quantizer_memory`` quantises random weights [K / 3, K], the shape of an
8B model's down_proj, for several K, each in a process of its own, and prints a row for each.
Statistics of the input are counted, the inputs are not: they are gone by then.
"""

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svsk_offline.calibration import InputStatistics
from svsk_offline.calibration.cross_moment import CrossMoment, PairedMoments
from svsk_offline.command_app import App
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.quantizers.aimed_weight import aims
from svsk_offline.quantizers.alternating import PreparedInput, quantize_alternating
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AlternatingRecipe, load_recipe
from svsk_vllm.format import ConfigGroup, LinearSpec

__all__ = ["LiveMemory", "Peak", "app", "measure"]

_KIB: Final = 1 << 10

_CPU: Final = torch.device("cpu")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, of a least size, as long as they live.

    Scratch memory inside an operation (a matrix library's) is not seen.

    Args:
        least: bytes of the smallest storage that is counted.

    Attributes:
        peak: most bytes alive at a time.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._least = least
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().nbytes() >= self._least
            ):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@dataclass(frozen=True)
class Peak:
    """Peak memory of one linear; the first two in units of a float32 [K, K]."""

    k: int
    matrices: float  # tensors of K x K or more bytes of it
    tensors: float  # all tensors
    process_bytes: int  # growth of the resident size: with what matrix libraries take


def measure(k: int, recipe_name: str = "best", tokens: int | None = None) -> Peak:
    """Quantise a random [K / 3, K] by a recipe of the method alternating, sidecar on one tile.

    Args:
        k: input width, a multiple of 192.
        recipe_name: of a recipe of the method alternating.
        tokens: random ones for the statistics; twice the width by default.
    """
    recipe = load_recipe(recipe_name)
    if not isinstance(recipe, AlternatingRecipe):
        raise ValueError(f"{recipe_name}: not of the method alternating")
    sidecar = recipe.sidecar.model_copy(update={"tile_m": 0, "tile_n": 0})
    scheme = ConfigGroup(targets=("Linear",), weights=recipe.weights, sidecar=sidecar)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(k // 3, k, generator=generator)
    count = recipe.gradients.directions
    metric = RowMetric(
        torch.rand(k // 3, generator=generator), torch.randn(count, k // 3, generator=generator)
    )
    spec = LinearSpec("down_proj", k // 3, k, scheme, torch.bfloat16)
    before = _resident_kib()
    everything, matrices = LiveMemory(), LiveMemory(4 * k * k)
    with everything, matrices:
        statistics = InputStatistics(k, _CPU, full=True)
        aim = recipe.alternating.aim
        pair = _pair(weight) if aim else None
        left = 2 * k if tokens is None else tokens
        while left > 0:
            count = min(left, 256)
            inputs = torch.randn(1, count, k, generator=generator)
            statistics.add(inputs)
            if pair is not None:
                pair.fitted.add(1.1 * inputs, inputs)
                pair.held_out.add(1.1 * inputs, inputs)
                pair.second.add(inputs)
            left -= count
        if pair is not None:
            weights, held_out = {"": weight}, pair.second
            missing, unseen = {"": pair.fitted.product("")}, {"": pair.held_out.product("")}
            del pair  # as a run does
            weight = aims(weights, missing, unseen, statistics, held_out, most=aim)[""].weight
            del held_out
        given = PreparedInput(statistics, recipe.alternating)
        quantize_alternating(weight, given, spec, metric)
    unit = 4 * k * k
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * _KIB
    return Peak(k, matrices.peak / unit, everything.peak / unit, grown)


def _pair(weight: torch.Tensor) -> PairedMoments:
    cross, second = CrossMoment({"": weight}), InputStatistics(weight.shape[1], _CPU, full=True)
    return PairedMoments(cross, cross.empty(), second)


def _resident_kib() -> int:
    """Present resident size of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() // _KIB


def main(
    widths: Annotated[list[int] | None, typer.Argument(help="Input widths K.")] = None,
    recipe: Annotated[str, typer.Option(help="Of the method alternating.")] = "best",
) -> None:
    """Measure the memory of quantising one linear."""
    console = Console()
    table = new_table("K", "K x K matrices", "all tensors", "process, MiB", numbers=range(4))
    peaks = []
    for k in widths or [1536, 3072]:
        # A process each: the resident size of one only grows.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(measure, k, recipe).result()
        peaks.append(peak)
        table.add_row(
            str(k),
            f"{peak.matrices:.1f}",
            f"{peak.tensors:.1f}",
            f"{peak.process_bytes / (1 << 20):.0f}",
        )
    show_table(console, table)
    first, last = min(peaks, key=lambda peak: peak.k), max(peaks, key=lambda peak: peak.k)
    if first.k < last.k:
        # What does not grow with K (code, buffers of a fixed size) is left out.
        grown = last.process_bytes - first.process_bytes
        matrices = grown / (4 * (last.k**2 - first.k**2))
        console.print(f"process, per K x K float32: {matrices:.1f} (K {first.k} to {last.k})")


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
