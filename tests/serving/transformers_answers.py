# SPDX-License-Identifier: Apache-2.0
"""What vLLM answered, against transformers on the same folder, or against other scores.

vLLM answers greedily and scores its own answers; transformers scores the same tokens. A token may
differ from transformers' choice only where its two best are closer than ``CLEAR_CHOICE``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - lets transformers load the checkpoints

CLEAR_CHOICE = 0.1


class Comparison(NamedTuple):
    """Differences of log-probabilities, and the choices that were clear to transformers."""

    mean: float
    largest: float
    clear: int
    flipped: list[float]  # by how much, where vLLM chose another token


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


def compare_with_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], served: dict[str, Any]
) -> Comparison:
    """Compare an answer of the fixture ``run_vllm``."""
    truth = []
    for ids, scores in zip(
        served["sequences"], transformers_scores(folder, served["sequences"]), strict=True
    ):
        own = scores.gather(1, torch.tensor(ids[1:]).unsqueeze(1))
        best = scores.topk(2)
        truth.append(torch.cat([own, best.indices[:, :1], best.values], 1).tolist())
    return compare_scores(truth, prompts, served)


def compare_scores(
    truth: Sequence[Sequence[Sequence[float]]],
    prompts: Sequence[Sequence[int]],
    served: dict[str, Any],
) -> Comparison:
    """Compare with other scores of the same sequences, as ``tests.serving.worker`` gives them."""
    differences, clear, flipped = [], 0, []
    for prompt, ids, expected, rows in zip(
        prompts, served["sequences"], truth, served["scores"], strict=True
    ):
        differences += [abs(a[0] - b[0]) for a, b in zip(expected, rows, strict=True)]
        for position in range(len(prompt) - 1, len(ids) - 1):
            _, choice, best, second = expected[position]
            if best - second > CLEAR_CHOICE:
                clear += 1
                if int(choice) != ids[position + 1]:
                    flipped.append(best - second)
    mean = sum(differences) / len(differences)
    return Comparison(mean, max(differences), clear, flipped)
