# SPDX-License-Identifier: Apache-2.0
"""What attention is given is seen, and factors are those that its rounding costs least with."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from svsk_offline.calibration import BlockRunner, load_calibration
from svsk_offline.planning.key_search import Attention, search_exponents, seen_attention
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.fold import LARGEST_EXPONENT
from svsk_vllm.kv_cache.rounding import q4_0
from tests.support.tiny_models import write_dense

TOKENS = 80


def watched(folder: Path) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """Of a model's first block: what is seen, the keys of a cache, and transformers' attention."""
    source = ModelSource(folder)
    texts = load_calibration("python", source.tokenizer, 3, TOKENS, 0)
    runner = BlockRunner(source, texts, torch.device("cpu"), torch.float32)
    name, blocks = source.blocks
    block: Any = blocks[0]
    source.load(block, f"{name}.0.", torch.float32, torch.device("cpu"))
    runs = [partial(runner.forward, 0, block, one) for one in runner.hidden.split(1)]
    before = block.self_attn.config._attn_implementation
    with torch.no_grad():
        found = seen_attention(block, block.self_attn, runs)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        output = model(texts.tokens, use_cache=True, output_attentions=True)
    assert found is not None
    assert block.self_attn.config._attn_implementation == before
    assert not [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith("svsk")]
    return found, output.past_key_values.layers[0].keys, output.attentions[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_queries_and_keys_are_those_of_the_layer(tmp_path: Path, family: str) -> None:
    found, keys, attention = watched(write_dense(tmp_path, family))
    samples, heads, group, queries, head_dim = found.queries.shape
    assert (samples, heads, head_dim) == (3, keys.shape[1], keys.shape[3])
    assert group > 1
    assert queries == 32
    # A cache of a layer with a window keeps no more than that.
    torch.testing.assert_close(found.keys[:, :, -keys.shape[2] :], keys)
    window = 64 if family == "gemma2" else TOKENS
    wanted = [min((one + 1) * TOKENS // 32, window) for one in range(32)]
    assert found.seen.sum(-1).tolist() == [wanted] * 3
    assert found.seen[:, -1, -window:].all()
    if family != "gemma2":  # whose scores are capped
        scores = (found.queries @ found.keys.unsqueeze(2).mT).flatten(1, 2)
        ours = scores.masked_fill(~found.seen.unsqueeze(1), float("-inf")).softmax(-1)
        places = torch.arange(1, 33) * TOKENS // 32 - 1
        torch.testing.assert_close(ours, attention[:, :, places], rtol=1e-4, atol=1e-6)


def test_nothing_is_seen_of_what_does_not_ask() -> None:
    class Own(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    block = Own()
    ran = []
    assert seen_attention(block, block, [lambda: ran.append(block(torch.ones(1)))]) is None
    assert len(ran) == 1


def attention(seed: int = 0, heads: int = 2, head_dim: int = 64) -> Attention:
    """Keys with a constant part that differs by channel, as those of real models have."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(1.5 * torch.randn(heads, head_dim // 2, generator=draw)).repeat(1, 2)
    constant = 3 * torch.randn(heads, 1, head_dim, generator=draw)
    keys = torch.randn(2, heads, 48, head_dim, generator=draw) + constant
    queries = torch.randn(2, heads, 3, 16, head_dim, generator=draw) / scale[:, None, None]
    places = torch.arange(1, 17) * 3 - 1
    seen = torch.arange(48) <= places.unsqueeze(1)
    return Attention(0.3 * queries, keys * scale.unsqueeze(1), seen.expand(2, -1, -1))


def lost(given: Attention, exponents: torch.Tensor, index: torch.Tensor) -> list[float]:
    """The cost as the module's docstring has it, head by head and query by query in float64."""
    costs = []
    for head, row in enumerate(exponents.expand(given.keys.shape[1], -1)):
        factors = (2 ** row.double())[index].float()
        divergences = []
        for sample, keys in enumerate(given.keys[:, head]):
            rounded = q4_0(keys / factors) * factors
            for queries in given.queries[sample, head]:
                for query, seen in zip(queries, given.seen[sample], strict=True):
                    wanted = (keys[seen].double() @ query.double()).log_softmax(-1)
                    ours = (rounded[seen].double() @ query.double()).log_softmax(-1)
                    divergences.append((wanted.exp() * (wanted - ours)).sum())
        costs.append(float(torch.stack(divergences).mean()))
    return costs


INDEX = torch.arange(32).repeat(2)


def test_no_step_of_an_eighth_costs_less() -> None:
    given = attention()
    start = torch.zeros(2, 32)
    found = search_exponents(given, start, INDEX)
    assert torch.equal(found * 8, (found * 8).round())
    before, after = lost(given, start, INDEX), lost(given, found, INDEX)
    assert all(late < 0.5 * early for early, late in zip(before, after, strict=True))
    for factor in range(32):
        for step in (0.125, -0.125):
            near = found.clone()
            near[:, factor] += step
            pairs = zip(lost(given, near, INDEX), after, strict=True)
            # A step is taken for a gain of a thousandth; rounds are limited.
            assert all(costs > 0.98 * best for costs, best in pairs)


def test_each_head_is_searched_for_itself() -> None:
    given = attention()
    start = torch.zeros(2, 32)
    together = search_exponents(given, start, INDEX)
    for head in range(2):
        queries, keys = given.queries[:, head : head + 1], given.keys[:, head : head + 1]
        alone = search_exponents(Attention(queries, keys, given.seen), start[:1], INDEX)
        assert torch.equal(alone[0], together[head])


def test_one_row_of_factors_serves_all_heads() -> None:
    """As a norm of keys has it: the mean over heads falls, though not that of each need."""
    given = attention()
    start = torch.zeros(1, 32)
    found = search_exponents(given, start, INDEX)
    assert found.shape == (1, 32)
    assert sum(lost(given, found, INDEX)) < 0.8 * sum(lost(given, start, INDEX))


def test_factors_stay_within_the_largest() -> None:
    given = attention()
    start = torch.full((2, 32), float(LARGEST_EXPONENT))
    found = search_exponents(given, start, INDEX)
    assert found.abs().max() <= LARGEST_EXPONENT


def test_hidden_keys_do_not_count() -> None:
    """Keys that no query sees may hold anything."""
    given = attention()
    changed = given.keys.clone()
    unseen = ~given.seen.any(1)
    assert not unseen.any()
    late = Attention(given.queries[..., :8, :], given.keys, given.seen[:, :8])
    changed[:, :, 24:] *= 1e3
    other = Attention(late.queries, changed, late.seen)
    start = torch.zeros(2, 32)
    assert torch.equal(search_exponents(late, start, INDEX), search_exponents(other, start, INDEX))
