# SPDX-License-Identifier: Apache-2.0
"""Labels of models, and how the models are served by them.

What follows an ``@`` in a label says how its folder is served:

- ``@w4a16``: the base of an SVSK folder without the sidecar, as a compressed-tensors model;
- ``@split``: an SVSK folder with the base through vLLM's own kernel and the sidecar after it;
- ``@int8``: an SVSK folder with activations of 8 bits;
- ``@float32``, ``@bfloat16``, ``@float16``: in that dtype.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import typer

from svsk_eval.errors import EvalError
from svsk_eval.speed.fused_obstacle import fused_obstacle
from svsk_offline.export.compressed_tensors import export_compressed_tensors
from svsk_vllm.format import Checkpoint

__all__ = ["Served", "describe", "read_models"]

_DTYPES: Final = ("float32", "bfloat16", "float16")
_WAYS: Final = ("w4a16", "split", "int8", *_DTYPES)


@dataclass(frozen=True)
class Served:
    """A model folder and how it is served.

    Attributes:
        folder: of the model.
        environment: what its process gets besides the present one.
        engine: arguments of ``vllm.LLM`` that are its own.
    """

    folder: Path
    environment: Mapping[str, str]
    engine: Mapping[str, Any] = field(default_factory=dict)


def read_models(texts: list[str], work: Path) -> dict[str, Served]:
    """Read LABEL=FOLDER arguments, and convert what is to be served converted.

    Args:
        texts: the arguments.
        work: a folder for what is converted.

    Returns:
        By label.

    Raises:
        typer.BadParameter: an argument is none, or its label asks for what there is not.
        EvalError: the fused kernels cannot run a folder here.
    """
    models: dict[str, Served] = {}
    for text in texts:
        label, sign, name = text.partition("=")
        if not sign or not label:
            raise typer.BadParameter(f"{text}: expected LABEL=FOLDER")
        if label in models:
            raise typer.BadParameter(f"{text}: the label {label} is given twice")
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise typer.BadParameter(
                f"{text}: {folder} holds no config.json, expected a model folder"
            )
        ways = _ways(text, label, Checkpoint.is_svsk(folder))
        if "w4a16" in ways:
            folder = export_compressed_tensors(folder, work / str(len(models)))
        # Where the fused kernels do not run, the figures of another path under their name would
        # mislead.
        kernel = "split" if "split" in ways else "fused"
        fused = kernel == "fused" and Checkpoint.is_svsk(folder)
        if fused and (obstacle := fused_obstacle(Checkpoint(folder))):
            raise EvalError(
                f"{text}: the fused kernels cannot run it on this machine: {obstacle}. End its"
                " label in @split to measure another path, or leave it out."
            )
        environment = {"SVSK_KERNEL": kernel}
        if Checkpoint.is_svsk(folder):
            # Named for all, so that what the shell says does not decide.
            environment["SVSK_ACTIVATIONS"] = "int8" if "int8" in ways else "exact"
        dtypes = [way for way in ways if way in _DTYPES]
        models[label] = Served(folder, environment, {"dtype": dtypes[0]} if dtypes else {})
    return models


def _ways(text: str, label: str, svsk: bool) -> list[str]:
    """How a label says that its folder is served."""
    ways = label.split("@")[1:]
    for way in ways:
        if way not in _WAYS:
            raise typer.BadParameter(f"{text}: @{way} is none of @{', @'.join(_WAYS)}")
        if way not in _DTYPES and not svsk:
            raise typer.BadParameter(f"{text}: @{way} is for SVSK folders, this is none")
    together = [way for way in ways if way in ("w4a16", "split", "int8")]
    if len(together) > 1 or len(ways) - len(together) > 1:
        raise typer.BadParameter(
            f"{text}: expected at most one dtype and one of @w4a16, @split and @int8"
        )
    return ways


def describe(text: str, model: Served) -> dict[str, Any]:
    """What decides a model's speed besides the load, as JSON.

    Figures of another must not pass for its own.

    Args:
        text: the argument that names it.
        model: what was made of that.
    """
    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "")
    folder = str(Path(text.partition("=")[2]).resolve())
    described = {"folder": folder, **model.environment, "VLLM_DISABLED_KERNELS": disabled}
    return {**described, **model.engine}
