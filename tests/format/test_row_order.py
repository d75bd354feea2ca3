# SPDX-License-Identifier: Apache-2.0
"""Architectures whose vLLM loaders move rows."""

import re

import pytest

from svsk_vllm.format.row_order import row_order_problem

QKV = "transformer.h.0.self_attention.query_key_value"


@pytest.mark.parametrize(
    ("architecture", "module", "rank", "message"),
    [
        ("FalconForCausalLM", QKV, 4, None),
        ("BloomForCausalLM", QKV, 0, None),
        ("BloomForCausalLM", QKV, 4, "sidecar of rank 4, but BloomForCausalLM: .*rank 0.*--ignore"),
        ("BloomForCausalLM", "transformer.h.0.self_attention.dense", 4, None),
        ("Llama4ForCausalLM", "model.layers.0.self_attn.k_proj", 1, "k_proj: a sidecar of rank 1"),
        ("K2HorizonForCausalLM", "model.layers.0.self_attn.q_proj", 0, r"q_proj: .*ignore list"),
        ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj", 4, None),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.query_key_value", 4, None),
    ],
)
def test_what_is_served_of_moved_rows(
    architecture: str, module: str, rank: int, message: str | None
) -> None:
    problem = row_order_problem([architecture], module, rank)
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        assert re.search(message, problem)


def test_a_class_that_vllm_has_given_up_counts_where_it_is_still_there() -> None:
    module = "gpt_neox.layers.0.attention.query_key_value"
    problem = row_order_problem(["GPTNeoXForCausalLM"], module, 4, own_class=True)
    assert problem is not None
    assert "rank 0" in problem
