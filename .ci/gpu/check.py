# SPDX-License-Identifier: Apache-2.0
"""Import what vLLM 0.26 imports to serve a dense model on a Hopper GPU, and print what was found.

Install.py calls it.

Many of these modules are imported late, inside of functions: an engine would fail on them after
minutes.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from importlib import metadata

__all__ = ["MODULES", "failures", "main"]

MODULES = (
    "vllm",
    "vllm.platforms.cuda",
    "vllm._custom_ops",
    "vllm.vllm_flash_attn",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.structured_output",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.warmup",
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.sample.ops.topk_topp_sampler",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.model_executor.warmup.minimax_m3_msa_warmup",
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.compilation.backends",
    "vllm.compilation.cuda_graph",
    "vllm.device_allocator.cumem",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
)

DISTRIBUTIONS = (
    "vllm",
    "svsk-vllm",
    "torch",
    "triton",
    "transformers",
    "compressed-tensors",
    "pydantic",
    "numpy",
)


def failures(modules: tuple[str, ...]) -> dict[str, str]:
    """Modules that cannot be imported, and why."""
    found: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _kernels() -> list[str]:
    """What the engine would find on this machine, and what is wrong about it."""
    import torch
    from vllm.platforms import current_platform
    from vllm.vllm_flash_attn import flash_attn_interface as flash

    if not flash.FA3_AVAILABLE:
        return [f"FlashAttention 3: {flash.FA3_UNAVAILABLE_REASON}"]
    for name in ("marlin_gemm", "gptq_marlin_repack", "machete_mm"):
        if not hasattr(torch.ops._C, name):
            return [f"torch.ops._C.{name} is not there"]
    if not current_platform.is_cuda():
        print("no GPU: vLLM's kernels are there, whether they run was not tried")
        return []
    device = current_platform.get_device_name()
    capability = current_platform.get_device_capability()
    print(f"{device}, capability {capability}")
    if capability.major != 9:
        return [
            f"compute capability {capability}: without FlashAttention 2 the bundle is for 9.0 only"
        ]
    return []


def main() -> int:
    """Print versions and failures; 1 if there are any."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    start = time.monotonic()
    versions = {
        dist.metadata["Name"]: dist.version for dist in reversed(list(metadata.distributions()))
    }
    print(
        ", ".join(f"{name} {versions.get(name, 'is not there')}" for name in DISTRIBUTIONS),
        flush=True,
    )
    plugins = [entry.value for entry in metadata.entry_points(group="vllm.general_plugins")]
    print(f"plugins of vLLM: {', '.join(plugins) or 'none'}", flush=True)
    wrong = [f"{name}: {reason}" for name, reason in failures(MODULES).items()] or _kernels()
    for line in wrong:
        print(f"FAILED {line}")
    print(
        f"{len(MODULES)} modules in {time.monotonic() - start:.0f} s:"
        f" {'FAILED' if wrong else 'all imported'}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
