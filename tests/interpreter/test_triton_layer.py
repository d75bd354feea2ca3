# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind the seam that the vLLM plugin uses."""

import pytest
import torch

pytest.importorskip("compressed_tensors.compressors", reason="layers are packed as checkpoints are")

from svsk_kernels import LayerSpec, TritonKernel, naive_matmul
from svsk_vllm.format import LinearSpec
from tests.interpreter.layers import BOUNDS, activations, relative_error
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rank", "tile_n", "bits", "packed_bits"), [(0, 0, 8, 8), (8, 0, 4, 4), (8, 40, 4, 8), (5, 64, 8, 8)]
)
def test_loaded_layer(rank: int, tile_n: int, bits: int, packed_bits: int) -> None:
    """4-bit factors are packed again only where tiles are aligned; the same parameters can be loaded and run twice."""
    group = make_group(rank=rank, tile_m=48, tile_n=tile_n, num_bits=bits)
    source = random_linear(LinearSpec("m", 100, 128, group, torch.float16), 0)
    x, bias = activations(3, 128, torch.float16), torch.randn(100).half()
    expected = naive_matmul(x, source, bias)
    answers = []
    for _ in range(2):
        spec, layer = loaded_layer(source, torch.float16)
        spec = LayerSpec(**{**vars(spec), "factor_bits": bits})
        kernel = TritonKernel(spec, CPU)
        assert kernel.matmul.shape.num_bits == packed_bits
        kernel.prepare(layer)
        answers.append(kernel(layer, x, bias))
    assert relative_error(answers[0], expected) < BOUNDS[torch.float16]
    assert torch.equal(*answers)


def test_refusal_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"activations are torch\.float32"):
        TritonKernel(LayerSpec(64, 64, 64, "int4", torch.float32), CPU)
