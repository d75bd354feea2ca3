# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder needs a machine without a GPU: with one, run the real thing."""

import pytest
import torch

from svsk_kernels.gpu.matmul_op import gpu_of


@pytest.fixture(autouse=True)
def no_real_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    gpu_of.cache_clear()  # nothing of a simulated GPU is kept for other tests, or from them
