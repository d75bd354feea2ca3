# SPDX-License-Identifier: Apache-2.0
"""auto-round; runs in its environment as ``python -m peers.auto_round.quantize JOB``."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    unpack_nibbles,
    versions,
)

PARTS = ("qweight", "scales", "qzeros", "g_idx")
PACKING = "auto_round:auto_gptq"
"""The package's own choice for symmetric weights: GPTQ's layout, zero points stored less one."""


def quantize(job: Job) -> Result:
    """Quantise the linears of the decoder blocks, save the checkpoint, and read it back."""
    tokens = load_tokens(job.tokens)
    names = block_linears(load_folder(job.model))
    batch = int(job.settings["batch_size"])
    started = time.monotonic()
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"),
        AutoTokenizer.from_pretrained(job.model),
        scheme=job.settings["scheme"],
        group_size=job.group_size,
        dataset=list(tokens.split(batch)),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        iters=job.settings["iters"],
        lr=job.settings["lr"],
        batch_size=batch,
        seed=job.seed,
        device_map="cpu",
        enable_torch_compile=False,
    )
    _, folders = rounder.quantize_and_save(str(Path(job.work) / "checkpoint"), format="auto_round")
    seconds = time.monotonic() - started
    folder = Path(folders[0] if isinstance(folders, list) else folders)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if config["packing_format"] != PACKING or not config["sym"] or config["bits"] != 4:
        raise PeerError(
            f"{folder}: packed as {config['packing_format']}, expected symmetric 4-bit {PACKING}."
        )
    stored = load_folder(folder)
    linears, tensors = {}, {}
    for name in names:
        module = name.removesuffix(".weight")
        tensors[name] = dequantize(stored, module, job.group_size)
        kind = f"int4 g{job.group_size} symmetric"
        linears[name] = StoredLinear(
            kind, tensors[name].numel(), stored_bits(stored, module, PARTS)
        )
    settings: dict[str, Any] = job.settings | {
        "packing_format": PACKING,
        "dtype": "bfloat16 with autocast",
    }
    used = versions("auto-round", "torch", "transformers")
    notes = []
    if job.settings["iters"] != 200:
        notes.append(
            "The package's light recipe:"
            f" {job.settings['iters']} iterations instead of the default 200."
        )
    return Result(seconds, settings, used, linears, all_bits(stored), tensors, notes)


def dequantize(stored: dict[str, torch.Tensor], module: str, group_size: int) -> torch.Tensor:
    """Weight of a layer in GPTQ's layout.

    Args:
        stored: the checkpoint's tensors: ``qweight`` int32 [K / 8, N], ``scales`` [groups, N],
            ``qzeros`` int32 [groups, N / 8].
        module: the layer's name.
        group_size: weights per scale.

    Returns:
        float32 [N, K].

    Raises:
        PeerError: the layer is not stored so.
    """
    try:
        packed, scales, zeros = (
            stored[f"{module}.{part}"] for part in ("qweight", "scales", "qzeros")
        )
    except KeyError as error:
        raise PeerError(
            f"{module}: the checkpoint has no {error.args[0]}; was the layer quantised?"
        ) from error
    codes = unpack_nibbles(packed.t().contiguous()).float()
    points = (unpack_nibbles(zeros).t() + 1).float()
    scale = scales.t().float()
    if scale.shape != points.shape or scale.shape[1] * group_size != codes.shape[1]:
        raise PeerError(
            f"{module}: {list(scale.shape)} scales do not fit"
            f" {list(codes.shape)} in groups {group_size}."
        )
    points, scale = (part.repeat_interleave(group_size, dim=1) for part in (points, scale))
    return (codes - points) * scale


if __name__ == "__main__":
    run_job(quantize)
