# SPDX-License-Identifier: Apache-2.0
"""How far a model's next-token distributions are from the text and from a reference model's.

:func:`score_chunk` turns the logits of one chunk of text into a few numbers per token, so that
logits never outlive their chunk; :func:`summarize` turns the numbers of all chunks into the metrics
with standard errors. Everything is in nats. With p the reference's and q the model's distribution
over the vocabulary, for the token t that follows:

    NLL = -log q(t)      KL = KL(p || q) = sum_v p(v) (log p(v) - log q(v))      top-1 = [argmax p
    == argmax q]

The set of metrics is that of llama.cpp's ``llama-perplexity --kl-divergence``; the standard errors
differ. Tokens of a chunk depend on one another, so the chunk and not the token is the unit of
sampling here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from svsk_eval.errors import EvalError
from svsk_eval.text.series import FloatArray, jackknife_se, mean_se
from svsk_offline.printable import html_table

__all__ = [
    "ChunkMeans",
    "ChunkScores",
    "EvalInputs",
    "EvalResult",
    "FloatArray",
    "jackknife_se",
    "mean_se",
    "score_chunk",
    "summarize",
]

BLOCK_ELEMENTS = 1 << 21
"""Logits worked on at a time.

The temporaries stay within a few tens of MB whatever the vocabulary.
"""

QUANTILE = 0.99


@dataclass(frozen=True)
class ChunkScores:
    """What is kept of one chunk of text.

    One number per predicted token and metric, all of shape [T].

    Attributes:
        nll: negative log-likelihood of the next token under the model, nats.
        ref_nll: the same under the reference; None when there is no reference, as are the next two.
        kl: KL(reference || model) of the two next-token distributions, nats; None also where they
            are not whole.
        top1: 1.0 where both models rank the same token first, else 0.0.
    """

    nll: FloatArray
    ref_nll: FloatArray | None = None
    kl: FloatArray | None = None
    top1: FloatArray | None = None


@dataclass(frozen=True)
class ChunkMeans:
    """The means over each chunk's tokens, with which evaluations of the same chunks can be paired.

    Attributes:
        nll: negative log-likelihood under the model, nats per token.
        ref_nll: the same under the reference; None when there is no reference, as are the next two.
        kl: KL(reference || model), nats per token.
        top1: share of tokens whose most likely successor is the same for both models, 0 to 1.
    """

    nll: tuple[float, ...]
    ref_nll: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None
    top1: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EvalInputs:
    """What was scored and how, to tell whether two evaluations can be compared.

    Attributes:
        model: folder or hub name of the model, as it was given.
        reference: the same of the reference, None without one.
        text_fingerprint: SHA-256 of the int64 bytes of all tokens, those put in front of the chunks
            included.
        seq_len: tokens per chunk.
        dtype: of weights and activations, such as ``float32``.
        engine: what ran the model: ``hf`` (transformers, on dequantised weights) or ``vllm`` (the
            kernels that serve).
        engine_settings: what the engine said of itself and was told, ready for JSON; None with
            transformers.
        kv: how the model's cache stored keys and values, such as ``kpc32:q4_1``; None without one.
            The reference has none.
        activations: how inputs of the model's linears were rounded, such as ``int8``; None where
            they were not. Those of the reference were not.
    """

    model: str
    reference: str | None
    text_fingerprint: str
    seq_len: int
    dtype: str
    engine: str = "hf"
    engine_settings: Mapping[str, Any] | None = None
    kv: str | None = None
    activations: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a model on a text, each with its standard error over chunks (``<name>_se``).

    A standard error is None with a single chunk; everything that compares with a reference is None
    without one, and a KL also where the engine does not give whole distributions.

    Attributes:
        nll: mean negative log-likelihood per token, nats.
        ppl: perplexity, exp(nll).
        delta_nll: nll - ref_nll, paired token by token.
        kl_mean: mean over tokens of KL(reference || model), nats.
        kl_p99: 99th percentile of that KL over all tokens, nats.
        top1: share of tokens whose most likely successor is the same for both models, 0 to 1.
        ref_nll: mean negative log-likelihood per token of the reference, nats.
        tokens: predicted tokens, all chunks together.
        chunks: chunks of text.
        per_chunk: the means of every single chunk.
        inputs: what was scored and how; None where models were not loaded by name.
    """

    nll: float
    nll_se: float | None
    ppl: float
    ppl_se: float | None
    delta_nll: float | None
    delta_nll_se: float | None
    kl_mean: float | None
    kl_mean_se: float | None
    kl_p99: float | None
    kl_p99_se: float | None
    top1: float | None
    top1_se: float | None
    ref_nll: float | None
    tokens: int
    chunks: int
    per_chunk: ChunkMeans
    inputs: EvalInputs | None = None

    def _repr_html_(self) -> str:
        names = [field.name for field in fields(self) if f"{field.name}_se" in vars(self)]
        rows = []
        for name in names:
            value, error = getattr(self, name), getattr(self, f"{name}_se")
            if value is not None:
                rows.append((name, f"{value:.5f}", "" if error is None else f"{error:.5f}"))
        note = f"{self.tokens} tokens in {self.chunks} chunks"
        return html_table(("figure", "value", "standard error"), rows, note)

    def to_json(self) -> dict[str, Any]:
        """The result as a dictionary that ``json`` can write.

        Figures that are not known are None (null). ``per_chunk`` is a dictionary of lists of the
        same length, and leaves out what is not known. The fields of ``inputs`` are keys beside the
        figures, if there are inputs; ``engine_settings``, ``kv`` and ``activations`` only if there
        are some.
        """
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        per_chunk, inputs = figures.pop("per_chunk"), figures.pop("inputs")
        means = {
            name: list(values) for name, values in asdict(per_chunk).items() if values is not None
        }
        keys = {} if inputs is None else asdict(inputs)
        for name in ("engine_settings", "kv", "activations"):
            if keys.get(name, {}) is None:
                del keys[name]
        return {**figures, **keys, "per_chunk": means}


