# SPDX-License-Identifier: Apache-2.0
"""Score a text with the model as vLLM serves it.

The run-time kernels are measured, not the dequantised weights.

vLLM's prompt log-probabilities hold, for every token of a prompt but the first, its log-probability
and the likeliest token at its place. The negative log-likelihood and top-1 agreement of ``svsk
eval`` follow from them. A KL divergence does not: it takes the whole distribution at every place.

Where bfloat16 or float16 logits tie for the first place, the top token is the one vLLM names: its
``topk`` may pick another of the tied tokens than the ``argmax`` of the transformers path does.

Each model runs in a process of its own, ``python -m svsk_eval.text.served``: vLLM keeps global
state, and only the end of the process surely frees the memory of an accelerator.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, JsonValue, ValidationError
from safetensors import safe_open

from svsk_eval.errors import EvalError, first_problem
from svsk_eval.processes import answer_request, run_request
from svsk_eval.text.engine_args import engine_arguments
from svsk_eval.text.metrics import ChunkScores, EvalInputs, EvalResult, FloatArray, summarize
from svsk_eval.text.models import check_fits, check_same_vocabulary, declared_limits, is_svsk
from svsk_eval.text.scoring import ChunkProgress, shared_tokens
from svsk_offline.calibration.text import token_fingerprint
from svsk_offline.storage.atomic import write_tensors

__all__ = ["ServedScores", "chunk_scores", "evaluate_served", "served_scores"]


RESULT: Final = "result.safetensors"


class ServeRequest(BaseModel):
    """Arguments of ``vllm.LLM``, and the chunks of tokens that it is to score."""

    engine: dict[str, JsonValue]
    tokens: list[list[int]]


@dataclass(frozen=True, eq=False)
class ServedScores:
    """What vLLM says of every predicted token.

    Attributes:
        logprobs: natural logarithm of the probability of each chunk's tokens from the second on,
            float64 [chunks, seq_len - 1]; all finite.
        top: likeliest token at the same places, int64 [chunks, seq_len - 1].
        dtype: of weights and activations, such as ``bfloat16``.
        settings: ``vllm`` (its version), ``device`` (``cpu``, ``cuda``), ``svsk_kernels`` (that
            serve the layers; None where they run in processes of their own, or none is quantised)
            and ``engine_args`` (as given).
    """

    logprobs: FloatArray
    top: npt.NDArray[np.int64]
    dtype: str
    settings: Mapping[str, Any]


def evaluate_served(
    model_path: str | Path,
    reference_path: str | Path | None,
    text: str | Path,
    chunks: int | None = 32,
    seq_len: int = 512,
    dtype: str = "auto",
    engine_args: Mapping[str, Any] | None = None,
    progress: ChunkProgress | None = None,
) -> EvalResult:
    """Score a model on a text as vLLM serves it, against a reference if there is one.

    Tokens are those of :func:`svsk_eval.text.scoring.evaluate`.

    Args:
        model_path: a Hugging Face folder, dense or SVSK, or the name of a model on the hub.
        reference_path: the same for the model it is compared with, or None.
        text: a plain text file.
        chunks: how many chunks to score, or None for all there are.
        seq_len: tokens per chunk.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, what vLLM chooses for the model:
            its checkpoint's, or one of 16 bits for a float32 checkpoint; on a CPU that does not
            multiply bfloat16, float32. The reference is served in the model's.
        engine_args: for ``vllm.LLM``, of both models.
        progress: called with the chunks done and the chunks of all models together, first with 0.

    Returns:
        The metrics; those of the KL divergence are None.

    Raises:
        EvalError: a model, a tokenizer, the text or an engine argument cannot be used, the models
            have different vocabularies, or vLLM fails.
    """
    trust = bool((engine_args or {}).get("trust_remote_code"))
    tokens = shared_tokens(
        model_path, reference_path, text, chunks, seq_len, trust_remote_code=trust
    )
    size = _check_model(model_path, tokens, trust)
    if reference_path is not None:
        check_same_vocabulary(
            model_path, size, reference_path, _check_model(reference_path, tokens, trust)
        )
    total = len(tokens) * (1 if reference_path is None else 2)

    def report(before: int) -> ChunkProgress | None:
        return None if progress is None else lambda done, _: progress(before + done, total)

    model = served_scores(
        model_path, tokens, dtype=dtype, engine_args=engine_args, progress=report(0)
    )
    reference = None
    if reference_path is not None:
        reference = served_scores(
            reference_path,
            tokens,
            dtype=model.dtype,
            engine_args=engine_args,
            progress=report(len(tokens)),
        )
    inputs = EvalInputs(
        model=str(model_path),
        reference=None if reference_path is None else str(reference_path),
        text_fingerprint=token_fingerprint(tokens),
        seq_len=seq_len,
        dtype=model.dtype,
        engine="vllm",
        engine_settings=model.settings,
    )
    return replace(summarize(_paired(model, reference)), inputs=inputs)


def served_scores(
    model: str | Path,
    tokens: torch.Tensor,
    *,
    dtype: str = "auto",
    engine_args: Mapping[str, Any] | None = None,
    progress: ChunkProgress | None = None,
) -> ServedScores:
    """Log-probabilities of tokens under a model that vLLM serves, in a process of its own.

    Args:
        model: a Hugging Face folder, dense or SVSK, or the name of a model on the hub.
        tokens: int64 [chunks, seq_len], every chunk a prompt with what the tokenizer puts in front
            of a text.
        dtype: of the arithmetic, ``auto`` as for :func:`evaluate_served`.
        engine_args: further arguments for ``vllm.LLM``, values as in JSON.
        progress: called with the chunks done and all chunks, first with 0.

    Returns:
        The scores.

    Raises:
        EvalError: vLLM or the plugin is not installed, an argument is not accepted, the tokens do
            not fit the model, vLLM fails (the message ends with its log), or a log-probability is
            not finite.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise EvalError(
            f"The tokens have shape {list(tokens.shape)}, expected [chunks,"
            " seq_len], seq_len 2 or more."
        )
    _check_vllm()
    arguments = engine_arguments(model, tokens.shape[1], dtype, engine_args or {})
    _check_model(model, tokens, bool((engine_args or {}).get("trust_remote_code")))
    if is_svsk(model):
        _check_plugin(model)
    try:
        request = ServeRequest(engine=arguments, tokens=tokens.tolist())
    except ValidationError as error:
        raise EvalError(
            f"The engine arguments {engine_args} are not JSON: {first_problem(error)}."
        ) from error
    total = len(tokens)
    show = progress or (lambda done, total: None)
    show(0, total)
    with tempfile.TemporaryDirectory(prefix="svsk-served-") as name:
        folder = Path(name)
        run_request(
            "svsk_eval.text.served",
            request,
            folder,
            str(model),
            lambda message: show(message["done"], total),
        )
        scores = _read_result(model, folder / RESULT, (total, tokens.shape[1] - 1))
    return replace(scores, settings={**scores.settings, "engine_args": dict(engine_args or {})})


