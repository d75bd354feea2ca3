# SPDX-License-Identifier: Apache-2.0
"""The quantiser's kernel as compiled for a GPU, run on the CPU, against the CPU's own loop."""

import os

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from svsk_kernel_tools.emulator.driver import emulated
from svsk_kernels.gpu.error_feedback import feedback_block
from svsk_offline.quantizers.error_feedback import Levels, round_in_a_loop


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("batch", "count", "n", "levels", "descent"),
    [
        (1, 128, 40, Levels(), False),
        (1, 48, 33, Levels(codebook="quad8"), True),
        (2, 32, 20, Levels(-127, 127), False),
    ],
)
def test_compiled_kernel_is_the_loop(
    arch: int, batch: int, count: int, n: int, levels: Levels, descent: bool
) -> None:
    """A ratio as good as on a border may fall the other way, and change its row from there on."""
    generator = torch.Generator().manual_seed(count)
    work = torch.randn(batch, count, n, generator=generator) * 3
    coupling = (torch.randn(batch, count, count, generator=generator) * 0.3 / count**0.5).triu(1)
    pivots = 0.5 + torch.rand(batch, count, generator=generator)
    scale = 0.1 + torch.rand(batch, 1, n, generator=generator).expand(batch, count, n)
    values = torch.randn(batch, count, n, generator=generator) if descent else None
    expected, errors = round_in_a_loop(work.clone(), coupling, pivots, scale, levels, values)
    with emulated(arch) as gpu:
        found, found_errors = feedback_block(
            work,
            coupling,
            pivots,
            scale,
            levels.low,
            levels.high,
            levels.codebook == "quad8",
            values,
        )
    assert [launch.kernel for launch in gpu.launches] == ["feedback_kernel"]
    same = (found == expected).cumprod(1).bool()
    assert float(same.float().mean()) > 0.9
    assert float((found == expected).float().mean()) > 0.95
    torch.testing.assert_close(found_errors[same], errors[same], rtol=1e-4, atol=1e-4)
