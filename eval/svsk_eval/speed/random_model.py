# SPDX-License-Identifier: Apache-2.0
"""Models of a published size with random weights, dense or quantised.

Speed and memory do not depend on the values.

``python -m svsk_eval.speed.random_model qwen3-8b FOLDER --variant svsk-r16 --variant w4a16`` writes
FOLDER/svsk-r16 and FOLDER/w4a16. They have no tokenizer. Every code and factor is drawn from its
whole range: constant weights would take less power than real ones, and a GPU's clock depends on it.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

from svsk_eval.errors import EvalError
from svsk_eval.speed.fused_obstacle import fused_obstacle
from svsk_kernels.errors import SvskError
from svsk_offline.choices import choose
from svsk_offline.command_app import App
from svsk_offline.export.compressed_tensors import w4a16_config
from svsk_offline.storage.atomic import PartialFolder, write_index, write_json, write_tensors
from svsk_vllm.format import (
    Checkpoint,
    ConfigGroup,
    LinearSpec,
    QuantizedLinear,
    SidecarArgs,
    SvskCheckpointConfig,
    WeightArgs,
    codebook_levels,
)
from svsk_vllm.format.model_config import declared

__all__ = ["SHAPES", "VARIANTS", "Shape", "Variant", "app", "write_random_model"]

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""Sizes of the published models, as keys of a Qwen3 ``config.json``."""

VARIANTS: Final[dict[str, ConfigGroup | int | None]] = {
    "bf16": None,
    "w4a16": 128,
    "svsk-r16": ConfigGroup(targets=("Linear",), sidecar=SidecarArgs(rank=16)),
    "svsk-r32-4bit": ConfigGroup(targets=("Linear",), sidecar=SidecarArgs(rank=32, num_bits=4)),
    "svsk-quad8-r16": ConfigGroup(
        targets=("Linear",), weights=WeightArgs(codebook="quad8"), sidecar=SidecarArgs(rank=16)
    ),
    "svsk-g32-s8-r16": ConfigGroup(
        targets=("Linear",),
        weights=WeightArgs(group_size=32, scale_bits=8),
        sidecar=SidecarArgs(rank=16),
    ),
    "svsk-g16-s6-r16": ConfigGroup(
        targets=("Linear",),
        weights=WeightArgs(group_size=16, scale_bits=6),
        sidecar=SidecarArgs(rank=16),
    ),
}
"""How linears are stored: an SVSK scheme, the group size of a W4A16 model, or None for dense."""

_STD: Final = 0.02
"""Of dense weights, as transformers initialises them; quantised ones have the same."""

_SIDECAR: Final = 0.1
"""Standard deviation of a sidecar over that of its base."""


class Shape(StrEnum):
    """The keys of :data:`SHAPES`."""

    QWEN3_4B = "qwen3-4b"
    QWEN3_8B = "qwen3-8b"


class Variant(StrEnum):
    """The keys of :data:`VARIANTS`."""

    BF16 = "bf16"
    W4A16 = "w4a16"
    SVSK_R16 = "svsk-r16"
    SVSK_R32_4BIT = "svsk-r32-4bit"
    SVSK_QUAD8_R16 = "svsk-quad8-r16"
    SVSK_G32_S8_R16 = "svsk-g32-s8-r16"
    SVSK_G16_S6_R16 = "svsk-g16-s6-r16"


