# SPDX-License-Identifier: Apache-2.0
"""What smoothing makes of activations of few bits.

``python -m svsk_eval.text.smoothed_inputs MODEL --text wiki.test.raw --smoothing 0.7`` folds
smoothing into a dense model as ``svsk quantize`` does it, rounds the inputs of its linears
(:mod:`svsk_eval.text.activations`), and scores it. Weights stay as they are, so the figures are
those of the activations alone. ``svsk eval --activations`` does the same with a checkpoint.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from svsk_eval.text.activations import check_kind, rounded_inputs
from svsk_eval.text.metrics import EvalResult
from svsk_eval.text.models import load_model
from svsk_eval.text.scoring import compare_models, shared_tokens
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration_entries import DEFAULT_SOURCE
from svsk_offline.cli_options import CalibrationText, JsonFile
from svsk_offline.command_app import App
from svsk_offline.planning.smoothing import plan_smoothing
from svsk_offline.recipe_sections import SmoothingArgs
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.fold import Fold
from svsk_offline.storage.hub import resolve_model
from svsk_offline.terminal import write_json

__all__ = ["app", "fold_loaded", "measure"]


def fold_loaded(model: nn.Module, source: ModelSource, fold: Fold) -> None:
    """Multiply a loaded model's parameters by a fold's factors.

    Args:
        model: of the class and the folder of ``source``, in any float dtype.
        source: says which tensor fills which parameter.
        fold: the factors.
    """
    for name, parameter in model.named_parameters():
        stored = source.map.sources.get(name)
        if stored is not None and stored in fold:
            parameter.data = fold.scale(stored, parameter.data).to(parameter.dtype)


def measure(
    model: str,
    reference: str,
    text: Path,
    smoothing: SmoothingArgs | None,
    calibration: list[str] | str,
    *,
    samples: int = 16,
    activations: str = "int8",
    chunks: int = 32,
    seq_len: int = 512,
    say: Callable[[str], None] = lambda text: None,
) -> EvalResult:
    """Score a model with rounded inputs against a reference without, in float32 on the CPU.

    Args:
        model: folder or hub name, dense or SVSK.
        reference: of the dense model it is compared with.
        text: plain text to score.
        smoothing: folded into ``model``, which must be dense then; None for nothing.
        calibration: text sources that the largest magnitudes are taken from.
        samples: of the calibration, of ``seq_len`` tokens.
        activations: a key of :data:`svsk_eval.text.activations.ACTIVATIONS`.
        chunks: of the text.
        seq_len: tokens per chunk.
        say: told what is folded, and what is left alone.

    Raises:
        EvalError: a model or the text cannot be used.
        SvskError: smoothing cannot be planned.
    """
    check_kind(activations)
    tokens = shared_tokens(model, reference, text, chunks, seq_len)
    base = load_model(reference, device="cpu")
    scored = load_model(model, device="cpu")
    folder = resolve_model(model)
    if smoothing is not None:
        source = ModelSource(folder)
        source.check()
        texts = load_calibration(calibration, source.tokenizer, samples, seq_len, 0)
        found = plan_smoothing(source, texts, smoothing, torch.device("cpu"))
        for line in found.lines():
            say(line)
        fold_loaded(scored, source, found.fold)
    with rounded_inputs(scored, folder, activations):
        return compare_models(scored, base, tokens)


def main(
    model: Annotated[str, typer.Argument(help="Dense or SVSK model: folder or hub name.")],
    text: Annotated[Path, typer.Option(help="Plain text to score.")],
    reference: Annotated[
        str | None, typer.Option(help="Dense model to compare with, MODEL itself if not given.")
    ] = None,
    smoothing: Annotated[
        float | None, typer.Option(help="Alpha to smooth a dense MODEL with, 0 to 1.")
    ] = None,
    outliers: Annotated[
        float | None,
        typer.Option(min=1, help="Smooth only channels over this many times the median one."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="What to smooth: norms, o, down; all if not given.")
    ] = None,
    calibration: CalibrationText = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 16,
    activations: Annotated[
        str, typer.Option(help="How inputs are rounded: int8, int8-g64, fp8, nvfp4.")
    ] = "int8",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    json_file: JsonFile = None,
) -> None:
    """Score a model whose linears read rounded inputs."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        args = None
        if smoothing is not None or outliers is not None:
            named: dict[str, Any] = {} if not target else {"targets": tuple(target)}
            args = SmoothingArgs(alpha=smoothing, above=outliers, **named)
        result = measure(
            model,
            reference or model,
            text,
            args,
            calibration or DEFAULT_SOURCE,
            samples=samples,
            activations=activations,
            chunks=chunks,
            seq_len=seq_len,
            say=lambda line: console.print(line, markup=False),
        )
    except (SvskError, ValueError) as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    ending = "" if result.kl_mean_se is None else f" ± {result.kl_mean_se:.5f}"
    console.print(f"KL {result.kl_mean:.5f}{ending}, delta NLL {result.delta_nll:+.5f}")
    write_json(json_file, result.to_json())


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
