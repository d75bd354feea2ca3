# SPDX-License-Identifier: Apache-2.0
"""Quantised embeddings and output heads, served as transformers loads them."""

from pathlib import Path

import pytest
import torch

from svsk_vllm.architecture.folder_check import checkpoint_problems
from svsk_vllm.format import EmbeddingArgs
from tests.serving.conftest import Run, served_schemes
from tests.serving.transformers_answers import compare_with_transformers, prompts
from tests.support.tiny_models import (
    EMBEDDING,
    FAMILIES,
    MORE_FAMILIES,
    Family,
    TableKind,
    table_schemes,
    write_dense,
    write_random_svsk,
)

BOUND = 0.01
"""Of the mean difference of log-probabilities: vLLM computes in float16, transformers wider."""
VOCABULARY = 300
"""No multiple of 64, to which vLLM pads: the second of two ranks has 140 rows of 160."""
MIXTRAL = Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})


@pytest.mark.parametrize(
    ("name", "head", "embedding", "tp", "eager"),
    [
        ("llama", "int8", "int8", 2, True),
        ("qwen2", "quad8", "int8", 1, False),
        ("llama", "mixed-int8", "mixed-int8", 2, True),
        pytest.param("qwen2", "mixed-int8", "mixed-int8", 1, False, marks=pytest.mark.slow),
        pytest.param("qwen2", "quad8", "mixed-int8", 2, True, marks=pytest.mark.slow),
        pytest.param("llama", "mixed-int8", "mixed-int8", 1, False, marks=pytest.mark.slow),
        pytest.param("llama", "quad8", "quad8", 2, True, marks=pytest.mark.slow),
        pytest.param("qwen2", "int8", "int8", 2, True, marks=pytest.mark.slow),
        pytest.param("qwen2 tied", "int8", "int8", 1, True, marks=pytest.mark.slow),
        pytest.param("qwen2 tied", "int8", "int8", 2, False, marks=pytest.mark.slow),
        pytest.param("llama untied", "quad8", "int8", 2, False, marks=pytest.mark.slow),
        pytest.param("llama", "int8", "int8", 1, False, marks=pytest.mark.slow),
        pytest.param("gemma2", "int8", "int8", 1, True, marks=pytest.mark.slow),
        pytest.param("mixtral untied", "int8", "int8", 1, True, marks=pytest.mark.slow),
    ],
)
def test_served_as_by_transformers(
    tmp_path: Path,
    run_vllm: Run,
    name: str,
    head: TableKind,
    embedding: TableKind,
    tp: int,
    eager: bool,
) -> None:
    """Llama passes no name on, Gemma 2 and Mixtral neither name nor config; Qwen 2 both.

    Mixtral's router and experts are dense.
    """
    known = (FAMILIES | MORE_FAMILIES | {"mixtral": MIXTRAL})[name.partition(" ")[0]]
    tied = name != "qwen2" and not name.endswith("untied")
    settings = {**known.settings, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    family = Family(known.model_type, settings)
    dense = write_dense(tmp_path / "dense", family, dtype=torch.float16)
    folder = write_random_svsk(
        dense,
        tmp_path / "svsk",
        schemes={**served_schemes(), **table_schemes(None if tied else head, embedding)},
        ignore=("re:.*block_sparse_moe", "re:.*mlp") if known is MIXTRAL else (),
        embedding=EmbeddingArgs(module=EMBEDDING, tied=tied),
    )
    assert checkpoint_problems(folder) == []
    asked = prompts()
    # vLLM has no Gemma 2 in float16. Its experts do not stand a reload on a CPU, without this
    # plugin neither (0.32.0: a dense Mixtral has other scores after it).
    dtype = "float32" if name == "gemma2" else "float16"
    reload = known is not MIXTRAL
    served = run_vllm(folder, asked, max_tokens=16, dtype=dtype, tp=tp, eager=eager, reload=reload)
    found = compare_with_transformers(folder, asked, served)
    print(f"{name}: mean {found.mean:.5f}, {found.clear} clear choices")
    assert found.mean < BOUND
    assert found.flipped == [], "tokens differ where the choice was clear"
    assert found.clear > 0.3 * 16 * len(asked), "too few clear choices to mean anything"
    assert served["methods"]["SvskTableMethod"] == 1
    assert served["methods"].get("SvskHeadMethod", 0) == (0 if tied else 1)
    if reload:
        assert served["reloaded"] == served["scores"]
