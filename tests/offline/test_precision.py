# SPDX-License-Identifier: Apache-2.0
"""Float32 products are in float32 while a model is quantised."""

import os
import subprocess
import sys

import pytest
import torch

from svsk_offline.precision import full_float32


@pytest.mark.parametrize("before", ["high", "medium"])
def test_lower_precision_is_lifted_and_comes_back(before: str) -> None:
    said: list[str] = []
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyError), full_float32(said.append):
            raise KeyError(torch.get_float32_matmul_precision())
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(said) == 1
    assert before in said[0]


def test_nothing_is_said_of_full_precision() -> None:
    said: list[str] = []
    with full_float32(said.append):
        assert torch.get_float32_matmul_precision() == "highest"
    assert not said


def test_variable_of_containers_is_named() -> None:
    """PyTorch reads it when it starts, so in a process of its own."""
    script = (
        "import torch\nfrom svsk_offline.precision import full_float32\n"
        "with full_float32(print):\n    print(torch.get_float32_matmul_precision())"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in output[0]
    assert output[1] == "highest"
