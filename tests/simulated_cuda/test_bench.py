# SPDX-License-Identifier: Apache-2.0
"""The kernels' benchmark on a simulated GPU as far as it goes without launching.

Device, report, vLLM's Marlin.

The launches are in ``tests/interpreter/test_simulated_cuda.py``.
"""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")

from vllm import _custom_ops
from vllm.model_executor.layers.quantization.utils import marlin_utils

from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.layers import Part, random_layer
from svsk_kernel_tools.bench.machine import describe, open_device
from svsk_kernel_tools.bench.split import SplitLayer
from svsk_kernels.naive import naive_matmul
from tests.support.simulated_cuda import GPU_NAME, on_gpu, simulated_cuda

GPU = torch.device("cuda", 0)


def test_the_machine_is_described() -> None:
    with pytest.raises(BenchError, match="finds no such GPU"):
        open_device("cuda")
    with simulated_cuda():
        assert open_device("cuda") == GPU
        found = describe(GPU)
    assert (found["gpu"], found["capability"], found["processors"]) == (GPU_NAME, 90, 132)
    assert found["l2_bytes"] == 50 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_marlin_gets_all_its_tensors_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    calls: list[dict[str, Any]] = []

    def repack(**arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return arguments["b_q_weight"].clone()

    def product(**arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        y = naive_matmul(arguments["input"], linear).to(dtype)
        assert arguments["output_size_per_partition"] == y.shape[1]
        return y

    for module, name, fake in (
        (_custom_ops, "gptq_marlin_repack", repack),
        (marlin_utils, "apply_gptq_marlin_linear", product),
    ):
        monkeypatch.setattr(module, name, functools.wraps(getattr(module, name))(fake))
    with simulated_cuda():
        layer = random_layer(256, dtype, GPU, [Part(128)])
        linear = layer.linears[0]
        made = SplitLayer.checked(layer)
        assert isinstance(made, SplitLayer), made
        assert all(map(on_gpu, (*made.base.values(), *made.copy().base.values())))
        tensors = [
            value for call in calls for value in call.values() if isinstance(value, torch.Tensor)
        ]
        assert len(tensors) >= 5
        assert all(map(on_gpu, tensors))
