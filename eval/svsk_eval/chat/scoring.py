# SPDX-License-Identifier: Apache-2.0
"""Have a reference answer prompts of a chat, and score it and a model on these answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svsk_eval.chat.answers import Answer, AnswerFile, end_tokens, greedy_answers, load_answers
from svsk_eval.chat.metrics import ChatScores, score_answer, summarize_chat
from svsk_eval.chat.prompts import Prompt, read_prompts, shared_prompts
from svsk_eval.errors import EvalError
from svsk_eval.text.model_folder import read_folder
from svsk_eval.text.models import (
    check_fits,
    check_same_vocabulary,
    declared_limits,
    load_model,
    resolve_dtype,
)
from svsk_kernels.cpu.processor import has_bf16_products
from svsk_offline.pipeline import resolve_device
from svsk_offline.storage.hub import resolve_model

__all__ = ["ChatProgress", "ChatRequest", "PreparedChat", "evaluate_chat", "prepare_chat"]

ChatProgress = Callable[[str, int, int], None]
"""Called with what is under way (``answers`` or ``scores``), the prompts done and all of them."""


class ChatRequest(BaseModel):
    """A model to score on its reference's answers.

    Attributes:
        model: folder or hub name.
        reference: the same of the model that answers, and is compared with.
        file: prompts, see :func:`svsk_eval.chat.prompts.read_prompts`.
        prompts: how many, from the first.
        answer_tokens: most tokens of an answer, its end included.
        answers: file that keeps the answers; None keeps none.
        dtype: of the arithmetic, ``auto`` (see :func:`evaluate_chat`) or torch's name.
        device: ``auto`` or torch's name.
        trust_remote_code: run Python files that come with the models.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    reference: str
    file: Path
    prompts: int
    answer_tokens: int
    answers: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PreparedChat:
    """A request of which everything is checked that can be before weights are read.

    Attributes:
        request: what is asked for.
        dtype: of weights and activations in scoring, such as ``float32``.
        answer_dtype: of the reference's when it answers.
        tokenizer: the reference's.
        asked: token ids of the prompts by their fingerprints.
        order: fingerprints of the prompts as the file has them.
        kept: answers that there are already.
    """

    request: ChatRequest
    dtype: str
    answer_dtype: str
    tokenizer: PreTrainedTokenizerBase
    asked: Mapping[str, Sequence[int]]
    order: Sequence[str]
    kept: AnswerFile


def prepare_chat(request: ChatRequest) -> PreparedChat:
    """Read prompts and kept answers, and refuse what cannot be scored.

    Args:
        request: models, prompts and limits.

    Raises:
        EvalError: prompts, a tokenizer or the file of answers cannot be used, the models are asked
            differently or have different vocabularies, or a prompt with its answer is longer than
            one of them takes.
        SvskError: the file of prompts cannot be read.
    """
    if request.answer_tokens < 1:
        raise EvalError(f"--answer-tokens is {request.answer_tokens}, expected 1 or more.")
    device = resolve_device(request.device)
    dtype = resolve_dtype(_named(request.dtype), device)
    # Answers are text, made in half the time: their figures are still those of float32.
    fast = request.dtype == "auto" and device.type == "cpu" and has_bf16_products()
    scored, answered = (
        str(one).removeprefix("torch.") for one in (dtype, torch.bfloat16 if fast else dtype)
    )
    prompts = read_prompts(request.file, request.prompts)
    tokenizer, tokens = shared_prompts(
        prompts,
        request.model,
        request.reference,
        trust_remote_code=request.trust_remote_code,
    )
    _check_limits(request, prompts, tokens)
    order = [prompt.fingerprint for prompt in prompts]
    asked = dict(zip(order, tokens, strict=True))
    kept = _kept_answers(request, answered)
    return PreparedChat(request, scored, answered, tokenizer, asked, order, kept)


