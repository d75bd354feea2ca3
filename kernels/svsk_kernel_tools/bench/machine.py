# SPDX-License-Identifier: Apache-2.0
"""What a report says about the machine and the code it ran."""

import hashlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils.collect_env import get_nvidia_driver_version, run

import svsk_kernels
from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernels.gpu.matmul_op import gpu_of

__all__ = ["describe", "open_device", "source_hash"]


def open_device(name: str) -> torch.device:
    """The device to run on.

    Args:
        name: ``cuda``, ``cuda:1``, ..., or ``cpu`` for Triton's interpreter.

    Raises:
        BenchError: it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device {name}: expected cuda, cuda:0 and so on, or cpu.") from error
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise BenchError(
                "--device cpu: Triton was imported without its interpreter; set TRITON_INTERPRET=1."
            )
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BenchError(
            f"--device {name}: torch finds no such GPU. Use --device cpu to run the checks without"
            " one."
        )
    if triton.knobs.runtime.interpret:
        raise BenchError(
            f"--device {name}: TRITON_INTERPRET is set, which needs --device cpu; unset it."
        )
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Name and versions, as JSON values."""
    gpu = gpu_of(device)
    found: dict[str, Any] = {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "processors": gpu.processors,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "source": source_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(("python -m svsk_kernel_tools.bench", *sys.argv[1:])),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": get_nvidia_driver_version(run) or "unknown",
        }
    return found


def source_hash() -> str:
    """First digits of the SHA-256 over the kernels' sources.

    Results of different ones do not belong in one report.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(svsk_kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