def write_random_model(
    folder: Path,
    shape: str,
    variant: str = "bf16",
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Path:
    """Write a Qwen3 model in bfloat16, its linears as ``variant`` says, a shard per block.

    Args:
        folder: to write; must not exist.
        shape: a key of :data:`SHAPES`.
        variant: a key of :data:`VARIANTS`.
        changes: keys of ``config.json`` that differ from the shape's, ``{"num_hidden_layers": 1}``.
        seed: of the weights.
        device: where they are drawn.

    Returns:
        ``folder``.

    Raises:
        SvskError: no such shape or variant, or ``folder`` exists.
        SvskFormatError: the shape's columns do not fit the scheme's groups.
    """
    for what, name, names in (("shape", shape, list(SHAPES)), ("variant", variant, list(VARIANTS))):
        choose(what, name, names)
    scheme = VARIANTS[variant]
    parameters, linears, hf_config = _architecture(SHAPES[shape] | dict(changes or {}))
    generator = torch.Generator(device).manual_seed(seed)
    target = PartialFolder(folder, suffix="writing")
    target.discard()
    partial = target.create()
    blocks = _by_block(parameters)
    shards = [f"model-{n:05}-of-{len(blocks):05}.safetensors" for n in range(1, len(blocks) + 1)]
    for shard, names in zip(shards, blocks, strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            module = name.removesuffix(".weight")
            if scheme is None or module not in linears:
                tensors[name] = _dense(parameters[name], generator)
            elif isinstance(scheme, int):
                tensors |= _w4a16(module, parameters[name], scheme, generator)
            else:
                tensors |= _svsk(module, parameters[name], scheme, generator).to_tensors()
        write_tensors(partial / shard, tensors)
    write_index(partial, shards)
    write_json(partial / "config.json", hf_config | _quantization(scheme, linears))
    return target.commit()


def _architecture(
    sizes: Mapping[str, Any],
) -> tuple[dict[str, torch.Size], list[str], dict[str, Any]]:
    """Shapes of the parameters, names of the linears that quantisers take, and ``config.json``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config: Any = Qwen3Config(**sizes, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    # a tied head appears once
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    return shapes, linears, config.to_dict()


def _by_block(parameters: Mapping[str, Any]) -> list[list[str]]:
    """Names of the parameters outside the decoder blocks, then block by block."""
    blocks: dict[str, list[str]] = {}
    for name in parameters:
        parts = name.split(".")
        blocks.setdefault(parts[2] if parts[1] == "layers" else "", []).append(name)
    return list(blocks.values())


def _dense(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator, device=generator.device) * _STD).to(
        torch.bfloat16
    )


def _w4a16(
    module: str, shape: torch.Size, group: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of compressed-tensors' format ``pack-quantized``."""
    n, k = shape
    if k % group:
        raise EvalError(f"{module}: {k} columns are not a multiple of W4A16's group size {group}.")
    words = torch.randint(
        -(1 << 31), 1 << 31, (n, k // 8), generator=generator, device=generator.device
    )
    return {
        f"{module}.weight_packed": words.to(torch.int32),
        f"{module}.weight_scale": _scales(n, k // group, torch.arange(-8.0, 8.0), generator).to(
            torch.bfloat16
        ),
        f"{module}.weight_shape": torch.tensor([n, k]),
    }


def _svsk(
    module: str, shape: torch.Size, scheme: ConfigGroup, generator: torch.Generator
) -> QuantizedLinear:
    n, k = shape
    spec = LinearSpec(module, n, k, scheme)
    grid, rank, where = spec.grid, spec.rank, generator.device

    def integers(limit: int, *size: int) -> torch.Tensor:
        return torch.randint(
            -limit, limit, size, generator=generator, dtype=torch.int8, device=where
        )

    codes = integers(8, spec.n, spec.k)
    wanted = _scales(
        spec.n, spec.k // spec.group_size, codebook_levels(scheme.weights.codebook), generator
    )
    scale = spec.scales.round(wanted, spec.scales.row_scale(wanted)).to(spec.scale_dtype)
    if not rank:
        return QuantizedLinear(spec, codes, scale)
    limit = 1 << (spec.factor_bits - 1)
    # Factors are uniform over 2 * limit integers, whose variance is limit**2 / 3.
    gain = torch.full(
        (grid.num_row_tiles, grid.num_col_tiles, rank),
        _SIDECAR * _STD / math.sqrt(rank) * 3 / limit**2,
        device=where,
    )
    u = integers(limit, spec.n, grid.num_col_tiles, rank)
    return QuantizedLinear(
        spec, codes, scale, u, integers(limit, grid.num_row_tiles, rank, spec.k), gain
    )


def _scales(n: int, groups: int, levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scales that give evenly drawn levels the standard deviation of dense weights.

    float32 [n, groups].
    """
    spread = torch.rand(n, groups, generator=generator, device=generator.device) + 0.5
    # 1/12: the spread's variance
    root_mean_square = math.sqrt(float(levels.float().square().mean()) * (1 + 1 / 12))
    return spread * (_STD / root_mean_square)


def _quantization(scheme: ConfigGroup | int | None, linears: list[str]) -> dict[str, Any]:
    if scheme is None:
        return {}
    if isinstance(scheme, int):
        return {"quantization_config": w4a16_config({scheme: linears})}
    config = SvskCheckpointConfig(
        config_groups={"group_0": scheme}, ignore=("lm_head",), producer={"weights": "random"}
    )
    return declared({}, config)


def main(
    shape: Annotated[Shape, typer.Argument(help="Model whose sizes to take.")],
    out: Annotated[Path, typer.Argument(help="Folder that gets a folder per variant.")],
    variant: Annotated[
        list[Variant] | None,
        typer.Option(help="How linears are stored; may be repeated, by default all."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder blocks, by default all.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the weights are drawn: cpu, cuda.")] = "cpu",
) -> None:
    """Write models with random weights. A folder that is there already is left as it is.

    Where this machine's kernels do not run a variant, a note says why: it may be for another.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: torch finds no GPU; leave it out")
    out.mkdir(parents=True, exist_ok=True)
    changes = {} if layers is None else {"num_hidden_layers": layers}
    for name in variant or list(Variant):
        folder = out / name
        there = folder.exists()
        if not there:
            try:
                write_random_model(folder, shape, name, changes, device=device)
            except SvskError as error:
                errors = Console(stderr=True, soft_wrap=True, highlight=False)
                errors.print(f"error: {error}", markup=False)
                raise typer.Exit(1) from error
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        was_there = ", was there" if there else ""
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"{folder}: {size:.2f} GB{was_there}")
        if Checkpoint.is_svsk(folder) and (obstacle := fused_obstacle(Checkpoint(folder))):
            console.print(
                f"note: the fused kernels cannot run it on this machine: {obstacle}.", markup=False
            )


app = App(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