def chunk_scores(
    tokens: Sequence[int], places: Sequence[Mapping[int, Any] | None] | None
) -> tuple[list[float], list[int]]:
    """Log-probabilities and top tokens of one chunk.

    Args:
        tokens: the prompt, T of them.
        places: vLLM's ``prompt_logprobs``, one per token of the prompt. Each maps token ids to
            objects with ``logprob`` and ``rank``: the prompt's own token, and the likeliest if that
            is another one. The first is None.

    Returns:
        Log-probabilities of the tokens from the second on, and the likeliest tokens at the same
        places, T - 1 each.

    Raises:
        EvalError: a place or an entry is missing.
    """
    if places is None or len(places) != len(tokens):
        count = "no" if places is None else str(len(places))
        raise EvalError(
            f"vLLM gave {count} prompt log-probabilities for a prompt of {len(tokens)} tokens."
        )
    logprobs, top = [], []
    for position in range(1, len(tokens)):
        entries, target = places[position] or {}, tokens[position]
        # With a tie at the top the prompt's own token may have rank 1 beside the one topk has
        # chosen.
        first = [token for token, entry in entries.items() if entry.rank == 1]
        if target not in entries or not first:
            raise EvalError(
                f"Place {position} of a prompt: vLLM gave log-probabilities of the tokens"
                f" {sorted(entries)}, expected the prompt's own token {target} and the likeliest"
                " one."
            )
        logprobs.append(float(entries[target].logprob))
        top.append(min(first, key=lambda token: (-entries[token].logprob, token)))
    return logprobs, top


