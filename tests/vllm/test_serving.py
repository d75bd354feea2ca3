# SPDX-License-Identifier: Apache-2.0
"""A served checkpoint answers as the dense model it stands for, served by the same vLLM.

Random weights make the tiny models' next tokens close calls, so tokens must agree only where the dense model's two
best are more than 0.1 apart. The bounds on log-probabilities are the project's promise, not the state of the noise.
"""

from typing import Any

import pytest
import torch

from tests.vllm.conftest import Pair, Run

BOUND = {"bfloat16": 0.02, "float16": 0.005}
CLEAR_CHOICE = 0.1


def requests(vocabulary: int, count: int = 32) -> list[list[int]]:
    """Prompts of different lengths, 1 to about 100 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def assert_same_model(dense: dict[str, Any], served: dict[str, Any], bound: float, linears: int) -> None:
    """Compare the answers of the restored model and of the checkpoint."""
    assert served["methods"]["SvskLinearMethod"] == linears
    assert "SvskLinearMethod" not in dense["methods"]
    pairs = [
        (reference, own)
        for reference_rows, own_rows in zip(dense["scores"], served["scores"], strict=True)
        for reference, own in zip(reference_rows, own_rows, strict=True)
    ]
    difference = sum(abs(reference[0] - own[0]) for reference, own in pairs) / len(pairs)
    assert difference < bound, f"mean difference of teacher-forced log-probabilities {difference:.4f}"
    clear = [(reference, own) for reference, own in pairs if reference[2] - reference[3] > CLEAR_CHOICE]
    assert len(clear) > 0.3 * len(pairs), "too few clear choices for the comparison to mean anything"
    assert all(reference[1] == own[1] for reference, own in clear)
    for index, (reference_tokens, own_tokens) in enumerate(zip(dense["generated"], served["generated"], strict=True)):
        first = next((i for i, (a, b) in enumerate(zip(reference_tokens, own_tokens, strict=True)) if a != b), None)
        if first is not None:  # greedy answers may part only at a close call
            row = dense["scores"][index][len(dense["sequences"][index]) - len(reference_tokens) + first - 1]
            assert row[2] - row[3] <= CLEAR_CHOICE


def compare(run: Run, pair: Pair, vocabulary: int, linears: int, **options: Any) -> dict[str, Any]:
    prompts = requests(vocabulary)
    dense = run(pair.restored, prompts, **options)
    served = run(pair.svsk, prompts, sequences=dense["sequences"], reload=True, **options)
    assert_same_model(dense, served, BOUND[options["dtype"]], linears)
    return served


@pytest.mark.parametrize(
    ("family", "dtype", "eager", "tp"),
    [
        ("llama", "bfloat16", True, 1),
        ("llama", "float16", False, 1),
        ("qwen3", "bfloat16", False, 2),
        ("qwen3", "float16", True, 2),
    ],
)
def test_tiny_model_with_misaligned_tiles(
    run_vllm: Run, tiny_pair: Any, family: str, dtype: str, eager: bool, tp: int
) -> None:
    """Includes a reload of the weights in the running engine: answers must not change at all."""
    served = compare(run_vllm, tiny_pair(family, getattr(torch, dtype)), 256, 8, dtype=dtype, eager=eager, tp=tp)
    assert served["reloaded"] == served["scores"]


@pytest.mark.parametrize(("dtype", "eager"), [("bfloat16", False), ("float16", True)])
def test_smollm2(run_vllm: Run, smollm2_pair: Pair, dtype: str, eager: bool) -> None:
    served = compare(run_vllm, smollm2_pair, 49152, 120, dtype=dtype, eager=eager)
    assert served["reloaded"] == served["scores"]
