# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of format 1.1, served as transformers loads them.

Scales in two levels, and ranks over 128.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from svsk_vllm.format import Checkpoint, Codebook, validate_checkpoint
from svsk_vllm.format.group_scales import ScaleBits
from tests.serving.conftest import Run
from tests.serving.transformers_answers import compare_with_transformers, prompts
from tests.support.tiny_models import scheme as make_scheme
from tests.support.tiny_models import write_dense, write_random_svsk

BOUND = 0.01
"""Of the mean difference of log-probabilities: vLLM computes in float16, transformers wider."""


@pytest.mark.parametrize(
    ("bits", "group_size", "codebook", "tp"),
    [
        (8, 16, "quad8", 1),
        (6, 32, "int4", 2),
        pytest.param(6, 64, "quad8", 2, marks=pytest.mark.slow),
        pytest.param(8, 64, "int4", 2, marks=pytest.mark.slow),
        pytest.param(8, 32, "quad8", 2, marks=pytest.mark.slow),
        pytest.param(6, 16, "int4", 2, marks=pytest.mark.slow),
        pytest.param(6, 16, "quad8", 2, marks=pytest.mark.slow),
    ],
)
def test_served_as_by_transformers(
    tmp_path: Path, run_vllm: Run, bits: ScaleBits, group_size: int, codebook: Codebook, tp: int
) -> None:
    """With two ranks and 6 bits in groups of 32, shares of a row's codes are no whole bytes."""
    scheme = partial(make_scheme, group_size=group_size, codebook=codebook, scale_bits=bits)
    schemes = {
        "default": scheme("Linear", rank=3),
        "q": scheme(r"re:.*\.q_proj$", rank=131),
        "k": scheme(r"re:.*\.k_proj$", rank=130, num_bits=4),
        "v": scheme(r"re:.*\.v_proj$"),
    }
    dense = write_dense(tmp_path / "dense", "llama", dtype=torch.float16)
    folder = write_random_svsk(dense, tmp_path / "svsk", schemes=schemes)
    assert validate_checkpoint(folder) == []
    groups = {spec.k // group_size for spec in Checkpoint(folder).linears.values()}
    if (tp, bits, group_size) == (2, 6, 32):
        assert any(count // tp * bits % 8 for count in groups)

    asked = prompts()
    served = run_vllm(folder, asked, max_tokens=16, dtype="float16", tp=tp, reload=True)
    found = compare_with_transformers(folder, asked, served)
    assert found.mean < BOUND
    assert found.flipped == [], "tokens differ where the choice was clear"
    assert found.clear > 0.3 * 16 * len(asked), "too few clear choices to mean anything"
    assert served["reloaded"] == served["scores"]
    assert "Attempted to load weight" not in served["log"], (
        "vLLM warns of each tensor of another dtype"
    )
