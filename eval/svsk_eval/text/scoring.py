# SPDX-License-Identifier: Apache-2.0
"""Run a model, and the reference it was made from, over the same tokens of a text file."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svsk_eval.errors import EvalError
from svsk_eval.text.activations import check_kind, rounded_inputs
from svsk_eval.text.leading_tokens import leading_tokens
from svsk_eval.text.metrics import (
    ChunkScores,
    EvalInputs,
    EvalResult,
    score_chunk,
    summarize,
)
from svsk_eval.text.models import (
    check_fits,
    check_same_vocabulary,
    declared_limits,
    load_model,
    load_tokenizer,
    resolve_dtype,
)
from svsk_offline.calibration.limits import longest_sequence
from svsk_offline.calibration.text import bos_prefix, cut_pieces, token_fingerprint
from svsk_offline.pipeline import resolve_device
from svsk_offline.storage.model_loading import read_model_config
from svsk_vllm.kv_cache import KvKinds, check_filled, model_cache

__all__ = [
    "ChunkProgress",
    "EachChunk",
    "compare_models",
    "evaluate",
    "shared_tokens",
    "token_chunks",
]

ChunkProgress = Callable[[int, int], None]
"""Called after every chunk with the number of chunks done and the number of all chunks."""

EachChunk = Callable[[torch.Tensor, ChunkScores], None]
"""Called after every chunk with its tokens, int64 [seq_len], and the scores of the predicted."""


def token_chunks(
    text_file: str | Path, tokenizer: PreTrainedTokenizerBase, chunks: int | None, seq_len: int
) -> torch.Tensor:
    """Cut a text into chunks of tokens.

    The whole file is one stream of tokens without special tokens; chunks are consecutive, from its
    beginning, and do not overlap. The tokens after the last whole chunk are not used. Where the
    tokenizer puts a beginning-of-sequence token in front of a text, every chunk starts with it, as
    calibration samples do, and holds one token of text less.

    Args:
        text_file: plain UTF-8 text.
        tokenizer: a Hugging Face tokenizer.
        chunks: how many, or None for all there are.
        seq_len: tokens per chunk, what is put in front included, at least 2.

    Returns:
        Tokens, int64 [chunks, seq_len].

    Raises:
        EvalError: the file is missing, is not UTF-8, or is too short; or a number is out of range.
        SvskError: what the tokenizer puts in front cannot be told, or fills the chunk.
    """
    if seq_len < 2:
        raise EvalError(
            f"seq_len is {seq_len}, but a chunk needs 2 tokens or more:"
            " one to predict the next from."
        )
    if chunks is not None and chunks < 1:
        raise EvalError(f"chunks is {chunks}, expected 1 or more.")
    path = Path(text_file)
    prefix = bos_prefix(tokenizer)
    needed = None if chunks is None else chunks * max(1, seq_len - len(prefix))
    tokens = leading_tokens(path, tokenizer, needed)
    pieces = cut_pieces(tokens, prefix, seq_len)
    least = 1 if chunks is None else chunks
    if len(pieces) < least:
        width = f"{seq_len - len(prefix)}{' after BOS' if prefix else ''}"
        raise EvalError(
            f"{path}: {len(tokens)} tokens are {len(pieces)} chunks of {width}, fewer than the"
            f" {least} asked for. Ask for fewer or shorter chunks, or give a longer text."
        )
    return pieces[:chunks]


@torch.inference_mode()
def compare_models(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokens: torch.Tensor,
    progress: ChunkProgress | None = None,
    kv: KvKinds | None = None,
    each: EachChunk | None = None,
) -> EvalResult:
    """Score a loaded model, against a loaded reference if there is one.

    Within a chunk, positions 0 to seq_len - 2 predict tokens 1 to seq_len - 1; where position 0 is
    a beginning-of-sequence token, it predicts the first token of text. Only the logits of one
    chunk, float [seq_len, vocabulary] per model, are in memory at a time.

    Args:
        model: the model to score.
        reference: the model it is compared with, on any device, or None.
        tokens: int64 [chunks, seq_len].
        progress: called after every chunk.
        kv: how the model's cache stores keys and values; None is no cache. The reference has none.
        each: given every chunk's tokens and scores, of which the result keeps means.

    Returns:
        The metrics; those that need a reference are None without one.

    Raises:
        EvalError: the vocabularies differ, or a model gives logits that are not finite.
        SvskError: the model cannot be scored with such a cache.
    """
    scores = []
    for done, chunk in enumerate(tokens, start=1):
        ref_logits = None if reference is None else _next_token_logits(reference, chunk)
        scores.append(score_chunk(_next_token_logits(model, chunk, kv), chunk[1:], ref_logits))
        if each is not None:
            each(chunk, scores[-1])
        if progress is not None:
            progress(done, len(tokens))
    return summarize(scores)


def evaluate(
    model_path: str | Path,
    reference_path: str | Path | None,
    text: str | Path,
    chunks: int | None = 32,
    seq_len: int = 512,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: ChunkProgress | None = None,
    *,
    trust_remote_code: bool = False,
    kv: KvKinds | None = None,
    activations: str | None = None,
    each: EachChunk | None = None,
) -> EvalResult:
    """Score a model on a text, against a reference if there is one; both see the same tokens.

    Args:
        model_path: a Hugging Face folder, dense or SVSK, or the name of a model on the hub.
        reference_path: the same for the model it is compared with, or None: then only nll and ppl
            are given.
        text: a plain text file, see :func:`token_chunks`.
        chunks: how many chunks to score, or None for all there are.
        seq_len: tokens per chunk; each chunk starts with an empty context, or the tokenizer's
            beginning-of-sequence token if it has one.
        dtype: of both models, or its name; None is float32 on a CPU and bfloat16 elsewhere.
            Rounding to bfloat16 has a KL of its own, 0.0013 for SmolLM2-135M against its float32
            self: a floor for what can be told apart.
        device: of both models; None is the first CUDA device if there is one, else the CPU.
        progress: called after every chunk.
        trust_remote_code: run Python files that come with the models.
        kv: how the cache of the model stores keys and values, which its attention then reads; None
            is no cache. The reference has none.
        activations: how inputs of the model's linears are rounded, see
            :mod:`svsk_eval.text.activations`; None is not at all. Those of the reference are not.
        each: given every chunk's tokens and scores, of which the result keeps means.

    Returns:
        The metrics.

    Raises:
        EvalError: a model, a tokenizer or the text cannot be used, the models have different
            vocabularies, or there is no such kind of activations.
        SvskError: the model cannot be scored with such a cache.
        SvskFormatError: one is an SVSK checkpoint that this package cannot read.
    """
    if activations is not None:
        check_kind(activations)
    where = resolve_device("auto" if device is None else str(device))
    resolve_dtype(dtype, where)
    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokens = shared_tokens(
        model_path, reference_path, text, chunks, seq_len, trust_remote_code=trust_remote_code
    )
    # before weights are read; once more, by the embedding's rows, when they are
    for path in (model_path, reference_path):
        if path is not None:
            limits = declared_limits(path, trust_remote_code=trust_remote_code)
            check_fits(path, *limits, tokens)
    if kv is not None:  # of a model that it suits: else it is refused here
        model_cache(read_model_config(model_path, trust_remote_code=trust_remote_code), kv)
    reference = None if reference_path is None else load(reference_path)
    model = load(model_path)
    size = _check_loaded(model_path, model, tokens)
    if reference_path is not None and reference is not None:
        check_same_vocabulary(
            model_path, size, reference_path, _check_loaded(reference_path, reference, tokens)
        )
    inputs = EvalInputs(
        model=str(model_path),
        reference=None if reference_path is None else str(reference_path),
        text_fingerprint=token_fingerprint(tokens),
        seq_len=seq_len,
        dtype=str(model.dtype).removeprefix("torch."),
        kv=None if kv is None else str(kv),
        activations=activations,
    )
    rounding = (
        nullcontext()
        if activations is None
        else rounded_inputs(model, Path(model_path), activations)
    )
    with rounding:
        result = compare_models(model, reference, tokens, progress, kv, each)
    return replace(result, inputs=inputs)


def shared_tokens(
    model_path: str | Path,
    reference_path: str | Path | None,
    text: str | Path,
    chunks: int | None,
    seq_len: int,
    *,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Chunks of tokens that both models' tokenizers make of the text.

    The arguments are those of :func:`evaluate`.

    Returns:
        Tokens, int64 [chunks, seq_len], see :func:`token_chunks`.

    Raises:
        EvalError: a tokenizer or the text cannot be used, or the two tokenizers differ.
    """
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    tokens = token_chunks(text, tokenizer, chunks, seq_len)
    if reference_path is None:
        return tokens
    reference = load_tokenizer(reference_path, trust_remote_code=trust_remote_code)
    # Equal vocabularies can still split the text differently (merges, normaliser), equal splits can
    # still name tokens differently past the text: a KL between the two means something only if
    # neither is the case.
    if tokenizer.get_vocab() != reference.get_vocab() or not torch.equal(
        tokens, token_chunks(text, reference, chunks, seq_len)
    ):
        raise EvalError(
            f"The tokenizers of {model_path} ({len(tokenizer)} tokens) and of the reference"
            f" {reference_path} ({len(reference)} tokens) differ, so their predictions cannot be"
            " compared. Give the model that was quantised as the reference,"
            " or copy its tokenizer files."
        )
    return tokens


def _check_loaded(path: str | Path, model: PreTrainedModel, tokens: torch.Tensor) -> int:
    """The size of a loaded model's vocabulary, after a check that the tokens fit the model."""
    size = int(model.get_input_embeddings().weight.shape[0])
    check_fits(path, size, longest_sequence(model.config), tokens)
    return size


def _next_token_logits(
    model: PreTrainedModel, chunk: torch.Tensor, kv: KvKinds | None = None
) -> torch.Tensor:
    """Logits [seq_len - 1, V] of all positions of ``chunk`` [seq_len] whose next token is known."""
    ids = chunk.unsqueeze(0).to(model.device)
    if kv is None:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[0, :-1]
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise EvalError(
            f"--kv {kv}: {type(model).__name__} takes no cache of keys and values. Leave --kv out."
        )
    cache = model_cache(model.config, kv)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    check_filled(cache, len(chunk))
    return logits[0, :-1]
