# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's file types; runs in its environment as ``python -m peers.gguf.quantize JOB``."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peers.common import (
    TABLES,
    Job,
    Result,
    StoredLinear,
    block_linears,
    load_folder,
    load_tokens,
    run_job,
    versions,
)
from peers.gguf.convert import Family, from_gguf, to_gguf
from peers.gguf.llama_cpp import LlamaCpp

PACKAGE = Path("node_modules", "@node-llama-cpp", "linux-x64")
LIBRARIES = Path("bins", "linux-x64")


def quantize(job: Job) -> Result:
    """Convert the model to GGUF, quantise it with llama.cpp, and read it back."""
    package = Path(job.environment) / PACKAGE
    tensors, family = load_folder(job.model), Family.of(job.model)
    names = block_linears(tensors)
    file_type, use_imatrix = str(job.settings["file_type"]), bool(job.settings.get("imatrix"))
    plain = final = Path(job.work) / "model-f32.gguf"
    to_gguf(family, tensors, plain)
    used = versions("gguf", "torch", "transformers")
    notes = []
    started = time.monotonic()
    if file_type != "F32":
        llama_cpp = LlamaCpp(package / LIBRARIES)
        imatrix = kept_importance(job, family, names) if use_imatrix else None
        final = Path(job.work) / "model.gguf"
        llama_cpp.quantize(plain, final, file_type, imatrix)
        released = json.loads((package / "package.json").read_text(encoding="utf-8"))
        used |= {"llama.cpp": llama_cpp.version, str(released["name"]): str(released["version"])}
    if use_imatrix:
        notes.append(
            "The importance matrix holds the mean squares llama-imatrix collects,"
            " computed with torch."
        )
    seconds = time.monotonic() - started
    stored = from_gguf(final, family, list(tensors))
    held = {
        name: StoredLinear(stored[name][0], tensors[name].numel(), stored[name][1])
        for name in (*names, *TABLES)
        if name in stored
    }
    kept = list(tensors if file_type == "F32" else held)
    return Result(
        seconds,
        dict(job.settings),
        used,
        {name: held.pop(name) for name in names},
        sum(bits for _, bits, _ in stored.values()),
        {name: stored[name][2] for name in kept},
        notes,
        tables=held,
        calibrated=use_imatrix,
    )


def kept_importance(job: Job, family: Family, names: list[str]) -> dict[str, torch.Tensor]:
    """The importance matrix of the file that keeps it, or computed, and then kept there."""
    if job.measured is None:
        return importance(job, family, names)
    path = Path(job.measured)
    if not path.exists():
        half = path.with_name(f".{path.name}.tmp")
        save_file(importance(job, family, names), half)
        half.rename(path)
    return load_file(path)


@torch.inference_mode()
def importance(job: Job, family: Family, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean square of each linear's inputs over the calibration tokens, as llama-imatrix has it.

    Args:
        job: names the model and the tokens.
        family: GGUF's names for it.
        names: Hugging Face names of the linears' weights.

    Returns:
        GGUF name of the weight -> float32 [K].
    """
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def collect(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] += inputs[0].flatten(0, -2).double().square().sum(0)

        return hook

    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        sums[name] = torch.zeros(layer.in_features, dtype=torch.float64)
        layer.register_forward_pre_hook(collect(name))
    tokens = load_tokens(job.tokens)
    for sample in tokens:
        model.model(input_ids=sample.unsqueeze(0), use_cache=False)
    table = family.names(names)
    return {table[name]: (total / tokens.numel()).float() for name, total in sums.items()}


if __name__ == "__main__":
    run_job(quantize)
