# SPDX-License-Identifier: Apache-2.0
"""Hybrids: linear attention whose projections vLLM fuses over several of its parts.

vLLM's gated delta nets run in bfloat16 alone on a CPU, so the restored model is served as well and
compared with.
"""

from pathlib import Path
from typing import Any

import pytest

from svsk_vllm.architecture.folder_check import checkpoint_problems
from tests.serving.conftest import Run, served_schemes
from tests.serving.transformers_answers import prompts
from tests.support.tiny_models import Family, write_dense, write_random_svsk, write_restored

QWEN3_5 = Family(
    "qwen3_5_text",
    {
        "head_dim": 32,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "tie_word_embeddings": False,
    },
)
DENSE = r"re:.*(in_proj_[ab]|conv1d)$"
BOUND = 0.03
"""Of the mean difference of log-probabilities, both rounded to bfloat16 everywhere."""


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_served_as_the_restored_model(tmp_path: Path, run_vllm: Run, tp: int) -> None:
    dense = write_dense(tmp_path / "dense", QWEN3_5)
    folder = write_random_svsk(
        dense, tmp_path / "svsk", schemes=served_schemes(), ignore=("lm_head", DENSE)
    )
    assert checkpoint_problems(folder) == []
    restored = write_restored(folder, tmp_path / "restored")
    asked = prompts()
    truth = run_vllm(restored, asked, max_tokens=16)
    served = run_vllm(folder, asked, max_tokens=16, sequences=truth["sequences"], tp=tp)
    # of three blocks in four in_proj_qkvz and out_proj, of one qkv_proj and o_proj, the MLPs
    assert served["methods"]["SvskLinearMethod"] == 3 * 2 + 2 + 4 * 2
    found = [
        abs(a[0] - b[0])
        for rows, others in zip(truth["scores"], served["scores"], strict=True)
        for a, b in zip(rows, others, strict=True)
    ]
    mean = sum(found) / len(found)
    clear = agree(truth, served, asked)
    print(f"tp {tp}: mean {mean:.5f}, largest {max(found):.3f}, {len(clear)} clear choices")
    assert mean < BOUND
    assert all(clear), "tokens differ where the choice was clear"
    assert len(clear) > 0.3 * 16 * len(asked), "too few clear choices to mean anything"


def agree(truth: dict[str, Any], served: dict[str, Any], asked: list[list[int]]) -> list[bool]:
    """Whether both choose the same token, at each answered position that is clear."""
    rows = [
        (a, b)
        for prompt, mine, theirs in zip(asked, truth["scores"], served["scores"], strict=True)
        for a, b in zip(mine[len(prompt) - 1 :], theirs[len(prompt) - 1 :], strict=True)
    ]
    return [a[1] == b[1] for a, b in rows if a[2] - a[3] > 0.2]
