# SPDX-License-Identifier: Apache-2.0
"""Scales in two levels (format 1.1): loaded as restored, and refused alike where damaged."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from svsk_offline.export.dense import restore
from svsk_vllm.architecture.folder_check import checkpoint_problems, require_sound
from svsk_vllm.format import SvskFormatError
from svsk_vllm.format.group_scales import ScaleBits
from tests.hf.loading import Q_PROJ, Tensors, assert_same, load, logits
from tests.support.format_builders import edit_tensors
from tests.support.tiny_models import scheme, write_dense, write_random_svsk

ROW_SCALE = f"{Q_PROJ}.weight_row_scale"
SCALE = f"{Q_PROJ}.weight_scale"


def two_level(folder: Path, bits: ScaleBits) -> Path:
    schemes = {"all": scheme("Linear", rank=3, group_size=16, scale_bits=bits)}
    dense = write_dense(folder / "dense", "qwen2")
    return write_random_svsk(dense, folder / "svsk", schemes=schemes)


@pytest.mark.parametrize("bits", [8, 6])
def test_loaded_as_restored(tmp_path: Path, bits: ScaleBits) -> None:
    svsk = two_level(tmp_path, bits)
    assert checkpoint_problems(svsk) == []
    model, reference = load(svsk), load(restore(svsk, tmp_path / "restored"))
    assert_same(model, reference)
    assert torch.equal(logits(model), logits(reference))
    dense = logits(load(tmp_path / "dense"))
    assert (logits(model) - dense).float().std() > 0.05  # equality is not by accident


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(ROW_SCALE), rf"{ROW_SCALE}: missing"),
        (lambda tensors: tensors.pop(SCALE), rf"{SCALE}: missing"),
        (
            lambda tensors: tensors.update({ROW_SCALE: tensors[ROW_SCALE].float()}),
            rf"{ROW_SCALE}: torch\.float32",
        ),
        (
            lambda tensors: tensors.update({SCALE: tensors[SCALE].view(torch.int8)}),
            rf"{SCALE}: torch\.int8 .*expected torch\.uint8",
        ),
        (
            lambda tensors: tensors.update({ROW_SCALE: tensors[ROW_SCALE] * 1.125}),
            rf"{ROW_SCALE}: \d+ of 128 values have more than 3 significant",
        ),
        (
            lambda tensors: tensors.update({ROW_SCALE: -tensors[ROW_SCALE]}),
            rf"{ROW_SCALE}: 128 of 128 values are not positive",
        ),
    ],
)
def test_damage_is_refused_by_all(
    tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    """By validate, by transformers, and by what the vLLM plugin asks before vLLM builds a model."""
    folder = two_level(tmp_path, 6)
    edit_tensors(folder, change)
    assert any(re.search(message, problem) for problem in checkpoint_problems(folder))
    with pytest.raises(SvskFormatError, match=message):
        load(folder)
    with pytest.raises(SvskFormatError, match=message):
        require_sound(folder, AutoConfig.from_pretrained(folder))
