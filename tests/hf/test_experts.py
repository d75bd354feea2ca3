# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantised experts, loaded into transformers' stacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.quantizers.base import HfQuantizer

from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import SvskFormatError
from tests.hf.loading import assert_same, load, logits
from tests.support.format_builders import edit_tensors
from tests.support.tiny_models import (
    scheme,
    write_dense,
    write_random_svsk,
    write_restored,
)

asked = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_weight_conversions"),
    reason="this version of transformers does not ask quantisers about experts",
)
SCHEMES = {
    "others": scheme("Linear", rank=3),
    "up": scheme(r"re:.*experts\.\d+\.(up_proj|w3)$", rank=2, codebook="quad8", num_bits=4),
    "down": scheme(r"re:.*experts\.\d+\.(down_proj|w2)$", group_size=32, scale_bits=6),
}


def write_svsk(folder: Path, family: str) -> Path:
    dense = write_dense(folder / "dense", family)
    linears = set(ModelSource(dense).block_linears())
    return write_random_svsk(
        dense,
        folder / "svsk",
        schemes=SCHEMES,
        linears=linears,
        ignore=("lm_head", "re:.*(shared_expert_gate|kv_b_proj)$"),
        shards=2,
    )


@asked
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_next"])
def test_loaded_as_the_restored_model(tmp_path: Path, family: str) -> None:
    svsk = write_svsk(tmp_path, family)
    restored = load(write_restored(svsk, tmp_path / "restored"))
    loaded = load(svsk)
    assert_same(loaded, restored)
    assert torch.equal(logits(loaded), logits(restored))
    assert_same(load(svsk, dtype=torch.float32), load(tmp_path / "restored", dtype=torch.float32))

    loaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = load_file(tmp_path / "restored" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@asked
def test_experts_of_several_schemes_are_sent_to_restore(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3_moe")
    other = {**SCHEMES, "one": scheme("model.layers.1.mlp.experts.3.gate_proj", rank=1)}
    mixed = write_random_svsk(
        dense,
        tmp_path / "mixed",
        schemes=other,
        linears={name for name in ModelSource(dense).block_linears() if ".experts." in name},
        ignore=("lm_head", r"re:.*self_attn.*"),
    )
    with pytest.raises(SvskFormatError, match="schemes of its experts differ"):
        load(mixed)


@asked
def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3_moe")
    svsk = write_random_svsk(
        dense,
        tmp_path / "svsk",
        schemes=SCHEMES,
        linears=set(ModelSource(dense).block_linears()),
    )
    gone = "model.layers.0.mlp.experts.7.up_proj"

    def remove(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{gone}.")]:
            del tensors[name]

    edit_tensors(svsk, remove)
    with pytest.raises(SvskFormatError, match=gone):
        load(svsk)


def test_an_old_transformers_is_sent_to_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not ask about experts."""
    from svsk_vllm.hf.quantizer import SvskHfQuantizer

    monkeypatch.setattr(
        SvskHfQuantizer,
        "update_weight_conversions",
        lambda self, conversions: [*conversions, *self.get_weight_conversions()],
    )
    svsk = write_svsk(tmp_path, "qwen3_moe")
    with pytest.raises(
        SvskFormatError, match=r"experts\.gate_up_proj: transformers fuses .* `svsk restore`"
    ):
        load(svsk)