def evaluate_chat(
    prepared: PreparedChat, progress: ChatProgress = lambda what, done, total: None
) -> ChatScores:
    """Score a model on its reference's own answers.

    Both run in the dtype that is asked for, as does the reference when it answers; where none is,
    that is float32 on a CPU, and for answers bfloat16 if the processor multiplies it. Each prompt
    with its answer is scored by itself, without padding.

    Args:
        prepared: result of :func:`prepare_chat`.
        progress: called after every batch of answers and every prompt.

    Returns:
        The figures.

    Raises:
        EvalError: a model cannot be loaded, its logits are not finite, or the reference has no
            token that ends an answer.
        SvskFormatError: one is an SVSK checkpoint that this package cannot read.
    """
    request = prepared.request
    load = partial(
        load_model,
        device=_named(request.device),
        trust_remote_code=request.trust_remote_code,
    )
    reference = load(request.reference, dtype=prepared.dtype)
    ends = end_tokens(reference, prepared.tokenizer, request.reference)
    _answer_missing(prepared, reference, load, ends, progress)
    answers = [prepared.kept.answers[name] for name in prepared.order]
    scores = _scores(load(request.model, dtype=prepared.dtype), reference, answers, ends, progress)
    return summarize_chat(answers, scores, request.answer_tokens)


def _named(name: str) -> str | None:
    """A dtype or device; None where the model decides."""
    return None if name == "auto" else name


def _check_limits(
    request: ChatRequest, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]
) -> None:
    """Refuse what a model cannot take, before weights are read."""
    limits = {
        path: declared_limits(path, trust_remote_code=request.trust_remote_code)
        for path in (request.model, request.reference)
    }
    check_same_vocabulary(
        request.model,
        limits[request.model][0],
        request.reference,
        limits[request.reference][0],
    )
    for prompt, ids in zip(prompts, tokens, strict=True):
        for path, (vocabulary, longest) in limits.items():
            check_fits(path, vocabulary, None, torch.tensor([ids]))
            if longest is not None and len(ids) + request.answer_tokens > longest:
                raise EvalError(
                    f"{prompt.where}: {len(ids)} tokens, and with {request.answer_tokens} of an"
                    f" answer more than the {longest} that {path} takes. Lower --answer-tokens, or"
                    " drop the row."
                )


def _kept_answers(request: ChatRequest, dtype: str) -> AnswerFile:
    """The answers there are, none where no file keeps them."""
    limit = request.answer_tokens
    if request.answers is None:
        return AnswerFile(reference="", answer_tokens=limit, dtype=dtype, answers={})
    folder = resolve_model(request.reference, trust_remote_code=request.trust_remote_code)
    return load_answers(request.answers, read_folder(folder).fingerprint, limit, dtype)


def _answer_missing(
    prepared: PreparedChat,
    reference: PreTrainedModel,
    load: Callable[..., PreTrainedModel],
    ends: Sequence[int],
    progress: ChatProgress,
) -> None:
    """Have the reference answer what it has not, and keep every batch at once."""
    asked, kept, request = prepared.asked, prepared.kept, prepared.request
    missing = {name: tokens for name, tokens in asked.items() if name not in kept.answers}

    def done(answers: Mapping[str, Answer]) -> None:
        kept.answers.update(answers)
        if request.answers is not None:
            kept.save(request.answers)
        progress("answers", sum(name in kept.answers for name in asked), len(asked))

    progress("answers", len(asked) - len(missing), len(asked))
    if not missing:
        return
    other = prepared.answer_dtype != prepared.dtype
    answering = load(request.reference, dtype=prepared.answer_dtype) if other else reference
    greedy_answers(answering, prepared.tokenizer, missing, ends, request.answer_tokens, done)


@torch.inference_mode()
def _scores(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    answers: Sequence[Answer],
    ends: Sequence[int],
    progress: ChatProgress,
) -> list[dict[str, float | None]]:
    """Figures of every answer; the logits of one are in memory at a time."""
    scores = []
    for done, answer in enumerate(answers, start=1):
        ids = torch.tensor([answer.tokens])
        # the last place of the prompt predicts the first token of the answer
        places = slice(len(answer.prompt) - 1, -1)
        logits, ref_logits = (
            loaded(input_ids=ids.to(loaded.device), use_cache=False).logits[0, places]
            for loaded in (model, reference)
        )
        scores.append(score_answer(logits, ref_logits, answer, ends))
        progress("scores", done, len(answers))
    return scores