def score_chunk(
    logits: torch.Tensor, targets: torch.Tensor, ref_logits: torch.Tensor | None = None
) -> ChunkScores:
    """Score the next-token distributions of one chunk.

    Logits are taken as float32 and shifted by their maximum; exponentials and products are float32,
    every sum over the vocabulary is float64. With x, y the shifted logits of reference and model,
    KL = sum_v e^x (x - y) / S_x
    - log S_x + log S_y, where S is the sum of exponentials. Against log-softmax in float32, whose
    rounded normaliser is an error common to the whole vocabulary, this cuts the error from about
    1e-6 to 1e-8 nats. Identical logits give exactly 0; nearly identical ones may give about -1e-8.

    Args:
        logits: the model's, [T, V], any float dtype, any device.
        targets: the tokens that follow, int64 [T].
        ref_logits: the reference's, [T, V], or None.

    Returns:
        The scores, each of shape [T].

    Raises:
        EvalError: the shapes do not fit, or a score is not finite (a model overflowed or a logit is
            infinite).
    """
    tokens, vocabulary = logits.shape
    if targets.shape != (tokens,):
        raise EvalError(
            f"targets have shape {list(targets.shape)},"
            f" the logits {list(logits.shape)} need [{tokens}]."
        )
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise EvalError(
            f"The model's logits have shape {list(logits.shape)}, the reference's"
            f" {list(ref_logits.shape)}: the two must have one vocabulary. Compare a model with the"
            " one it was made from."
        )
    targets = targets.to(logits.device)
    rows = max(1, BLOCK_ELEMENTS // vocabulary)
    blocks = []
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        reference = None if ref_logits is None else ref_logits[part].to(logits.device)
        blocks.append(_score_rows(logits[part], targets[part], reference))
    scores = torch.cat(blocks, dim=1).cpu().numpy()
    if not np.isfinite(scores).all():
        position = int(np.flatnonzero(~np.isfinite(scores).all(axis=0))[0])
        raise EvalError(
            f"The scores at position {position} of a chunk are not finite: NaN or infinite logits. "
            "Evaluate in float32, and check the weights if it persists."
        )
    return ChunkScores(*scores)


def summarize(chunks: Sequence[ChunkScores]) -> EvalResult:
    """Metrics and standard errors of all chunks.

    Chunks have equal length, so the mean over all tokens is the mean of the chunk means, and its
    standard error is s / sqrt(C) with s the sample standard deviation (ddof 1) of the C chunk
    means. For the perplexity it follows by the delta method: se(exp(nll)) = exp(nll) se(nll). For
    the percentile see :func:`jackknife_se`.

    Args:
        chunks: scores of at least one chunk; all of one length, all with or all without a
            reference.

    Returns:
        The metrics; standard errors are None for a single chunk.

    Raises:
        EvalError: there is no chunk, or the chunks differ in length or in having a reference.
    """
    if not chunks:
        raise EvalError("There is nothing to summarise: no chunk was scored.")
    nll = _stack([chunk.nll for chunk in chunks])
    ref_nll, kl, top1 = (
        _stack_optional([getattr(chunk, name) for chunk in chunks], name)
        for name in ("ref_nll", "kl", "top1")
    )
    ppl = float(np.exp(nll.mean()))
    nll_se = mean_se(nll)
    delta = None if ref_nll is None else nll - ref_nll
    return EvalResult(
        nll=float(nll.mean()),
        nll_se=nll_se,
        ppl=ppl,
        ppl_se=None if nll_se is None else ppl * nll_se,
        delta_nll=_mean(delta),
        delta_nll_se=None if delta is None else mean_se(delta),
        kl_mean=_mean(kl),
        kl_mean_se=None if kl is None else mean_se(kl),
        kl_p99=None if kl is None else float(np.quantile(kl, QUANTILE)),
        kl_p99_se=None if kl is None else jackknife_se(kl, QUANTILE),
        top1=_mean(top1),
        top1_se=None if top1 is None else mean_se(top1),
        ref_nll=_mean(ref_nll),
        tokens=nll.size,
        chunks=nll.shape[0],
        per_chunk=ChunkMeans(
            _chunk_means(nll),
            *(None if values is None else _chunk_means(values) for values in (ref_nll, kl, top1)),
        ),
    )


def _score_rows(
    logits: torch.Tensor, targets: torch.Tensor, ref_logits: torch.Tensor | None
) -> torch.Tensor:
    """Float64 [1, T] (nll) or [4, T] (nll, ref_nll, kl, top1) of a few rows of logits [T, V]."""
    model, log_sum = _shifted(logits)
    nll = log_sum - _at(model, targets)
    if ref_logits is None:
        return nll.unsqueeze(0)
    reference, ref_log_sum = _shifted(ref_logits)
    ref_nll = ref_log_sum - _at(reference, targets)
    weighted = reference.exp() * (reference - model)
    kl = weighted.sum(-1, dtype=torch.float64) / ref_log_sum.exp() - ref_log_sum + log_sum
    top1 = (logits.argmax(-1) == ref_logits.argmax(-1)).double()
    return torch.stack([nll, ref_nll, kl, top1])


def _shifted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits [T, V] less their row maximum, and float64 log sums of exponentials [T]."""
    shifted = logits.float()
    shifted = shifted - shifted.amax(-1, keepdim=True)
    return shifted, shifted.exp().sum(-1, dtype=torch.float64).log()


def _at(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The entry of each row of ``values`` [T, V] that ``targets`` [T] names, float64 [T]."""
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()


def _stack(rows: Sequence[FloatArray]) -> FloatArray:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise EvalError(
            f"Chunks must have one length, got chunks of {lengths[0]} and of {lengths[-1]} tokens."
        )
    if lengths[0] == 0:
        raise EvalError("The chunks hold no predicted token.")
    return np.stack(rows).astype(np.float64)


def _stack_optional(rows: Sequence[FloatArray | None], name: str) -> FloatArray | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if len(present) != len(rows):
        raise EvalError(
            f"{name}: {len(present)} of {len(rows)} chunks have it;"
            " score all with a reference or none."
        )
    return _stack(present)


def _mean(values: FloatArray | None) -> float | None:
    return None if values is None else float(values.mean())


def _chunk_means(values: FloatArray) -> tuple[float, ...]:
    return tuple(values.mean(axis=1).tolist())
