# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind the seam that the vLLM plugin uses."""

import pytest
import torch

pytest.importorskip("compressed_tensors.compressors", reason="layers are packed as checkpoints are")

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerSpec
from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import LinearSpec
from tests.interpreter.layers import BOUNDS, activations
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rank", "tile_n", "bits", "packed_bits"),
    [(0, 0, 8, 8), (8, 0, 4, 4), (8, 40, 4, 8), (5, 64, 8, 8)],
)
def test_loaded_layer(rank: int, tile_n: int, bits: int, packed_bits: int) -> None:
    """4-bit factors are packed again only where tiles are aligned.

    The same parameters can be loaded and run twice.
    """
    group = make_group(rank=rank, tile_m=48, tile_n=tile_n, num_bits=bits)
    source = random_linear(LinearSpec("m", 100, 128, group, torch.float16), 0)
    x, bias = activations(3, 128, torch.float16), torch.randn(100).half()
    expected = naive_matmul(x, source.plain, bias)
    answers = []
    for _ in range(2):
        spec, layer = loaded_layer(source, torch.float16)
        assert spec.factor_bits == bits
        kernel = TritonKernel(spec, CPU)
        assert kernel.matmul.spec.factor_bits == packed_bits
        kernel.prepare(layer)
        answers.append(kernel(layer, x, bias))
    assert relative_error(answers[0], expected) < BOUNDS[torch.float16]
    assert torch.equal(*answers)


@pytest.mark.parametrize("rank", [0, 8])
def test_layer_compiles_to_one_op_for_any_number_of_tokens(rank: int) -> None:
    source = random_linear(LinearSpec("m", 40, 64, make_group(rank=rank), torch.float16), 0)
    spec, layer = loaded_layer(source, torch.float16)
    kernel = TritonKernel(spec, CPU)
    kernel.prepare(layer)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernel(layer, x, None), backend="eager", fullgraph=True, dynamic=True
    )
    for m in (2, 5):
        x = activations(m, 64, torch.float16)
        assert torch.equal(compiled(x), kernel(layer, x, None))


def test_run_time_tensors_do_not_depend_on_the_default_dtype() -> None:
    """An inference engine loads models under the model's dtype as the default."""
    source = random_linear(LinearSpec("m", 40, 64, make_group(rank=8), torch.float16), 0)
    prepared = []
    for default in (torch.float32, torch.float16):
        spec, layer = loaded_layer(source, torch.float16)
        torch.set_default_dtype(default)
        try:
            TritonKernel(spec, CPU).prepare(layer)
        finally:
            torch.set_default_dtype(torch.float32)
        prepared.append(dict(layer.named_parameters()))
    for name, tensor in prepared[0].items():
        assert prepared[1][name].dtype == tensor.dtype
        assert torch.equal(prepared[1][name], tensor)


def test_refusal_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"activations are torch\.float32"):
        TritonKernel(LayerSpec(64, 64, 64, "int4", torch.float32), CPU)
