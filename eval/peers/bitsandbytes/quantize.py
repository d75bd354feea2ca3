# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes; runs in its environment as ``python -m peers.bitsandbytes.quantize JOB``."""

import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peers.common import (
    Job,
    PeerError,
    Result,
    StoredLinear,
    all_bits,
    block_linears,
    load_folder,
    run_job,
    stored_bits,
    versions,
)

PARTS = ("weight", "weight.absmax", "weight.nested_absmax")
"""What is counted.

Not so the two tables of levels, which are the same for every layer, and the description.
"""

STATE = "weight.quant_state.bitsandbytes__nf4"


def quantize(job: Job) -> Result:
    """Quantise the linears of the decoder blocks, save the checkpoint, and read it back."""
    names = block_linears(load_folder(job.model))
    started = time.monotonic()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.settings["quant_type"],
        bnb_4bit_use_double_quant=job.settings["double_quantization"],
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.model, quantization_config=config, device_map="cpu", dtype="auto"
    )
    checkpoint = Path(job.work) / "checkpoint"
    model.save_pretrained(checkpoint)
    seconds = time.monotonic() - started
    stored = load_folder(checkpoint)
    linears, tensors = {}, {}
    for name in names:
        module = name.removesuffix(".weight")
        tensors[name] = dequantize(stored, module)
        linears[name] = StoredLinear(
            "nf4", tensors[name].numel(), stored_bits(stored, module, PARTS)
        )
    return Result(
        seconds,
        dict(job.settings),
        versions("bitsandbytes", "torch", "transformers"),
        linears,
        all_bits(stored),
        tensors,
        calibrated=False,
    )


def dequantize(stored: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Weight of a layer in nf4 with scales in two levels (QLoRA, arXiv 2305.14314, section 3).

    Args:
        stored: the checkpoint's tensors: ``weight`` uint8 [N K / 2, 1], the first of two codes in
            the upper four bits; ``quant_map`` float32 [16], the levels; ``absmax`` uint8
            [N K / 64], the scales' codes; ``nested_quant_map`` float32 [256], their levels;
            ``nested_absmax`` float32, a scale for 256 scales; and a description in JSON.
        module: the layer's name.

    Returns:
        float32 [N, K].

    Raises:
        PeerError: the layer is not stored so.
    """
    try:
        codes, absmax, levels, nested, outer, description = (
            stored[f"{module}.{part}"]
            for part in (
                "weight",
                "weight.absmax",
                "weight.quant_map",
                "weight.nested_quant_map",
                "weight.nested_absmax",
                STATE,
            )
        )
    except KeyError as error:
        raise PeerError(
            f"{module}: the checkpoint has no {error.args[0]}; was the layer quantised?"
        ) from error
    state = json.loads(bytes(description.tolist()))
    scales = nested[absmax.long()]
    scales = scales * outer.repeat_interleave(state["nested_blocksize"])[: scales.numel()]
    scales = scales + state["nested_offset"]
    values = levels[torch.stack([codes >> 4, codes & 15], dim=-1).flatten().long()]
    size = state["blocksize"]
    if values.numel() != scales.numel() * size:
        raise PeerError(
            f"{module}: {values.numel()} codes do not fit {scales.numel()} scales of {size}."
        )
    weight: torch.Tensor = (values.view(-1, size) * scales.unsqueeze(1)).view(state["shape"])
    return weight


if __name__ == "__main__":
    run_job(quantize)
