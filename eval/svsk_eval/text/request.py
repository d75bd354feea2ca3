# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` is asked for, and the engine that answers it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from svsk_eval.errors import EvalError
from svsk_eval.text.generate import ENGINES
from svsk_eval.text.metrics import EvalResult
from svsk_eval.text.scoring import ChunkProgress, EachChunk, evaluate
from svsk_eval.text.served import evaluate_served
from svsk_offline.choices import choose
from svsk_vllm.kv_cache import KvKinds

__all__ = ["TextRequest", "score"]


class TextRequest(BaseModel):
    """A model to score on a text.

    Attributes:
        model: folder or hub name.
        reference: the same of the model to compare with, or None.
        text: plain text file.
        chunks: how many to score.
        seq_len: tokens per chunk.
        engine: ``hf`` for the dequantised weights, ``vllm`` for the served model.
        dtype: of the arithmetic, ``auto`` or torch's name.
        device: ``auto`` or torch's name; for ``hf``.
        engine_args: further arguments of ``vllm.LLM``.
        trust_remote_code: run Python files that come with the models.
        kv: how the model's cache stores keys and values, as :meth:`KvKinds.parse` takes it; for
            ``hf``. None is no cache.
        activations: how inputs of the model's linears are rounded, a key of
            :data:`svsk_eval.text.activations.ACTIVATIONS`; for ``hf``. None is not at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    reference: str | None
    text: Path
    chunks: int
    seq_len: int
    engine: str = "hf"
    dtype: str = "auto"
    device: str = "auto"
    engine_args: dict[str, Any] = {}
    trust_remote_code: bool = False
    kv: str | None = None
    activations: str | None = None


def score(
    request: TextRequest,
    progress: ChunkProgress | None = None,
    each: EachChunk | None = None,
) -> EvalResult:
    """Score a text with the engine that is asked for.

    Args:
        request: what is scored.
        progress: called after every chunk.
        each: given every chunk's tokens and scores; for ``hf``.

    Raises:
        EvalError: there is no such engine, it does not take an option, it gives no scores of
            tokens, or the text cannot be scored.
        SvskError: the model cannot be scored with the cache that is asked for.
    """
    _check_engine(request)
    what = request.model, request.reference, request.text, request.chunks, request.seq_len
    if request.engine == "vllm":
        if each is not None:
            raise EvalError("--engine vllm: gives no KL of tokens. Score with --engine hf.")
        trust = {"trust_remote_code": True} if request.trust_remote_code else {}
        return evaluate_served(*what, request.dtype, {**request.engine_args, **trust}, progress)
    return evaluate(
        *what,
        dtype=None if request.dtype == "auto" else request.dtype,
        device=None if request.device == "auto" else request.device,
        progress=progress,
        trust_remote_code=request.trust_remote_code,
        kv=None if request.kv is None else KvKinds.parse(request.kv),
        activations=request.activations,
        each=each,
    )


def _check_engine(request: TextRequest) -> None:
    choose("--engine", request.engine, ENGINES)
    if request.engine == "vllm" and request.device != "auto":
        raise EvalError(
            f"--device {request.device}: vLLM chooses the device itself. Leave --device out, or"
            " hide devices from it with CUDA_VISIBLE_DEVICES."
        )
    if request.engine == "vllm" and request.kv is not None:
        raise EvalError(
            f"--kv {request.kv}: goes with --engine hf only, vLLM serves from caches of its own."
            " Choose one of those with --engine-arg kv_cache_dtype=..., or score with --engine hf."
        )
    if request.engine == "vllm" and request.activations is not None:
        raise EvalError(
            f"--activations {request.activations}: emulated with --engine hf only. Set"
            " SVSK_ACTIVATIONS=int8 to score what vLLM serves in int8."
        )
    if request.engine != "vllm" and request.engine_args:
        raise EvalError(
            f"--engine-arg {next(iter(request.engine_args))}: goes with --engine vllm only. Leave"
            " it out."
        )
