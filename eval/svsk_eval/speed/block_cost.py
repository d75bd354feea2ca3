# SPDX-License-Identifier: Apache-2.0
"""What quantising one decoder block of a large model costs, without its weights.

``python -m svsk_eval.speed.block_cost qwen3-8b --recipe best`` makes a model of one block (or more)
of that shape with random weights, quantises it with random tokens, and reports the seconds per
block and the peak memory of the process. Time and memory depend on the shape and not on the values,
but for the number of times a decomposition needs more damping.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

from svsk_eval.speed.random_model import SHAPES, Shape, write_random_model
from svsk_offline.calibration import CalibrationSet
from svsk_offline.calibration.room import peak_memory_gib
from svsk_offline.calibration.text import token_fingerprint
from svsk_offline.command_app import App
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import load_recipe
from svsk_offline.recipe_sections import TableArgs
from svsk_offline.storage.atomic import write_json
from svsk_offline.storage.layer_report import LayerReport

__all__ = ["app", "measure"]

_VOCABULARY: Final = 8192

_SAMPLES: Final = 128
"""Where a recipe leaves their number open, whatever the shape: costs of shapes are comparable."""


def measure(
    shape: str, recipe_name: str, layers: int, work: Path, device: str = "auto"
) -> dict[str, Any]:
    """Quantise a random model and say what it took.

    Returns:
        Shape, recipe, seconds per block and per matrix, peak memory in GiB, bits per weight.
    """
    dense = TableArgs(head="dense", embedding="dense")
    recipe = load_recipe(recipe_name).model_copy(update={"tables": dense})
    # A small, tied embedding saves the time to write it.
    changes = {"num_hidden_layers": layers, "vocab_size": _VOCABULARY, "tie_word_embeddings": True}
    model = write_random_model(work / "model", shape, "bf16", changes)
    args, samples = recipe.calibration, recipe.calibration.samples or _SAMPLES
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(0, _VOCABULARY, (samples, args.seq_len), generator=generator)
    texts = CalibrationSet(tokens, "random", token_fingerprint(tokens))
    reports: list[LayerReport] = []
    started = time.perf_counter()
    result = quantize(
        model,
        work / "out",
        recipe,
        calibration=texts,
        device=device,
        progress=Progress(layer=reports.append),
    )
    total = time.perf_counter() - started
    cuda = reserved = None
    if torch.cuda.is_available():
        cuda = torch.cuda.max_memory_allocated() / (1 << 30)
        reserved = torch.cuda.max_memory_reserved() / (1 << 30)
    return {
        "shape": shape,
        "recipe": recipe.name,
        "blocks": layers,
        "blocks_of_the_model": SHAPES[shape]["num_hidden_layers"],
        "tokens": samples * args.seq_len,
        "seconds": total,
        "seconds_of_planning": result.plan_seconds,
        "seconds_per_block": result.block_seconds,
        "seconds_by_matrix": {report.name: report.seconds for report in reports},
        "peak_memory_gib": peak_memory_gib(),
        "peak_cuda_memory_gib": cuda,
        "peak_cuda_reserved_gib": reserved,
        "bits_per_weight": result.bits_per_weight,
        "device": (
            torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "cpu"
        ),
        "threads": torch.get_num_threads(),
    }


def main(
    shape: Annotated[Shape, typer.Argument(help="Model whose block to make.")],
    recipe: Annotated[str, typer.Option(help="Name or YAML file.")] = "best",
    layers: Annotated[int, typer.Option(min=1, help="Decoder blocks to make and quantise.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures there.")
    ] = None,
) -> None:
    """Measure the cost of quantising one block of a large model."""
    with tempfile.TemporaryDirectory(prefix="svsk-block-") as folder:
        cost = measure(shape, recipe, layers, Path(folder), device)
    if json_file is not None:
        write_json(json_file, cost)
    Console().print_json(json.dumps(cost))


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
