# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax

from svsk_eval.errors import EvalError
from svsk_eval.text import metrics
from svsk_eval.text.metrics import (
    ChunkScores,
    EvalInputs,
    jackknife_se,
    mean_se,
    score_chunk,
    summarize,
)

Value = TypeVar("Value")

KEYS = {
    *("nll", "ppl", "delta_nll", "kl_mean", "kl_p99", "top1"),
    *("nll_se", "ppl_se", "delta_nll_se", "kl_mean_se", "kl_p99_se", "top1_se"),
    *("tokens", "chunks", "ref_nll", "per_chunk"),
}


def known(value: Value | None) -> Value:
    assert value is not None
    return value


def random_chunk(
    tokens: int, vocabulary: int, noise: float, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Logits of a model, targets, logits of a reference that is ``noise`` away."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(tokens, vocabulary, generator=generator) * 4
    logits = reference + torch.randn(tokens, vocabulary, generator=generator) * noise
    return logits, torch.randint(vocabulary, (tokens,), generator=generator), reference


def exact(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> ChunkScores:
    """The definitions, in numpy's float64 over the whole vocabulary."""
    log_q, log_p = (log_softmax(x.double().numpy(), axis=-1) for x in (logits, reference))
    rows = np.arange(len(targets))
    return ChunkScores(
        nll=-log_q[rows, targets.numpy()],
        ref_nll=-log_p[rows, targets.numpy()],
        kl=(np.exp(log_p) * (log_p - log_q)).sum(-1),
        top1=(log_p.argmax(-1) == log_q.argmax(-1)).astype(np.float64),
    )


def random_scores(chunks: int, tokens: int, seed: int = 0) -> list[ChunkScores]:
    rng = np.random.default_rng(seed)
    return [
        ChunkScores(
            nll=rng.gamma(2.0, 1.5, tokens),
            ref_nll=rng.gamma(2.0, 1.4, tokens),
            kl=rng.exponential(0.1 * (1 + rng.random()), tokens),
            top1=(rng.random(tokens) < 0.8).astype(np.float64),
        )
        for _ in range(chunks)
    ]


def test_scores_of_a_distribution_over_two_tokens_by_hand() -> None:
    reference, model = (
        torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log(),
        torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log(),
    )
    scores = score_chunk(model, torch.tensor([1, 0]), reference)
    np.testing.assert_allclose(scores.nll, [math.log(2), math.log(5)], rtol=1e-6)
    np.testing.assert_allclose(known(scores.ref_nll), [math.log(4), math.log(4 / 3)], rtol=1e-6)
    by_hand = [
        0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5),
        0.75 * math.log(0.75 / 0.2) + 0.25 * math.log(0.25 / 0.8),
    ]
    np.testing.assert_allclose(known(scores.kl), by_hand, rtol=1e-6)
    assert known(scores.top1)[1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "block", [1, 1000, 1 << 21]
)  # one row at a time, rows that do not divide 37, all at once
def test_scores_equal_the_definitions_in_float64(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    logits, targets, reference = (
        x.to(dtype) if x.is_floating_point() else x for x in random_chunk(37, 203, 0.5)
    )
    scores, expected = score_chunk(logits, targets, reference), exact(logits, targets, reference)
    for name in ("nll", "ref_nll", "kl"):
        np.testing.assert_allclose(
            getattr(scores, name), getattr(expected, name), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(scores.top1, expected.top1)
    assert 0 < known(expected.top1).mean() < 1, (
        "the case should hold both agreement and disagreement"
    )


def test_nll_without_a_reference_is_the_same() -> None:
    logits, targets, reference = random_chunk(20, 50, 0.5)
    alone = score_chunk(logits, targets)
    np.testing.assert_array_equal(alone.nll, score_chunk(logits, targets, reference).nll)
    assert alone.ref_nll is None
    assert alone.kl is None
    assert alone.top1 is None


def test_identical_logits_give_zero_kl_and_full_agreement() -> None:
    logits, targets, _ = random_chunk(64, 1000, 0.0)
    result = summarize([score_chunk(logits, targets, logits.clone())] * 2)
    assert (result.delta_nll, result.kl_mean, result.kl_p99, result.top1) == (0.0, 0.0, 0.0, 1.0)
    assert (result.delta_nll_se, result.kl_mean_se, result.kl_p99_se, result.top1_se) == (
        0.0,
        0.0,
        0.0,
        0.0,
    )


def test_a_tiny_kl_is_not_lost_in_float32_rounding() -> None:
    # log_softmax in float32 is off by 5e-7 here, a hundred times the KL itself.
    logits, targets, reference = random_chunk(64, 20000, 1e-4)
    scores = score_chunk(logits, targets, reference)
    np.testing.assert_allclose(
        known(scores.kl), known(exact(logits, targets, reference).kl), rtol=0, atol=5e-8
    )


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    logits, targets, reference = random_chunk(16, 300, 0.3)
    logits, reference = logits.round(decimals=1), reference.round(decimals=1)
    scores = score_chunk(logits, targets, reference)
    moved = score_chunk(logits.double() + 1024, targets, reference.double() - 1024)
    np.testing.assert_allclose(known(moved.kl), known(scores.kl), atol=1e-3)
    np.testing.assert_allclose(moved.nll, scores.nll, atol=1e-3)


LOGITS = hnp.arrays(np.float32, (5, 11), elements=st.floats(-80, 80, width=32))


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_kl_is_never_negative_and_always_the_exact_one(
    model: np.ndarray, reference: np.ndarray
) -> None:
    logits, ref_logits, targets = (
        torch.from_numpy(model),
        torch.from_numpy(reference),
        torch.zeros(5, dtype=torch.long),
    )
    kl = known(score_chunk(logits, targets, ref_logits).kl)
    assert kl.min() >= -1e-6, "beyond what rounding explains"
    np.testing.assert_allclose(
        kl, known(exact(logits, targets, ref_logits).kl), rtol=1e-5, atol=1e-6
    )


def test_score_chunk_rejects_other_vocabularies_and_lengths() -> None:
    with pytest.raises(EvalError, match=r"The model's logits have shape \[4, 10\].*\[4, 12\]"):
        score_chunk(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long), torch.zeros(4, 12))
    with pytest.raises(EvalError, match=r"targets have shape \[3\].*need \[4\]"):
        score_chunk(torch.zeros(4, 10), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of_reference", [False, True])
def test_score_chunk_rejects_logits_that_are_not_finite(value: float, of_reference: bool) -> None:
    logits, targets, reference = random_chunk(6, 10, 0.1)
    (reference if of_reference else logits)[3, 5] = value
    with pytest.raises(
        EvalError, match=r"position 3 of a chunk are not finite: NaN or infinite logits"
    ):
        score_chunk(logits, targets, reference)


def test_summary_equals_numpy_over_all_tokens() -> None:
    chunks = random_scores(7, 30)
    result = summarize(chunks)
    nll, ref_nll, kl, top1 = (
        np.concatenate([getattr(c, n) for c in chunks]) for n in ("nll", "ref_nll", "kl", "top1")
    )
    assert result.nll == pytest.approx(nll.mean(), rel=1e-12)
    assert result.ref_nll == pytest.approx(ref_nll.mean(), rel=1e-12)
    assert result.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    assert result.delta_nll == pytest.approx(nll.mean() - ref_nll.mean(), rel=1e-12)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-12)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-12)
    assert result.top1 == pytest.approx(top1.mean(), rel=1e-12)
    assert (result.tokens, result.chunks) == (210, 7)


def test_standard_errors_of_means_by_hand() -> None:
    # Chunk means 1, 2, 3 (sample deviation 1), and differences to the reference of 0.5, 0.5, 2
    # (deviation sqrt(0.75)).
    rows = zip([1.0, 2.0, 3.0], [0.5, 1.5, 1.0], strict=True)
    spread = np.array([-1.0, 1.0])  # within a chunk: must not matter
    zeros = np.zeros(2)
    result = summarize(
        [ChunkScores(mean + spread, ref + spread, zeros, zeros) for mean, ref in rows]
    )
    assert result.nll_se == pytest.approx(1 / math.sqrt(3))
    assert result.ppl_se == pytest.approx(math.exp(2) / math.sqrt(3))
    assert result.delta_nll == pytest.approx(1.0)
    assert result.delta_nll_se == pytest.approx(math.sqrt(0.75) / math.sqrt(3))


def test_standard_error_is_the_spread_of_repeated_evaluations() -> None:
    # Chunks with a common part, as text has: the error of the mean over tokens would be three times
    # too small.
    rng = np.random.default_rng(1)
    runs = rng.normal(0, 1, (2000, 8, 1)) + rng.normal(0, 3, (2000, 8, 100))
    spread = runs.mean(axis=(1, 2)).std()
    assert np.sqrt(np.mean([known(mean_se(run)) ** 2 for run in runs])) == pytest.approx(
        spread, rel=0.05
    )


def test_jackknife_equals_brute_force() -> None:
    values = np.random.default_rng(3).exponential(1.0, (6, 41))
    estimates = []
    for left_out in range(6):
        pool = sorted(
            value for row in range(6) if row != left_out for value in values[row].tolist()
        )
        rank = 0.99 * (len(pool) - 1)
        low = math.floor(rank)
        estimates.append(pool[low] + (rank - low) * (pool[low + 1] - pool[low]))
    mean = sum(estimates) / 6
    expected = math.sqrt(5 / 6 * sum((estimate - mean) ** 2 for estimate in estimates))
    assert expected > 0
    assert jackknife_se(values, 0.99) == pytest.approx(expected, rel=1e-12)
    scores = [ChunkScores(row, row, row, row) for row in values]
    assert summarize(scores).kl_p99_se == pytest.approx(expected, rel=1e-12)


def test_jackknife_is_about_the_spread_of_repeated_evaluations() -> None:
    runs = np.random.default_rng(4).exponential(1.0, (300, 16, 200))
    spread = np.quantile(runs.reshape(300, -1), 0.99, axis=1).std()
    squares = [known(jackknife_se(run, 0.99)) ** 2 for run in runs]
    assert math.sqrt(np.mean(squares)) == pytest.approx(spread, rel=0.25)


def test_one_chunk_has_no_standard_error() -> None:
    result = summarize(random_scores(1, 20)).to_json()
    assert {key for key, value in result.items() if value is None} == {
        key for key in KEYS if key.endswith("_se")
    }


def test_without_a_reference_only_nll_and_ppl_are_known() -> None:
    chunks = [ChunkScores(nll=scores.nll) for scores in random_scores(3, 20)]
    result = summarize(chunks).to_json()
    present = {key for key, value in result.items() if value is not None}
    assert present == {"nll", "nll_se", "ppl", "ppl_se", "tokens", "chunks", "per_chunk"}
    assert result["per_chunk"].keys() == {"nll"}


def test_json_has_exactly_the_documented_keys() -> None:
    result = summarize(random_scores(3, 20))
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written.keys() == KEYS
    assert written["kl_mean"] == result.kl_mean


def test_json_holds_the_means_of_every_chunk() -> None:
    rows = [
        ([1.0, 2.0], [0.5, 1.0], [0.25, 0.5], [1.0, 0.0]),
        ([4.0, 4.0], [3.0, 2.0], [1.0, 0.5], [1.0, 1.0]),
    ]
    result = summarize([ChunkScores(*map(np.array, row)) for row in rows]).to_json()
    expected = {"nll": [1.5, 4.0], "ref_nll": [0.75, 2.5], "kl": [0.375, 0.75], "top1": [0.5, 1.0]}
    assert json.loads(json.dumps(result["per_chunk"])) == expected
    assert "model" not in result, "nobody said which model this was"


def test_inputs_are_keys_beside_the_figures() -> None:
    inputs = EvalInputs("folder/model", None, "0f", 512, "float32")
    result = replace(summarize(random_scores(3, 20)), inputs=inputs).to_json()
    assert result.keys() == KEYS | {
        "model",
        "reference",
        "text_fingerprint",
        "seq_len",
        "dtype",
        "engine",
    }
    assert (result["model"], result["reference"], result["seq_len"]) == ("folder/model", None, 512)
    assert result["engine"] == "hf"


def test_summarise_rejects_chunks_that_do_not_belong_together() -> None:
    with pytest.raises(EvalError, match="no chunk was scored"):
        summarize([])
    with pytest.raises(EvalError, match="must have one length, got chunks of 10 and of 20 tokens"):
        summarize([*random_scores(1, 20), *random_scores(1, 10)])
    with pytest.raises(EvalError, match="no predicted token"):
        summarize([ChunkScores(np.zeros(0))])
    scores = random_scores(2, 10)
    with pytest.raises(
        EvalError, match="ref_nll: 1 of 2 chunks have it; score all with a reference"
    ):
        summarize([scores[0], ChunkScores(scores[1].nll)])
