# SPDX-License-Identifier: Apache-2.0
"""How a layer's error depends on the number of tokens it is calibrated on.

``python -m svsk_eval.tune.tokens_per_width MODEL TEXT --held-out-text OTHER --block 14`` quantises
the linears of one decoder block again and again, each on more tokens, and measures the error of
their outputs on the tokens they were fitted to and on those of another text. The unit is tokens per
input feature: a Hessian of K features from fewer than K tokens has no inverse. Inputs of the block
are kept in memory, so this is for small models.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from svsk_eval.errors import EvalError
from svsk_offline.calibration import BlockRunner, CalibrationSet, InputStatistics, load_calibration
from svsk_offline.command_app import App
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.quantizers.quantize_linear import quantize_linear
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.atomic import write_json
from svsk_offline.storage.decoder_blocks import linear_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import ConfigGroup, dequantize

__all__ = ["RATIOS", "Point", "app", "draw", "measure"]

RATIOS: Final = (0.67, 1.14, 2.0, 4.0, 8.0, 14.0, 16.0)
"""Tokens per input feature; 14 is what holding out an eighth leaves of 16."""


@dataclass(frozen=True)
class Point:
    """Errors of one linear after one number of tokens, ``E|dW x|^2 / E|W x|^2``."""

    name: str
    width: int
    tokens_per_width: float
    fitted: float  # on the tokens it was fitted to
    held_out: float  # on those of the other text


@torch.no_grad()
def block_inputs(source: ModelSource, texts: CalibrationSet, block: int) -> dict[str, torch.Tensor]:
    """Inputs of the linears of a block, float32 [samples, tokens, K] by the names below it."""
    device, dtype = torch.device("cpu"), torch.float32
    name, blocks = source.blocks
    runner = BlockRunner(source, texts, device, dtype)
    parts: dict[str, list[torch.Tensor]] = {}
    try:
        for index in range(block + 1):
            source.load(blocks[index], f"{name}.{index}.", dtype, device)
            hooks = (
                [
                    module.register_forward_pre_hook(_keeper(parts.setdefault(key, [])))
                    for key, module in linear_modules(blocks[index])
                ]
                if index == block
                else []
            )
            runner.advance(index, blocks[index])
            for hook in hooks:
                hook.remove()
            source.unload(blocks[index])
    finally:
        runner.close()
    shape = texts.tokens.shape
    return {key: torch.cat(rows).view(*shape, -1) for key, rows in parts.items()}


def _keeper(rows: list[torch.Tensor]) -> Any:
    def keep(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        rows.append(given[0].detach().flatten(0, -2).clone())

    return keep


def measure(
    model: Path,
    texts: tuple[str, str],
    recipe: Recipe,
    block: int,
    ratios: Sequence[float] = RATIOS,
    held_out_samples: int = 32,
) -> list[Point]:
    """Quantise the linears of a block on growing numbers of tokens.

    Args:
        model: dense folder.
        texts: sources to calibrate on, and to measure on.
        recipe: how; its gradient weights are left out.
        block: number of the block.
        ratios: tokens per input feature.
        held_out_samples: samples of the second text.

    Raises:
        EvalError: there is no such block.
    """
    source = ModelSource(model)
    args, last = recipe.calibration, len(source.blocks[1]) - 1
    if not 0 <= block <= last:
        raise EvalError(f"--block {block}: the model has blocks 0 to {last}.")
    modules = [(key, full, linear) for key, full, linear in source.linears(block)]
    most = max(ratios) * max(linear.in_features for *_, linear in modules)
    counts = (-(-int(most) // args.seq_len) + 1, held_out_samples)
    fitted, other = (
        block_inputs(
            source,
            load_calibration(text, source.tokenizer, count, args.seq_len, args.seed),
            block,
        )
        for text, count in zip(texts, counts, strict=True)
    )
    scheme = ConfigGroup(targets=("Linear",), weights=recipe.weights, sidecar=recipe.sidecar)
    points = []
    for key, full, linear in modules:
        weight = source.tensors.read(f"{full}.weight").float()
        for ratio in ratios:
            tokens = round(ratio * linear.in_features)
            seen = _first_tokens(fitted[key], tokens)
            statistics = InputStatistics(
                linear.in_features, torch.device("cpu"), full=True, first=True
            )
            for sample in seen:
                statistics.add(sample)
            stored = quantize_linear(full, weight, statistics, recipe, scheme, torch.bfloat16)
            missed = weight - dequantize(stored)
            errors = [
                float((rows @ missed.T).square().sum() / (rows @ weight.T).square().sum())
                for rows in (torch.cat(seen, 1)[0], other[key].flatten(0, 1))
            ]
            points.append(Point(full, linear.in_features, ratio, *errors))
    return points


def _first_tokens(inputs: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """So many tokens of [samples, tokens, K], each [1, tokens, K], the last one cut."""
    length = inputs.shape[1]
    return [
        inputs[start // length : start // length + 1, : tokens - start]
        for start in range(0, tokens, length)
    ]


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw held-out errors as lines and fitted ones dashed, both logarithmic, into a file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point.name for point in points):
        own = [point for point in points if point.name == name]
        ratios = [point.tokens_per_width for point in own]
        (line,) = axes.plot(
            ratios,
            [point.held_out for point in own],
            marker="o",
            label=f"{name.rpartition('.')[2]} (K = {own[0].width})",
        )
        axes.plot(ratios, [point.fitted for point in own], "--", color=line.get_color(), alpha=0.5)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="calibration tokens per input feature",
        ylabel="squared error of the output, relative",
        title="Held-out tokens (lines), fitted tokens (dashed)",
    )
    axes.set_xticks(ticks := sorted({point.tokens_per_width for point in points}))
    axes.set_xticklabels([f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main(
    model: Annotated[Path, typer.Argument(help="Dense model folder.")],
    text: Annotated[str, typer.Argument(help="Text to calibrate on.")],
    held_out_text: Annotated[str, typer.Option(help="Text to measure on.")],
    block: Annotated[int, typer.Option(min=0, help="Decoder block.")] = 0,
    recipe: Annotated[str, typer.Option(help="Name or YAML file.")] = "best",
    figure: Annotated[Path | None, typer.Option(help="Draw there (.svg, .png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures there.")] = None,
) -> None:
    """Measure a block's errors against calibration tokens."""
    points = measure(model, (text, held_out_text), load_recipe(recipe), block)
    headings = ("linear", "K", "tokens / K", "error, fitted", "error, held out")
    table = new_table(*headings, numbers=range(1, 5))
    for point in points:
        table.add_row(
            point.name,
            str(point.width),
            f"{point.tokens_per_width:g}",
            f"{point.fitted:.2e}",
            f"{point.held_out:.2e}",
        )
    show_table(Console(), table)
    if json_file is not None:
        write_json(json_file, json.loads(json.dumps([asdict(point) for point in points])))
    if figure is not None:
        draw(points, figure)


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
