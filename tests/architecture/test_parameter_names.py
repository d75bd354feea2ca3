# SPDX-License-Identifier: Apache-2.0
"""Which parameter a stored tensor becomes where the model's class renames or splits it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from svsk_vllm.architecture.parameter_names import parameter_names
from tests.support.tiny_models import FAMILIES


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A model whose checkpoints fuse gate and up and call layers blocks.

    They also rename a part that has the name of another.
    """
    conversions = [
        WeightRenaming("model.blocks", "model.layers"),
        WeightRenaming("embed_tokens", "embedding"),
        WeightConverter("gate_and_up", ["gate_proj", "up_proj"], operations=[Chunk(dim=0)]),
    ]
    monkeypatch.setattr(
        "svsk_vllm.architecture.parameter_names.get_model_conversion_mapping",
        lambda model, keys, quantizer: conversions,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**FAMILIES["llama"].hf_config))


@pytest.mark.parametrize(
    ("stored", "targets", "pattern"),
    [
        ("model.blocks.0.mlp.down_proj.weight", ["model.layers.0.mlp.down_proj.weight"], None),
        ("blocks.0.mlp.down_proj.weight", ["blocks.0.mlp.down_proj.weight"], None),
        ("layers.0.mlp.down_proj.weight", ["model.layers.0.mlp.down_proj.weight"], None),
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"], None),
        (
            "model.blocks.1.mlp.gate_and_up.weight",
            ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"],
            "gate_and_up",
        ),
    ],
)
def test_parameter_names(
    llama: LlamaForCausalLM, stored: str, targets: list[str], pattern: str | None
) -> None:
    found = parameter_names(llama, None, [stored])[stored]
    assert list(found.targets) == targets
    assert found.pattern == pattern
