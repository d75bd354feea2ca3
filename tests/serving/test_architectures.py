# SPDX-License-Identifier: Apache-2.0
"""Every architecture that is promised.

Quantised, it answers in vLLM as in transformers from the same folder.

Tiny random models go through ``svsk quantize`` with a sidecar whose tiles fit nothing. vLLM answers
greedily and scores its own answers; transformers scores the same tokens. A token may differ from
transformers' choice only where its two best are closer than ``CLEAR_CHOICE``. Both compute in
float32 from a float16 folder, so that what differs is what transformers' loader rounds: weights to
float16.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - lets transformers load the checkpoints
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import load_recipe
from svsk_offline.storage.inspection import serving_note, validate_against_architecture
from svsk_vllm.format import Checkpoint
from svsk_vllm.format.architectures import vllm_class
from tests.serving.conftest import Run
from tests.support.tiny_models import write_dense

BOUND = 0.005
"""Of the mean difference of log-probabilities.

It is 0.002 at most; a sidecar on the wrong rows makes it 0.04.
"""
CLEAR_CHOICE = 0.1
ALWAYS = ("falcon", "gemma2", "glm4", "phi3", "stablelm", "starcoder2")
"""Those that run in every test run: rows moved while loading, soft caps, stored fused though vLLM
lists the parts, stored fused, fused though vLLM's class does not say so, transformers' class."""
# GPT-NeoX is not among them: vLLM 0.32 computes the dense model itself otherwise than transformers.
OTHERS = (
    "apertus",
    "bloom",
    "cohere",
    "exaone4",
    "falcon-grouped",
    "gemma3",
    "granite",
    "llama",
    "mistral",
    "nemotron",
    "olmo2",
    "qwen2",
    "qwen3",
)

RANKS = {"bloom": 0}
"""Of families whose sidecars vLLM's loader would leave behind."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 256, (length,), generator=generator).tolist()
        for length in (3, 17, 64, 100)
    ]


def transformers_scores(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities at every position but the last, float32 [tokens - 1, vocabulary] each."""
    # `sdpa`, the usual implementation of attention, leaves Gemma 2's soft caps out
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]


@pytest.mark.parametrize(
    "family", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_served_as_by_transformers(tmp_path: Path, run_vllm: Run, family: str) -> None:
    dense = write_dense(tmp_path / "dense", family, dtype=torch.float16)
    recipe = load_recipe("fast").override(
        {
            "calibration": {"samples": 4, "seq_len": 64},
            "sidecar": {"rank": RANKS.get(family, 4), "tile_m": 48, "tile_n": 96},
        }
    )
    folder = tmp_path / "svsk"
    quantize(dense, folder, recipe)
    assert validate_against_architecture(folder) == []
    assert serving_note(folder) is None

    asked = prompts()
    served = run_vllm(folder, asked, max_tokens=16, dtype="float32")
    checkpoint = Checkpoint(folder)
    fused = vllm_class(checkpoint.hf_config).fused_sets(checkpoint.linears)
    layers = len(checkpoint.linears) - sum(len(members) - 1 for members in fused)
    assert served["methods"]["SvskLinearMethod"] == layers, (
        "vLLM fuses other linears than the table says"
    )

    differences, clear, flipped = [], 0, []
    truth = transformers_scores(folder, served["sequences"])
    for prompt, ids, scores, rows in zip(
        asked, served["sequences"], truth, served["scores"], strict=True
    ):
        own = scores.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).flatten()
        differences += [abs(float(a) - row[0]) for a, row in zip(own, rows, strict=True)]
        for position in range(len(prompt) - 1, len(ids) - 1):
            (best, second), (choice, _) = scores[position].topk(2)
            if float(best - second) > CLEAR_CHOICE:
                clear += 1
                if int(choice) != ids[position + 1]:
                    flipped.append(float(best - second))
    mean = sum(differences) / len(differences)
    print(
        f"{family}: mean {mean:.5f}, largest {max(differences):.3f}, {clear} clear choices,"
        f" {layers} layers"
    )
    assert mean < BOUND
    assert flipped == [], "tokens differ where the choice was clear"
    assert clear > 0.3 * 16 * len(asked), (
        "too few clear choices for the comparison to mean anything"
    )
