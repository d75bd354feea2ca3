# SPDX-License-Identifier: Apache-2.0
"""What the tests of the transformers loader share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import svsk_vllm.hf  # noqa: F401 - registers the loader
from tests.support.tiny_models import Family

Q_PROJ = "model.layers.0.self_attn.q_proj"
MOE = Family(
    "qwen3_moe",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "tie_word_embeddings": False,
    },
)


@dataclass(frozen=True)
class Folders:
    """A dense model, its SVSK checkpoint, and the dense folder the checkpoint stands for."""

    dense: Path
    svsk: Path
    restored: Path


MakeFolders = Callable[[str, torch.dtype], Folders]
Tensors = dict[str, torch.Tensor]


def load(folder: Path | str, **kwargs: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(torch.arange(48).view(2, 24) * 5 % 256).logits
    return output


def assert_same(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Same parameters and buffers: names, dtypes, bits."""
    found, expected = model.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