def serve(request_file: Path, report: Callable[..., None]) -> None:
    """The process of one model: score the request's chunks; ``report`` gets how many are ``done``.

    The scores go into ``result.safetensors`` beside the request.
    """
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    request = ServeRequest.model_validate_json(request_file.read_bytes())
    llm: Any = LLM(**request.engine)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    together: Any = request.engine["max_num_seqs"]
    scores: list[tuple[list[float], list[int]]] = []
    for start in range(0, len(request.tokens), together):
        part = request.tokens[start : start + together]
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in part], params, use_tqdm=False
        )
        for tokens, output in zip(part, outputs, strict=True):
            if list(output.prompt_token_ids) != tokens:
                raise EvalError("vLLM scored another prompt than it was given.")
            scores.append(chunk_scores(tokens, output.prompt_logprobs))
        report(done=len(scores))
    config = llm.llm_engine.vllm_config
    extra = config.additional_config
    settings = {
        "vllm": version,
        "device": str(config.device_config.device_type),
        # The plugin notes them there in the process that holds the layers.
        "svsk_kernels": extra.get("svsk_kernels") if isinstance(extra, dict) else None,
    }
    described = {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "settings": json.dumps(settings),
    }
    tensors = {
        "logprobs": torch.tensor([row for row, _ in scores], dtype=torch.float64),
        "top": torch.tensor([row for _, row in scores], dtype=torch.int64),
    }
    write_tensors(request_file.with_name(RESULT), tensors, described)


def _paired(model: ServedScores, reference: ServedScores | None) -> list[ChunkScores]:
    """Scores chunk by chunk, against the reference's if there is one."""
    if reference is None:
        return [ChunkScores(nll=-row) for row in model.logprobs]
    same = (model.top == reference.top).astype(np.float64)
    rows = zip(model.logprobs, reference.logprobs, same, strict=True)
    return [ChunkScores(nll=-ours, ref_nll=-theirs, top1=agreed) for ours, theirs, agreed in rows]


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise EvalError(
            "--engine vllm: vLLM is not installed in this environment. Install it, or use"
            " --engine hf."
        )


def _check_plugin(model: str | Path) -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "svsk" not in allowed.split(","):
        raise EvalError(
            f"{model}: an SVSK checkpoint, but VLLM_PLUGINS={allowed} keeps its plugin out."
            " Add svsk."
        )
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="svsk"):
        raise EvalError(
            f"{model}: an SVSK checkpoint, but its vLLM plugin is not installed in {sys.prefix}."
            " Install svsk-vllm there with pip, or use --engine hf."
        )


def _check_model(path: str | Path, tokens: torch.Tensor, trust_remote_code: bool) -> int:
    """Size of a model's vocabulary by its config; the tokens must leave room for one more."""
    size, longest = declared_limits(path, trust_remote_code=trust_remote_code)
    check_fits(path, size, longest, tokens)
    if longest is not None and tokens.shape[1] == longest:
        raise EvalError(
            f"{path}: takes {longest} tokens at most, and vLLM needs room for one after the"
            f" {tokens.shape[1]} of a chunk. Use --seq-len {longest - 1} or less, or --engine hf."
        )
    return size


def _read_result(model: str | Path, path: Path, shape: tuple[int, int]) -> ServedScores:
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata()
            logprobs, top = (file.get_tensor(name).numpy() for name in ("logprobs", "top"))
    except OSError as error:
        raise EvalError(f"{model}: its vLLM process ended without a result ({error}).") from error
    if logprobs.shape != shape or top.shape != shape:
        raise EvalError(
            f"{model}: vLLM gave scores of shape {list(logprobs.shape)}, expected {list(shape)}."
        )
    broken = np.argwhere(~np.isfinite(logprobs))
    if len(broken):
        chunk, place = broken[0]
        raise EvalError(
            f"{model}: the log-probability of token {place + 1} of chunk {chunk} is"
            f" {logprobs[chunk, place]}, and {len(broken)} of {logprobs.size} are not finite, in"
            f" {described['dtype']}. Try another --dtype, and check the weights with --engine hf"
            " --dtype float32."
        )
    return ServedScores(logprobs, top, described["dtype"], json.loads(described["settings"]))


if __name__ == "__main__":
    answer_request(serve)
