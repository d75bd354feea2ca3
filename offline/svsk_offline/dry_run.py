# SPDX-License-Identifier: Apache-2.0
"""What a quantisation would do and need, worked out without reading text or weights.

Sizes are exact but under a bit budget, which is spent as a whole. Memory and temporary files follow
from the shapes of what is held at a time (:mod:`svsk_offline.planning.needs`); what a GPU would
hold is not told apart. Time is not estimated: nothing here was run.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.token_budget import sample_count
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.pipeline import resolve_device
from svsk_offline.preflight import check_recipe
from svsk_offline.quantization_result import Progress
from svsk_offline.recipe import Recipe
from svsk_offline.run import Run
from svsk_offline.storage.atomic import PartialFolder
from svsk_offline.storage.checkpoint_writer import SHARD_BYTES
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import LinearSpec

__all__ = ["Estimate", "check_disk", "dry_run", "print_estimate"]


@dataclass(frozen=True)
class Estimate:
    """What a run would do and need; sizes in bytes.

    Attributes:
        quantised: rows of kind, count, shape, bits per weight (None where a budget decides).
        dense: matrices that stay as they are, by name.
        left_by_ignore: those of them that an entry of ``ignore`` names.
        budget: bits per weight of the blocks' linears that a bit budget spends; None without one.
        bits_per_weight: of the blocks' linears.
        bits_per_weight_of_all: of all weights of the model.
        output: of the checkpoint's tensors.
        samples: calibration samples.
        disk: what is written, by what it is; the largest sum at a time is ``disk_peak``.
        memory: what is held, by what it is; the largest sum at a time is ``memory_peak``.
    """

    quantised: tuple[dict[str, Any], ...]
    dense: tuple[str, ...]
    left_by_ignore: tuple[str, ...]
    budget: float | None
    bits_per_weight: float
    bits_per_weight_of_all: float
    output: int
    samples: int
    disk: dict[str, int]
    disk_peak: int
    memory: dict[str, int]
    memory_peak: int

    def to_json(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return asdict(self)


def dry_run(
    folder: Path,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """Check a request as a run would, and estimate what it needs; nothing is written.

    Args:
        folder: the dense model.
        out: where the checkpoint would be.
        recipe: how it would be quantised.
        device: where it would be computed.
        dtype: stored dtype of scales and dense tensors.
        trust_remote_code: run Python files that come with the model.
        memory_budget: bytes that a run may hold; None for no limit.
        say: told what a run would say before it begins.

    Raises:
        SvskError, SvskFormatError: as a run would.
    """
    source = ModelSource(folder, trust_remote_code=trust_remote_code)
    scale_dtype = source.model_dtype(dtype)
    source.check()
    check_recipe(recipe, source.linear_names(), say)
    samples = sample_count(source, recipe, say, "as given")
    where = resolve_device(device)
    run = Run(
        source,
        PartialFolder(out, source.folder, overwrite=True),
        recipe,
        _no_text,
        where,
        scale_dtype,
        Progress(message=say),
    )
    sizes = _sizes(run)
    needs = run.needs(samples)
    room = needs.within(memory_budget)
    memory, disk = needs.memory(room), needs.disk(room)
    planning = memory["gradients' statistics"] + memory["inputs of all blocks"]
    running = memory["statistics of a block"] + memory["codes of a block"]
    running += memory["inputs in the dense model"]
    peak = max(planning, running) + sum(
        memory[key] for key in ("the program", "hidden states", "a block, or embedding and head")
    )
    disk["the checkpoint"] = sizes["output"]
    # At the end one file of the checkpoint is there beside the parts it is made of.
    ending = sizes["output"] + min(sizes["output"], SHARD_BYTES)
    hidden = disk["hidden states"] + disk["inputs of all blocks"]
    writing = sizes["output"] + disk["hidden states"] + disk["inputs in the dense model"]
    return Estimate(
        **sizes,
        samples=samples,
        disk=disk,
        disk_peak=max(ending, hidden, writing),
        memory=memory,
        memory_peak=peak,
    )


def check_disk(estimate: Estimate, budget: int | None) -> None:
    """Refuse a run that would take more of the disk than a budget.

    Args:
        estimate: of the run.
        budget: bytes; None for no limit.

    Raises:
        SvskError: it would, by how much, and what takes it.
    """
    if budget is not None and estimate.disk_peak > budget:
        raise SvskError(
            f"--disk-budget {budget / 1e9:g}: output and temporary files would take about"
            f" {estimate.disk_peak / 1e9:.2f} GB, {_parts(estimate.disk)}. Raise it, lower"
            " --samples or --target-bpw, or give a larger --memory-budget."
        )


def _no_text() -> Any:
    raise AssertionError("a dry run draws no text")


def _sizes(run: Run) -> dict[str, Any]:
    """What becomes of every tensor, and its bits."""
    source = run.source
    budget = None if run.allocation is None else run.allocation.target_bpw
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in source.block_linears().items()
        if name in run.schemes
    }
    specs = [
        LinearSpec(name, *shape, run.schemes[name], run.scale_dtype)
        for name, shape in shapes.items()
    ]
    tables = [table.spec for table in run.tables.tables]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for spec in (*specs, *tables):
        kind = spec.name.rpartition(".")[2]
        chosen = budget is not None and spec.name in shapes
        bits = None if chosen else spec.bits_per_weight
        row = rows.setdefault(
            (kind, spec.n, spec.k, bits),
            {"kind": kind, "count": 0, "shape": [spec.n, spec.k], "bits_per_weight": bits},
        )
        row["count"] += 1
    weights = sum(spec.num_weights for spec in specs)
    block_bits = weights * budget if budget else sum(spec.stored_bits for spec in specs)
    replaced = {f"{name}.weight" for name in shapes}
    stored = {table.stored for table in run.tables.tables}
    dense = [
        name
        for name in source.tensors.names
        if name not in replaced and name not in stored and name not in _second_copies(source)
    ]
    described = {name: source.tensors.describe(name) for name in dense}
    dense_bits = sum(
        math.prod(spec.shape)
        * 8
        * (run.scale_dtype if spec.dtype.is_floating_point else spec.dtype).itemsize
        for spec in described.values()
    )
    bits = block_bits + sum(spec.stored_bits for spec in tables) + dense_bits
    every = weights + sum(spec.num_weights for spec in tables)
    every += sum(math.prod(spec.shape) for spec in described.values())
    matrices = tuple(name for name, spec in described.items() if len(spec.shape) > 1)
    ignored = {f"{name}.weight" for name in source.block_linears()} - replaced
    return {
        "quantised": tuple(rows.values()),
        "dense": matrices,
        "left_by_ignore": tuple(name for name in matrices if name in ignored),
        "budget": budget,
        "bits_per_weight": block_bits / weights,
        "bits_per_weight_of_all": bits / every,
        "output": int(bits // 8),
    }


def _second_copies(source: ModelSource) -> set[str]:
    """Tensors of the folder that no parameter is filled from: a checkpoint leaves them out."""
    kept = set(source.outside_tensors())
    for index in range(len(source.blocks[1])):
        kept |= set(source.block_tensors(index))
    return set(source.tensors.names) - kept


def print_estimate(console: Console, estimate: Estimate) -> None:
    """Show an estimate."""
    table = new_table("quantised", "count", "N x K", "bits per weight", numbers=(1, 3))
    for row in estimate.quantised:
        bits = row["bits_per_weight"]
        table.add_row(
            row["kind"],
            str(row["count"]),
            f"{row['shape'][0]} x {row['shape'][1]}",
            "chosen by the budget" if bits is None else f"{bits:.4f}",
        )
    show_table(console, table)
    about = "at most " if estimate.budget else ""
    ignored = len(estimate.left_by_ignore)
    lines = [
        f"bits per weight {about}{estimate.bits_per_weight:.4f} of the linears of the blocks,"
        f" {about}{estimate.bits_per_weight_of_all:.4f} over all weights of the model",
        f"checkpoint {about}{estimate.output / 1e6:,.1f} MB",
        f"matrices that stay dense: {len(estimate.dense)}"
        + (f", {ignored} of them by ignore" if ignored else "")
        + "".join(f"\n  {name}" for name in estimate.dense[:8])
        + (f"\n  and {len(estimate.dense) - 8} more" if len(estimate.dense) > 8 else ""),
        f"memory about {estimate.memory_peak / (1 << 30):.2f} GiB, of it {_parts(estimate.memory)};"
        " pages of the model's files come on top, and are given back",
        f"disk about {estimate.disk_peak / 1e9:.2f} GB at the most, {_parts(estimate.disk)}",
        "time: not estimated, nothing was run. `python -m svsk_eval.speed.block_cost MODEL`"
        " measures a block here.",
    ]
    for line in lines:
        console.print(line, markup=False)


def _parts(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items() if size)
