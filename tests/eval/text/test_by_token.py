# SPDX-License-Identifier: Apache-2.0
"""KL by position and by kind of token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svsk_eval.errors import EvalError
from svsk_eval.text.by_token import KINDS, by_kind, by_position, kinds_of_tokens
from svsk_eval.text.metrics import ChunkScores
from svsk_eval.text.models import load_tokenizer
from svsk_eval.text.request import TextRequest, score
from svsk_eval.text.scoring import evaluate, token_chunks
from svsk_eval.text.series import FloatArray, mean_se
from tests.support.tiny_models import write_dense

NAMES = tuple(KINDS)


def word_tokenizer(pieces: list[str], *, sentencepiece: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of given pieces, which writes a space as one of two families of models do."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "a", *pieces])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_kinds_of_a_sentence(sentencepiece: bool) -> None:
    """Spaces are found whichever way a tokenizer writes them."""
    space, newline = ("▁", "\n") if sentencepiece else ("Ġ", "Ċ")
    expected = [
        (f"{space}The", "word start"),
        ("se", "word continuation"),
        ("'re", "word continuation"),
        (f"{space}12", "digits"),
        ("3", "digits"),
        (f"{space}(", "punctuation"),
        ("old", "word start"),  # nothing of a word before
        (").", "punctuation"),
        (f"{newline}{newline}", "whitespace"),
        ("New", "word start"),
        ("<unk>", "special"),
        ("er", "word start"),  # a special token ends words
    ]
    if not sentencepiece:
        expected += [
            ("Ã", "part of a character"),
            ("©", "part of a character"),
            ("t", "word continuation"),
        ]
    pieces = [piece for piece, _ in expected]
    tokenizer = word_tokenizer(pieces, sentencepiece=sentencepiece)
    ids = np.array([tokenizer.convert_tokens_to_ids(["a", *pieces])])
    found = [NAMES[index] for index in kinds_of_tokens(tokenizer, ids)[0]]
    assert list(zip(pieces, found, strict=True)) == expected


def test_means_shares_and_errors_by_hand() -> None:
    kl = np.array([[1.0, 2.0, 3.0, 6.0], [0.0, 2.0, 1.0, 1.0]])
    kinds = np.array([[2, 2, 3, 3], [2, 3, 3, 3]], dtype=np.int8)
    digits, punctuation = by_kind(kl, kinds)
    assert (digits.name, digits.tokens, punctuation.tokens) == ("digits", 3, 5)
    assert digits.kl == pytest.approx(1.0)
    assert digits.share == pytest.approx(3 / 16)
    # sums 3 and 0 of 2 and 1 tokens at a ratio of 1: both off by 1
    assert digits.kl_se == pytest.approx((2 * (1 + 1) / 9) ** 0.5)
    assert punctuation.kl == pytest.approx(13 / 5)
    positions = by_position(kl)
    assert [(one.name, one.tokens) for one in positions] == [("1", 2), ("2", 2), ("3-4", 4)]
    assert [one.kl for one in positions] == pytest.approx([0.5, 2.0, 11 / 4])
    assert sum(one.share or 0 for one in positions) == pytest.approx(1.0)


def test_positions_of_any_length_are_all_counted_once() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 7, 8, 9, 511):
        groups = by_position(rng.random((3, length)))
        assert sum(group.tokens for group in groups) == 3 * length
        assert groups[-1].name.rpartition("-")[2] == str(length)


def test_the_error_of_equal_counts_is_that_of_a_mean() -> None:
    kl = np.random.default_rng(1).random((5, 8))
    (group,) = by_kind(kl, np.zeros((5, 8), dtype=np.int8))
    assert group.kl_se == pytest.approx(mean_se(kl))
    (single,) = by_kind(kl[:1], np.zeros((1, 8), dtype=np.int8))
    assert single.kl_se is None
    first, rest = by_kind(kl[:2, :2], np.array([[0, 1], [1, 1]], dtype=np.int8))
    assert first.kl_se is None  # it may be anything in another chunk
    assert rest.kl_se is not None
    (same,) = by_kind(np.zeros((2, 8)), np.zeros((2, 8), dtype=np.int8))
    assert (same.kl, same.share) == (0.0, None)


def test_every_chunk_is_given_with_its_scores(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "model", seed=0)
    reference = write_dense(tmp_path / "reference", seed=1)
    text = tmp_path / "text.txt"
    text.write_text("Some words, 12 of them.\n" * 20)
    tokens: list[torch.Tensor] = []
    scored: list[FloatArray] = []

    def each(chunk: torch.Tensor, scores: ChunkScores) -> None:
        tokens.append(chunk)
        assert scores.kl is not None
        scored.append(scores.kl)

    result = evaluate(model, reference, text, 3, 32, each=each)
    assert torch.stack(tokens).shape == (3, 32)
    kl = np.stack(scored)
    assert kl.shape == (3, 31)
    assert result.kl_mean == pytest.approx(kl.mean())
    assert torch.equal(torch.stack(tokens), token_chunks(text, load_tokenizer(model), 3, 32))


def test_the_served_model_gives_no_kl_of_tokens(tmp_path: Path) -> None:
    request = TextRequest(
        model="m", reference=None, text=tmp_path, chunks=1, seq_len=8, engine="vllm"
    )
    with pytest.raises(EvalError, match="gives no KL of tokens"):
        score(request, None, lambda chunk, scores: None)
