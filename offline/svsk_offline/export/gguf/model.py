# SPDX-License-Identifier: Apache-2.0
"""An SVSK checkpoint as a GGUF model for llama.cpp, and its sidecar as an adapter of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from svsk_kernels.errors import SvskError
from svsk_offline.export.folder import open_sound
from svsk_offline.export.gguf.adapter import adapter_rank, lora_factors, require_small
from svsk_offline.export.gguf.blocks import BLOCK, BLOCK_BYTES, TYPE_OF
from svsk_offline.export.gguf.families import family_plan
from svsk_offline.export.gguf.file import GgufTensor, write_gguf
from svsk_offline.export.gguf.plan import Placed, weight_in_order
from svsk_offline.export.gguf.template import template_plan
from svsk_vllm.format import Checkpoint

__all__ = ["export_gguf"]

_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


def export_gguf(
    checkpoint: str | Path,
    out: Path,
    *,
    template: Path | None = None,
    lora: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write a checkpoint's base as a GGUF model, and its sidecar as a LoRA adapter of that.

    Args:
        checkpoint: SVSK folder.
        out: file of the model.
        template: GGUF of the same model, which gives all but the weights; needed for families
            other than those of :mod:`svsk_offline.export.gguf.families`.
        lora: file of the adapter, if one is wanted.
        say: told of what is lost or larger than one may think.

    Returns:
        The files.

    Raises:
        SvskFormatError: the checkpoint is damaged.
        SvskError: GGUF cannot hold it exactly, or a file cannot be read or written.
    """
    source = open_sound(checkpoint)
    _require_no_experts(source)
    adapted = _adapted(source, wanted=lora is not None)
    plan = family_plan(source) if template is None else template_plan(source, template)
    _warn(source, say, lora=lora is not None)
    write_gguf(out, plan.architecture, plan.describe, plan.tensors)
    if lora is None:
        return [out]
    tensors = [
        tensor
        for module in adapted
        for tensor in _adapter_tensors(source, module, plan.placed[module])
    ]
    write_gguf(lora, plan.architecture, _describe_adapter, tensors)
    return [out, lora]


def _require_no_experts(source: Checkpoint) -> None:
    expert = next((name for name in source.linears if ".experts." in name), None)
    key = next((key for key in _EXPERTS if source.hf_config.get(key)), None)
    if expert or key:
        raise SvskError(
            f"{source.folder}: {expert or key}: mixtures of experts are not exported to GGUF, which"
            " stacks their matrices. Export with `--to dense`, and convert that with llama.cpp."
        )


def _adapted(source: Checkpoint, *, wanted: bool) -> list[str]:
    """The modules with a sidecar for the adapter.

    Raises:
        SvskError: there is none, or one that an adapter cannot hold.
    """
    adapted = [name for name, spec in source.linears.items() if spec.rank]
    if not wanted:
        return []
    if not adapted:
        raise SvskError(f"--lora: {source.folder} has no sidecar. Leave --lora out.")
    for name in adapted:
        if source.config.is_embedding(name):
            # llama.cpp takes the factors of an embedding the other way round, and of a tied one
            # both ways
            raise SvskError(
                f"--lora: {name}: an adapter cannot hold the sidecar of an embedding. Quantise with"
                " `--head int8` or `--head dense`, or leave --lora out and lose all sidecars."
            )
        require_small(source.linears[name])
    return adapted


def _warn(source: Checkpoint, say: Callable[[str], None], *, lora: bool) -> None:
    specs = source.linears.values()
    large = [spec for spec in specs if spec.scheme.weights.codebook == "quad8"]
    if large:
        bits = 8 * BLOCK_BYTES[TYPE_OF["quad8"]] / BLOCK
        size = sum(spec.num_weights for spec in large) * bits / 8e6
        say(
            f"{len(large)} linears have the codebook quad8, which only Q8_0 holds exactly:"
            f" {bits} bits per weight, {size:.0f} MB. `--codebook int4` takes 4.5."
        )
    dropped = sum(spec.rank > 0 for spec in specs)
    if dropped and not lora:
        say(f"the sidecars of {dropped} linears are not in the file: --lora writes them as well.")


def _describe_adapter(writer: Any) -> None:
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # a factor of 1, whatever the rank


def _adapter_tensors(source: Checkpoint, module: str, placed: Placed) -> list[GgufTensor]:
    spec = source.linears[module]
    rank = adapter_rank(spec)

    def read(which: int) -> Any:
        factors = lora_factors(source.read_linear(module))
        return (factors[0], weight_in_order(factors[1], placed.order))[which].numpy()

    return [
        GgufTensor(f"{placed.name}.lora_a", "F16", (rank, spec.k), lambda: read(0)),
        GgufTensor(f"{placed.name}.lora_b", "F16", (spec.n, rank), lambda: read(1)),
    ]
