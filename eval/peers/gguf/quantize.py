# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's Q4_K_M; runs in its environment as ``python -m peers.gguf.quantize JOB``."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peers.common import (
    Job,
    Result,
    StoredLinear,
    block_linears,
    load_folder,
    load_tokens,
    run_job,
    versions,
)
from peers.gguf.convert import from_gguf, gguf_names, to_gguf
from peers.gguf.llama_cpp import LlamaCpp

PACKAGE = Path("node_modules", "@node-llama-cpp", "linux-x64")
LIBRARIES = Path("bins", "linux-x64")


def quantize(job: Job) -> Result:
    """Convert the model to GGUF, quantise it with llama.cpp, and read it back."""
    package = Path(job.environment) / PACKAGE
    tensors = load_folder(job.model)
    names = block_linears(tensors)
    file_type, use_imatrix = str(job.settings["file_type"]), bool(job.settings.get("imatrix"))
    plain = final = Path(job.work) / "model-f32.gguf"
    to_gguf(job.model, tensors, plain)
    used = versions("gguf", "torch", "transformers")
    notes = []
    started = time.monotonic()
    if file_type != "F32":
        llama_cpp = LlamaCpp(package / LIBRARIES)
        imatrix = importance(job, names) if use_imatrix else None
        final = Path(job.work) / "model.gguf"
        llama_cpp.quantize(plain, final, file_type, imatrix)
        released = json.loads((package / "package.json").read_text(encoding="utf-8"))
        used |= {"llama.cpp": llama_cpp.version, str(released["name"]): str(released["version"])}
        notes.append(
            "llama.cpp's quantisation of the embeddings is not used: they are the reference's."
        )
    if use_imatrix:
        notes.append(
            "The importance matrix holds the mean squares llama-imatrix collects,"
            " computed with torch."
        )
    seconds = time.monotonic() - started
    stored = from_gguf(final, job.model, list(tensors))
    linears = {
        name: StoredLinear(stored[name][0], tensors[name].numel(), stored[name][1])
        for name in names
    }
    settings: dict[str, Any] = dict(job.settings)
    # Nothing is said of the embeddings' bits but this: they are not counted.
    kind, bits, _ = stored["model.embed_tokens.weight"]
    settings["embeddings_not_used"] = {"type": kind, "bits": bits}
    weights = {name: stored[name][2] for name in (tensors if file_type == "F32" else names)}
    return Result(seconds, settings, used, linears, weights, notes, calibrated=use_imatrix)


@torch.inference_mode()
def importance(job: Job, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean square of each linear's inputs over the calibration tokens, as llama-imatrix has it.

    Args:
        job: names the model and the tokens.
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
    table = gguf_names(names, model.config.num_hidden_layers)
    return {table[name]: (total / tokens.numel()).float() for name, total in sums.items()}


if __name__ == "__main__":
    run_job(quantize)
