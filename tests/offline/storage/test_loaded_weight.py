# SPDX-License-Identifier: Apache-2.0
"""Weights of loaded blocks, and how often a run reads the model's matrices."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_offline.pipeline import quantize
from svsk_offline.recipe import load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.loaded_weight import loaded_weight
from svsk_vllm.format import ShardedReader
from tests.support.tiny_models import write_dense


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_the_values_are_the_stored_ones(
    tmp_path: Path, stored: torch.dtype, loaded: torch.dtype
) -> None:
    """Those in memory where nothing was rounded, and else those of the folder."""
    source = ModelSource(write_dense(tmp_path / "dense", "llama", dtype=stored))
    name, blocks = source.blocks
    source.load(blocks[0], f"{name}.0.", loaded, torch.device("cpu"))
    for _, full, linear in source.linears(0):
        found = loaded_weight(source, full, linear)
        assert torch.equal(found.float(), source.tensors.read(f"{full}.weight").float())
        assert (found.data_ptr() == linear.weight.data_ptr()) == (loaded in (stored, torch.float32))


def test_how_often_the_matrices_are_read(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to quantise them; under a budget that is not kept twice more, there and back.

    One reading beside these is that of a sample, which touches a page.
    """
    reads: Counter[str] = Counter()
    read = ShardedReader.read

    def counted(reader: ShardedReader, name: str) -> torch.Tensor:
        if reader.folder == tiny_llama:
            reads[name] += 1
        return read(reader, name)

    monkeypatch.setattr(ShardedReader, "read", counted)
    plain = load_recipe("fast").override(
        {"calibration": {"samples": 24, "seq_len": 32}, "sidecar": {"tile_m": 0, "tile_n": 0}}
    )
    budget = plain.override({"allocation": {"target_bpw": 4.8, "ranks": (0, 2, 4)}})
    kept: dict[str, Any] = {"measurements": tmp_path / "kept"}
    matrices = [f"{name}.weight" for name in ModelSource(tiny_llama).block_linears()]
    for number, (recipe, options, expected) in enumerate(
        ((plain, {}, 1), (budget, kept, 3), (budget, kept, 1))
    ):
        reads.clear()
        quantize(tiny_llama, tmp_path / str(number), recipe, **options)
        assert {reads[name] for name in matrices} == {1 + expected}
