# SPDX-License-Identifier: Apache-2.0
"""The package's weights against those of a decoder that was written from docs/format.md alone."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from svsk_vllm.format import Checkpoint, dequantize
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.format_builders import build_small_checkpoint
from tests.support.independent_decoder import decode, read_folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scale_bits", get_args(ScaleBits))
@pytest.mark.parametrize(
    ("tables", "hot_rows"),
    [(False, 0), (True, 0), (True, 7)],
    ids=["dense tables", "int8 tables", "tables with hot rows"],
)
def test_the_page_and_the_package_give_the_same_weights(
    tmp_path: Path,
    shards: int,
    dtype: torch.dtype,
    scale_bits: ScaleBits,
    tables: bool,
    hot_rows: int,
) -> None:
    small = build_small_checkpoint(
        tmp_path, shards, dtype, scale_bits, tables=tables, hot_rows=hot_rows
    )
    config, tensors = read_folder(tmp_path)
    modules = [
        name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")
    ]
    assert set(modules) == set(small.linears)
    assert len(modules) == (5 if tables else 3)
    checkpoint = Checkpoint(tmp_path)
    for name in modules:
        ours = dequantize(checkpoint.read_linear(name)).double().numpy()
        # float32 against float64: weights are of the order of 0.1, 1e-6 is far below any one term
        np.testing.assert_allclose(ours, decode(config, tensors, name), rtol=1e-5, atol=1e-6)
    for name, dense in small.dense.items():
        np.testing.assert_array_equal(tensors[name], dense.float().numpy())


def test_keys_that_are_left_out_have_the_defaults_of_the_page(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path)
    (base,) = [name for name, linear in small.linears.items() if linear.spec.rank == 0]
    full = dequantize(Checkpoint(tmp_path).read_linear(base))

    def shorten(hf_config: dict[str, Any]) -> None:
        for key in ("format", "producer"):
            hf_config["quantization_config"].pop(key)
        hf_config["quantization_config"]["config_groups"]["base"] = {"targets": ["Linear"]}

    small.edit_config(shorten)
    assert torch.equal(dequantize(Checkpoint(tmp_path).read_linear(base)), full)
    np.testing.assert_allclose(
        full.double().numpy(), decode(*read_folder(tmp_path), base), rtol=1e-5, atol=1e-6
    )
