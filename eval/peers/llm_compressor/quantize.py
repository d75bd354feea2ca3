# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ of llm-compressor.

Runs in its environment as ``python -m peers.llm_compressor.quantize JOB``.
"""

import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM

from peers.common import (
    Job,
    PeerError,
    Result,
    StoredLinear,
    all_bits,
    block_linears,
    load_folder,
    load_tokens,
    run_job,
    stored_bits,
    versions,
)

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
"""What is counted; ``weight_shape``, two integers for each layer, is not."""

SHOWN = ("block_size", "dampening_frac", "actorder", "n_grid", "duo_scaling")
"""Settings of the methods that peer.json shows, the package's defaults where PEERS says nothing."""


def quantize(job: Job) -> Result:
    """Quantise the linears of the decoder blocks, save the checkpoint, and read it back."""
    tokens = load_tokens(job.tokens)
    names = block_linears(load_folder(job.model))
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.settings["dtype"])
    rows, modifiers = tokens.tolist(), recipe(job)
    if not torch.accelerator.is_available():
        # 0.14's AWQ pins memory for copies to an accelerator even where there is none, which torch
        # refuses.
        IntermediatesCache.pin_memory = lambda *_: None
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        ),
        recipe=modifiers,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        shuffle_calibration_samples=False,
    )
    checkpoint = Path(job.work) / "checkpoint"
    model.save_pretrained(checkpoint, save_compressed=True)
    seconds = time.monotonic() - started
    stored = load_folder(checkpoint)
    linears, tensors = {}, {}
    for name in names:
        module = name.removesuffix(".weight")
        tensors[name] = dequantize(stored, module, job.group_size)
        kind = f"int4 g{job.group_size}" + (
            " asymmetric" if f"{module}.weight_zero_point" in stored else " symmetric"
        )
        linears[name] = StoredLinear(
            kind, tensors[name].numel(), stored_bits(stored, module, PARTS)
        )
    notes = []
    if job.peer == "awq":
        # AWQ moves its scales into the norms before the linears: both belong together.
        tensors |= {
            name: tensor for name, tensor in stored.items() if name.endswith("layernorm.weight")
        }
        notes.append(
            "AWQ's scales for q, k, v, gate and up are divided out of the blocks' norms, taken from"
            " it too."
        )
        if not torch.accelerator.is_available():
            notes.append(
                "The package's pinning of memory, which fails without an accelerator, was left out."
            )
    settings = job.settings | {
        "weights": scheme_of(job).weights.model_dump(mode="json", exclude_none=True)
    }
    settings |= {
        key: str(getattr(modifiers[0], key)) for key in SHOWN if hasattr(modifiers[0], key)
    }
    return Result(
        seconds,
        settings,
        versions("llmcompressor", "compressed-tensors", "torch", "transformers"),
        linears,
        all_bits(stored),
        tensors,
        notes,
    )


def recipe(job: Job) -> list[Any]:
    """The package's own example of the method, with this job's group size."""
    groups = {"group_0": scheme_of(job)}
    if job.peer == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if job.peer == "awq":
        return [
            AWQModifier(duo_scaling=job.settings["duo_scaling"]),
            QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
        ]
    raise PeerError(f"{job.peer}: no recipe of llm-compressor for it; there are gptq and awq.")


def scheme_of(job: Job) -> QuantizationScheme:
    """The preset of ``settings["scheme"]`` with the job's group size."""
    scheme = preset_name_to_scheme(job.settings["scheme"], ["Linear"])
    scheme.weights.group_size = job.group_size
    return scheme


def dequantize(stored: dict[str, torch.Tensor], module: str, group_size: int) -> torch.Tensor:
    """Weight of a layer of a ``pack-quantized`` checkpoint.

    Args:
        stored: the checkpoint's tensors.
        module: the layer's name.
        group_size: weights per scale.

    Returns:
        float32 [N, K].

    Raises:
        PeerError: the layer is stored in another way.
    """
    try:
        packed, scale = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"].float()
        rows, columns = (int(size) for size in stored[f"{module}.weight_shape"])
    except KeyError as error:
        raise PeerError(
            f"{module}: the checkpoint has no {error.args[0]}; was the layer quantised?"
        ) from error
    if f"{module}.weight_g_idx" in stored or scale.shape != (rows, columns // group_size):
        raise PeerError(
            f"{module}: scales {list(scale.shape)} or g_idx do not fit"
            f" consecutive groups of {group_size}."
        )
    codes: torch.Tensor = unpack_from_int32(packed, 4, torch.Size([rows, columns])).float()
    if f"{module}.weight_zero_point" in stored:
        points = unpack_from_int32(
            stored[f"{module}.weight_zero_point"], 4, scale.shape, packed_dim=0
        )
        codes = codes - points.float().repeat_interleave(group_size, dim=1)
    return codes * scale.repeat_interleave(group_size, dim=1)


if __name__ == "__main__":
    run_job(quantize)
