# SPDX-License-Identifier: Apache-2.0
import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from svsk_eval.errors import EvalError
from svsk_eval.text.models import declared_limits, load_model, load_tokenizer
from svsk_eval.text.scoring import compare_models, evaluate, token_chunks
from svsk_kernels.errors import SvskError
from tests.support.format_builders import edit_json
from tests.support.tiny_models import (
    BOS,
    EOS,
    FAMILIES,
    VOCAB,
    Family,
    write_dense,
    write_random_svsk,
    write_restored,
)

SEQ_LEN = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1,200 bytes of words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "rate", "of", "stones", "in", "a", "tin", "is", "é", "§ 7", "not", "here\n"]
    path.write_text(" ".join(rng.choice(words) for _ in range(300)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders.

    ``dense``, ``other`` (other weights), ``svsk`` (of dense) and ``restored`` (what svsk stands
    for).
    """
    folder = tmp_path_factory.mktemp("models")
    write_dense(folder / "dense", seed=0)
    write_dense(folder / "other", seed=1)
    write_random_svsk(folder / "dense", folder / "svsk")
    write_restored(folder / "svsk", folder / "restored")
    return folder


def known(value: float | None) -> float:
    assert value is not None
    return value


def with_vocabulary(size: int) -> Family:
    llama = FAMILIES["llama"]
    return replace(llama, settings={**llama.settings, "vocab_size": size})


def edit_tokenizer(folder: Path, **model: Any) -> None:
    edit_json(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(model))


def test_chunks_are_the_consecutive_tokens_of_one_stream(models: Path, text: Path) -> None:
    tokenizer = load_tokenizer(models / "dense")
    stream = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    chunks = token_chunks(text, tokenizer, 5, SEQ_LEN)
    assert chunks.shape == (5, SEQ_LEN)
    assert chunks.dtype == torch.int64
    assert chunks.flatten().tolist() == stream[: 5 * SEQ_LEN]
    every = token_chunks(text, tokenizer, None, SEQ_LEN)
    assert every.flatten().tolist() == stream[: len(stream) // SEQ_LEN * SEQ_LEN]


def test_of_a_long_text_only_the_beginning_is_read(models: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(models / "dense")
    lines = "".join(f"line {number} of a text, and so on\n" for number in range(3000))
    path = tmp_path / "long.txt"
    path.write_bytes(lines.encode() + b"\xff")
    stream = tokenizer(lines, add_special_tokens=False)["input_ids"]
    assert token_chunks(path, tokenizer, 20, SEQ_LEN).flatten().tolist() == stream[: 20 * SEQ_LEN]
    with pytest.raises(EvalError, match=f"not UTF-8 text .* at byte {len(lines)}"):
        token_chunks(path, tokenizer, None, SEQ_LEN)
    path.write_bytes(
        b" " * 5000 + lines.encode()
    )  # many characters a token: more is read until it is enough
    stream = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert token_chunks(path, tokenizer, 20, SEQ_LEN).flatten().tolist() == stream[: 20 * SEQ_LEN]


def add_bos(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )


def test_chunks_start_with_bos_where_the_tokenizer_puts_one(models: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "dense")
    stream = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    add_bos(tokenizer)
    assert [tokenizer("a")["input_ids"][place] for place in (0, -1)] == [BOS, EOS], (
        "a case that shows nothing"
    )
    chunks = token_chunks(text, tokenizer, 3, SEQ_LEN)
    assert chunks.shape == (3, SEQ_LEN)
    assert chunks.dtype == torch.int64
    assert chunks[:, 0].tolist() == [BOS] * 3
    assert chunks[:, 1:].flatten().tolist() == stream[: 3 * (SEQ_LEN - 1)], (
        "consecutive, nothing lost, no EOS"
    )
    every = token_chunks(text, tokenizer, None, SEQ_LEN)
    assert len(every) == len(stream) // (SEQ_LEN - 1)
    with pytest.raises(
        EvalError, match=f"chunks of {SEQ_LEN - 1} after BOS, fewer than the 1000 asked"
    ):
        token_chunks(text, tokenizer, 1000, SEQ_LEN)


def test_a_model_is_scored_with_its_bos(models: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    write_dense(folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    add_bos(tokenizer)
    tokenizer.save_pretrained(folder)
    result = evaluate(folder, None, text, chunks=1, seq_len=SEQ_LEN)
    model = load_model(folder)
    chunk = torch.tensor([[BOS, *stream[: SEQ_LEN - 1]]])
    with torch.no_grad():
        logits = model(chunk).logits[0, :-1]
    assert result.nll == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, chunk[0, 1:])), abs=1e-5
    )
    assert result.tokens == SEQ_LEN - 1
    with pytest.raises(EvalError, match=r"The tokenizers of .*bos .* differ, so their predictions"):
        evaluate(folder, models / "dense", text, 1, SEQ_LEN)


def test_the_text_is_scored_byte_for_byte(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"x\r\ny")
    tokenizer = load_tokenizer(models / "dense")
    assert tokenizer.decode(token_chunks(path, tokenizer, 1, 4)[0]) == "x\r\ny"


def test_a_text_that_cannot_be_cut_is_an_error_that_says_why(
    models: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(models / "dense")
    with pytest.raises(
        EvalError, match=r"nowhere.txt: cannot read the text to score .No such file"
    ):
        token_chunks(tmp_path / "nowhere.txt", tokenizer, 1, SEQ_LEN)
    tokens = len(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    with pytest.raises(
        EvalError, match=f"{tokens} tokens are {tokens // SEQ_LEN} chunks of {SEQ_LEN}.* 1000 asked"
    ):
        token_chunks(text, tokenizer, 1000, SEQ_LEN)
    with pytest.raises(EvalError, match="are 0 chunks of 5000, fewer than the 1 asked"):
        token_chunks(text, tokenizer, None, 5000)
    with pytest.raises(EvalError, match="seq_len is 1, but a chunk needs 2 tokens"):
        token_chunks(text, tokenizer, 1, 1)
    with pytest.raises(EvalError, match="chunks is 0, expected 1 or more"):
        token_chunks(text, tokenizer, 0, SEQ_LEN)
    (tmp_path / "latin1.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(EvalError, match=r"not UTF-8 .* at byte 0"):
        token_chunks(tmp_path / "latin1.txt", tokenizer, 1, 2)


def test_metrics_equal_those_of_an_independent_forward_pass(models: Path, text: Path) -> None:
    result = evaluate(models / "other", models / "dense", text, chunks=3, seq_len=SEQ_LEN)
    ids = AutoTokenizer.from_pretrained(models / "dense")(text.read_text(encoding="utf-8"))[
        "input_ids"
    ]
    nll, ref_nll, kl, top1 = [], [], [], []
    loaded = [
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        for name in ("other", "dense")
    ]
    for start in range(0, 3 * SEQ_LEN, SEQ_LEN):
        chunk = ids[start : start + SEQ_LEN]
        with torch.no_grad():
            log_q, log_p = (
                log_softmax(model(torch.tensor([chunk])).logits[0].double().numpy(), axis=-1)
                for model in loaded
            )
        for position in range(SEQ_LEN - 1):
            nll.append(-log_q[position, chunk[position + 1]])
            ref_nll.append(-log_p[position, chunk[position + 1]])
            kl.append(rel_entr(np.exp(log_p[position]), np.exp(log_q[position])).sum())
            top1.append(log_p[position].argmax() == log_q[position].argmax())
    assert result.nll == pytest.approx(np.mean(nll), abs=1e-5)
    assert result.ref_nll == pytest.approx(np.mean(ref_nll), abs=1e-5)
    assert result.delta_nll == pytest.approx(np.mean(nll) - np.mean(ref_nll), abs=1e-5)
    assert result.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert result.kl_mean == pytest.approx(np.mean(kl), abs=1e-5)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), abs=1e-4)
    assert result.top1 == pytest.approx(np.mean(top1))
    assert (result.tokens, result.chunks) == (3 * (SEQ_LEN - 1), 3)
    assert known(result.kl_mean) > 0.1  # random models: far apart


def test_what_was_scored_is_recorded(models: Path, text: Path) -> None:
    result = evaluate(
        str(models / "svsk"), models / "dense", text, 3, SEQ_LEN, dtype="bfloat16"
    ).to_json()
    tokens = token_chunks(text, load_tokenizer(models / "dense"), 3, SEQ_LEN)
    assert (
        result["text_fingerprint"]
        == hashlib.sha256(np.array(tokens, dtype=np.int64).tobytes()).hexdigest()
    )
    assert (result["model"], result["reference"]) == (str(models / "svsk"), str(models / "dense"))
    assert (result["seq_len"], result["dtype"]) == (SEQ_LEN, "bfloat16")
    for name, mean in (("nll", "nll"), ("ref_nll", "ref_nll"), ("kl", "kl_mean"), ("top1", "top1")):
        assert len(result["per_chunk"][name]) == 3
        assert np.mean(result["per_chunk"][name]) == pytest.approx(result[mean])
    alone = evaluate(models / "dense", None, text, 2, SEQ_LEN).to_json()
    assert alone["reference"] is None
    assert alone["text_fingerprint"] != result["text_fingerprint"]


def test_model_and_reference_are_not_interchangeable(models: Path, text: Path) -> None:
    forth = evaluate(models / "other", models / "dense", text, 2, SEQ_LEN)
    back = evaluate(models / "dense", models / "other", text, 2, SEQ_LEN)
    assert (back.nll, back.ref_nll) == (forth.ref_nll, forth.nll)
    assert back.kl_mean != pytest.approx(forth.kl_mean, rel=1e-3)


def test_a_model_does_not_differ_from_itself(models: Path, text: Path) -> None:
    result = evaluate(models / "dense", models / "dense", text, 2, SEQ_LEN)
    assert (result.delta_nll, result.kl_mean, result.kl_p99, result.top1) == (0.0, 0.0, 0.0, 1.0)
    assert result.nll == result.ref_nll


def test_without_a_reference_nll_is_the_same_and_nothing_is_compared(
    models: Path, text: Path
) -> None:
    alone = evaluate(models / "dense", None, text, 2, SEQ_LEN)
    compared = evaluate(models / "dense", models / "other", text, 2, SEQ_LEN)
    assert (alone.nll, alone.nll_se, alone.ppl) == (compared.nll, compared.nll_se, compared.ppl)
    assert (alone.ref_nll, alone.delta_nll, alone.kl_mean, alone.kl_p99, alone.top1) == (None,) * 5


def test_an_svsk_checkpoint_scores_as_the_dense_model_it_stands_for(
    models: Path, text: Path
) -> None:
    restored = evaluate(models / "svsk", models / "restored", text, 2, SEQ_LEN)
    assert (restored.kl_mean, restored.delta_nll, restored.top1) == (0.0, 0.0, 1.0)
    original = evaluate(models / "svsk", models / "dense", text, 2, SEQ_LEN)
    assert known(original.kl_mean) > 1e-3  # it is quantised after all


def test_progress_is_reported_after_every_chunk(models: Path, text: Path) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(
        models / "dense",
        None,
        text,
        3,
        SEQ_LEN,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)],
)
def test_dtype_of_a_loaded_model(
    models: Path, dtype: str | torch.dtype | None, expected: torch.dtype
) -> None:
    for name in ("dense", "svsk"):
        model = load_model(models / name, dtype, "cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert not model.training


def test_bfloat16_differs_from_float32_by_rounding_only(models: Path, text: Path) -> None:
    reference, model = (
        load_model(models / "dense", "float32", "cpu"),
        load_model(models / "dense", "bfloat16", "cpu"),
    )
    result = compare_models(
        model, reference, token_chunks(text, load_tokenizer(models / "dense"), 2, SEQ_LEN)
    )
    assert 0 < known(result.kl_mean) < 0.01


def test_an_unknown_dtype_is_an_error(models: Path) -> None:
    with pytest.raises(
        EvalError, match="dtype is 'fp8', expected one of float32, bfloat16, float16"
    ):
        load_model(models / "dense", "fp8")


def test_a_path_that_is_no_model_is_an_error(models: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"not a model folder, it has no config\.json"):
        evaluate(tmp_path, None, text, 1, SEQ_LEN)
    with pytest.raises(EvalError, match=r"no config\.json"):
        evaluate(models / "dense", tmp_path, text, 1, SEQ_LEN)
    with pytest.raises(SvskError, match="absent: not a folder here, and the hub did not give it"):
        evaluate(tmp_path / "absent", None, text, 1, SEQ_LEN)
    with pytest.raises(SvskError, match="absent: not a folder here, and the hub did not give it"):
        load_model(tmp_path / "absent")


def test_folders_that_lack_a_part_are_errors(models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((models / "dense" / "config.json").read_bytes())
    with pytest.raises(
        EvalError, match=f"{tmp_path}: cannot load a model from it[.] .*safetensors"
    ):
        load_model(tmp_path)
    with pytest.raises(EvalError, match=f"{tmp_path}: cannot load a tokenizer from it[.] Copy the"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(EvalError, match=f"{tmp_path}: cannot read a model's config from it[.] "):
        declared_limits(tmp_path, trust_remote_code=False)


def test_a_vocabulary_that_differs_is_an_error(models: Path, text: Path, tmp_path: Path) -> None:
    padded = write_dense(tmp_path / "padded", with_vocabulary(VOCAB + 64))
    with pytest.raises(
        EvalError,
        match=f"padded has a vocabulary of {VOCAB + 64}, the reference .*dense one of {VOCAB}",
    ):
        evaluate(padded, models / "dense", text, 1, SEQ_LEN)


def test_tokens_beyond_the_vocabulary_are_an_error(text: Path, tmp_path: Path) -> None:
    small = write_dense(tmp_path / "small", with_vocabulary(260))
    with pytest.raises(EvalError, match="the model's vocabulary has 260"):
        evaluate(small, None, text, 1, SEQ_LEN)


def test_tokenizers_that_name_tokens_differently_are_an_error(
    models: Path, text: Path, tmp_path: Path
) -> None:
    renamed = write_dense(tmp_path / "renamed")
    vocabulary = load_tokenizer(renamed).get_vocab()
    # Bytes that the text does not hold: its tokens are the same, the distributions are not over the
    # same tokens.
    vocabulary["~"], vocabulary["^"] = vocabulary["^"], vocabulary["~"]
    edit_tokenizer(renamed, vocab=vocabulary)
    with pytest.raises(EvalError, match=r"tokenizers of .*renamed .* differ"):
        evaluate(renamed, models / "dense", text, 1, SEQ_LEN)


def test_tokenizers_that_split_differently_are_an_error(
    models: Path, text: Path, tmp_path: Path
) -> None:
    unmerged = write_dense(tmp_path / "unmerged")
    edit_tokenizer(unmerged, merges=[])
    assert load_tokenizer(unmerged).get_vocab() == load_tokenizer(models / "dense").get_vocab()
    with pytest.raises(EvalError, match=r"tokenizers of .*unmerged .* differ"):
        evaluate(unmerged, models / "dense", text, 1, SEQ_LEN)


def test_chunks_longer_than_the_context_are_an_error(models: Path, text: Path) -> None:
    with pytest.raises(EvalError, match="takes 512 tokens at most, chunks have 600"):
        evaluate(models / "dense", None, text, 1, 600)
