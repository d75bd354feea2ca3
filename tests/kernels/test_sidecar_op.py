# SPDX-License-Identifier: Apache-2.0
"""The sidecar op and the layout of a layer's shards, against the reference in float64.

The layout code is the plugin's, but it needs nothing of vLLM here: rows and columns are given
instead of probed.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_kernel_tools.stack_linears import stack_linears
from svsk_kernels.cpu.processor import product_dtype
from svsk_kernels.naive import naive_matmul, naive_sidecar
from svsk_kernels.sidecar_op import prepare_sidecar, sidecar_matmul
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup
from svsk_vllm.format import LinearSpec, QuantizedLinear, dequantize
from tests.support.format_builders import make_group, property_test, random_linear


def linear(
    n: int, k: int, rank: int, tile_m: int, tile_n: int, seed: int = 0, num_bits: int = 8
) -> QuantizedLinear:
    group = make_group(rank=rank, tile_m=tile_m, tile_n=tile_n, group_size=32, num_bits=num_bits)
    return random_linear(LinearSpec("m.proj", n, k, group), seed)


def runtime_tensors(
    layer: QuantizedLinear, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SidecarPlan]:
    """Run-time tensors of a whole, unfused layer."""
    stacked = stack_linears([layer.plain])
    assert stacked.spec.plan is not None
    return *prepare_sidecar(stacked.u, stacked.v, stacked.gain, dtype), stacked.spec.plan


@pytest.mark.parametrize(
    ("n", "k", "rank", "tile_m", "tile_n"),
    [
        (64, 64, 16, 0, 0),
        (100, 96, 3, 48, 0),
        (100, 96, 1, 0, 40),
        (33, 160, 8, 16, 48),
        (96, 96, 5, 512, 1024),
        (7, 32, 128, 3, 5),
        (50, 96, 131, 0, 0),
        (33, 64, 512, 20, 40),
    ],
)
@pytest.mark.parametrize("m", [1, 3, 17])
def test_op_equals_reference(n: int, k: int, rank: int, tile_m: int, tile_n: int, m: int) -> None:
    layer = linear(n, k, rank, tile_m, tile_n)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    u, v, gain, plan = runtime_tensors(layer, torch.float32)
    y = torch.ops.svsk.sidecar(x, u, v, gain, plan.encode())
    torch.testing.assert_close(y.double(), naive_sidecar(x, layer.plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_sixteen_bit_error_is_that_of_rounding(dtype: torch.dtype, bound: float) -> None:
    layer = linear(96, 160, 16, 48, 96)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    u, v, gain, plan = runtime_tensors(layer, product_dtype(dtype, x.device))
    y = sidecar_matmul(x, u, v, gain, plan.encode())
    expected = naive_sidecar(x, layer.plain)
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < bound


def test_large_float16_activations_do_not_overflow() -> None:
    layer = linear(32, 64, 8, 0, 0)
    x = torch.full((2, 64), 2000.0, dtype=torch.float16)
    u, v, gain, plan = runtime_tensors(layer, product_dtype(torch.float16, x.device))
    assert torch.isfinite(sidecar_matmul(x * 1e-2, u, v, gain, plan.encode())).all()
    assert layer.v is not None
    assert (
        float((x.float() @ layer.v[0].float().T).abs().max()) > 65504
    )  # plain integers would overflow


def test_rows_without_sidecar_are_zero_and_bundles_add_up() -> None:
    """Two parts with different column tiles, and rows between them that belong to neither."""
    first, second = linear(8, 64, 2, 4, 48, seed=1), linear(6, 64, 3, 0, 32, seed=2)
    u1, v1, g1, plan1 = runtime_tensors(first, torch.float32)
    u2, v2, g2, plan2 = runtime_tensors(second, torch.float32)
    moved = Bundle(plan2.bundles[0].bounds, (SlotGroup(1, 6, 3, 10),))
    plan = SidecarPlan(16, (plan1.bundles[0], moved))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    y = sidecar_matmul(
        x, torch.cat([u1, u2]), torch.cat([v1, v2]), torch.cat([g1, g2]), plan.encode()
    ).double()
    torch.testing.assert_close(y[:, :8], naive_sidecar(x, first.plain), rtol=1e-5, atol=1e-5)
    assert not y[:, 8:10].any()
    torch.testing.assert_close(y[:, 10:], naive_sidecar(x, second.plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [0, 1, 4])
def test_fake_has_the_strides_of_the_real_op(m: int) -> None:
    layer = linear(100, 96, 3, 48, 40)
    u, v, gain, plan = runtime_tensors(layer, torch.float32)
    x = torch.randn(m, 96)
    real = torch.ops.svsk.sidecar(x, u, v, gain, plan.encode())
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.svsk.sidecar(
            *(mode.from_tensor(t) for t in (x, u, v, gain)), plan.encode()
        )
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_op_passes_torch_checks_and_compiles() -> None:
    layer = linear(33, 64, 4, 16, 48)
    u, v, gain, plan = runtime_tensors(layer, torch.float32)
    x = torch.randn(6, 64)
    torch.library.opcheck(torch.ops.svsk.sidecar.default, (x, u, v, gain, plan.encode()))
    compiled = torch.compile(
        lambda a: torch.ops.svsk.sidecar(a, u, v, gain, plan.encode()) * 2, dynamic=True
    )
    torch.testing.assert_close(compiled(x), sidecar_matmul(x, u, v, gain, plan.encode()) * 2)


def test_non_contiguous_activations() -> None:
    layer = linear(32, 64, 4, 16, 48)
    u, v, gain, plan = runtime_tensors(layer, torch.float32)
    x = torch.randn(64, 5).T
    torch.testing.assert_close(
        sidecar_matmul(x, u, v, gain, plan.encode()),
        sidecar_matmul(x.contiguous(), u, v, gain, plan.encode()),
    )


@property_test
@given(
    n=st.integers(1, 2000),
    bundles=st.lists(
        st.tuples(
            st.lists(st.integers(1, 300), min_size=1, max_size=4),
            st.lists(
                st.tuples(st.integers(1, 9), st.integers(1, 64), st.integers(1, 128)),
                min_size=1,
                max_size=4,
            ),
        ),
        max_size=3,
    ),
)
def test_plan_survives_encoding(
    n: int, bundles: list[tuple[list[int], list[tuple[int, int, int]]]]
) -> None:
    plan = SidecarPlan(
        n,
        tuple(
            Bundle(
                (0, *itertools.accumulate(widths)), tuple(SlotGroup(*group, 0) for group in groups)
            )
            for widths, groups in bundles
        ),
    )
    assert SidecarPlan.decode(plan.encode()) == plan


def test_naive_matmul_is_the_product_with_the_reference_weight() -> None:
    layer = linear(40, 96, 5, 16, 40)
    x = torch.randn(3, 96)
    bias = torch.randn(40)
    expected = x.double() @ dequantize(layer).double().T + bias.double()
    torch.testing.assert_close(naive_matmul(x, layer.plain, bias), expected, rtol=1e-5, atol=1e-5)
