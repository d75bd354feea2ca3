# SPDX-License-Identifier: Apache-2.0
"""Compare models that ``svsk eval --json`` scored on the same tokens, chunk by chunk.

Most of the spread between chunks is the text's and common to all models, so the difference of two
models on the same chunk is known far better than either figure: with d_c the difference of the
means over chunk c, of C chunks,

    difference = mean(d)      standard error = s(d) / sqrt(C)      p = two-sided one-sample t-test
    of mean(d) = 0

Models scored by different engines (``hf``, ``vllm``) may be compared: on one checkpoint the NLL
difference is a check of the kernels that serve it. The comparison names the engines, as on two
checkpoints it mixes the two differences.

The p-values are not corrected for the number of models that are compared. Nothing here needs torch.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from scipy import stats

from svsk_eval.errors import EvalError, first_problem

__all__ = [
    "Comparison",
    "PairedDifference",
    "Scores",
    "compare_files",
    "compare_scores",
    "load_scores",
    "paired",
]

FloatArray = npt.NDArray[np.float64]

_AGAIN: Final = "Score it again with this version: svsk eval MODEL --text TEXT --json FILE."


class Scores(BaseModel):
    """One file of ``svsk eval --json``.

    Attributes:
        model: folder or hub name of the model.
        reference: the same of the reference, None without one.
        text_fingerprint: SHA-256 of the scored tokens.
        seq_len: tokens per chunk.
        per_chunk: means over chunks, C each: ``nll``, and with a reference ``ref_nll``, ``kl``
            (nats per token) and ``top1`` (0 to 1). vLLM gives no ``kl``.
        engine: what ran the model, ``hf`` or ``vllm``; ``hf`` in files of versions that had nothing
            else.
        dtype: of the arithmetic, None where the file does not say.
        kv: how keys and values were stored, keys before the colon; None where they were not.
        activations: how inputs of linears were rounded; None where they were not.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    model: str
    reference: str | None = None
    text_fingerprint: str
    seq_len: int
    per_chunk: Mapping[str, tuple[float, ...]]
    engine: Literal["hf", "vllm"] = "hf"
    dtype: str | None = None
    kv: str | None = None
    activations: str | None = None

    @field_validator("per_chunk")
    @classmethod
    def _one_length(cls, series: Mapping[str, tuple[float, ...]]) -> Any:
        if not series.get("nll") or len(set(map(len, series.values()))) > 1:
            raise ValueError("expected nll, and as many values in every series")
        return series

    @property
    def chunks(self) -> int:
        """The number of chunks, C."""
        return len(self.per_chunk["nll"])

    @property
    def series(self) -> dict[str, FloatArray]:
        """The series, float64 [C] each; with a reference also ``delta_nll``."""
        series = {name: np.array(values) for name, values in self.per_chunk.items()}
        if "ref_nll" in series:
            series["delta_nll"] = series["nll"] - series["ref_nll"]
        return series


@dataclass(frozen=True)
class PairedDifference:
    """One figure of a model and of the baseline, over the same chunks.

    Attributes:
        baseline: the baseline's mean over chunks.
        value: the model's.
        difference: value - baseline.
        se: standard error of the difference over chunks; None with a single chunk.
        p: two-sided p-value of the difference being zero; None with a single chunk and where no
            chunk differs.
    """

    baseline: float
    value: float
    difference: float
    se: float | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline.

    Attributes:
        file: the model's file, as it was given.
        model: folder or hub name of the model.
        reference_gap: largest difference over chunks between the reference's NLL in the two files,
            nats per token; more than rounding means that KL and top-1 are against different
            references. None without references.
        metrics: ``nll``, and ``delta_nll``, ``kl`` and ``top1`` if both files have them.
        engines: engine and dtype of the baseline and of the model, such as ``vllm bfloat16``, if
            the engines differ.
        rounding: what was rounded besides weights in baseline and model, such as ``cache
            kpc32:q4_1`` or ``nothing``, if that differs.
    """

    file: str
    model: str
    reference_gap: float | None
    metrics: Mapping[str, PairedDifference]
    engines: tuple[str, str] | None = None
    rounding: tuple[str, str] | None = None


def compare_files(paths: Sequence[str | Path]) -> list[Comparison]:
    """Compare files of ``svsk eval --json`` with the first of them.

    Args:
        paths: the baseline, and at least one other.

    Returns:
        One comparison for each file but the first, in their order.

    Raises:
        EvalError: fewer than two files; a file is missing, damaged, or without figures per chunk;
            or one was scored on other tokens than the baseline.
    """
    if len(paths) < 2:
        raise EvalError(
            f"Got {len(paths)} file(s) to compare: expected a baseline and at least one other."
        )
    baseline = load_scores(paths[0], paths[1])
    return [
        compare_scores(paths[0], baseline, path, load_scores(path, paths[0])) for path in paths[1:]
    ]


def load_scores(path: str | Path, partner: str | Path) -> Scores:
    """Read a file of ``svsk eval --json``.

    Args:
        path: the file.
        partner: the file it is to be compared with, for error messages.

    Returns:
        Its figures per chunk.

    Raises:
        EvalError: it is missing, is not what ``svsk eval`` writes, or has no figures per chunk.
    """
    try:
        return Scores.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read it ({error.strerror}). Name a file of `svsk eval --json`."
        ) from error
    except ValidationError as error:
        raise EvalError(
            f"{path}: not a file of `svsk eval --json` that can be compared with {partner}:"
            f" {first_problem(error)}. {_AGAIN}"
        ) from error


def compare_scores(
    first: str | Path, baseline: Scores, path: str | Path, other: Scores
) -> Comparison:
    """Pair a model's figures with the baseline's.

    Args:
        first: the baseline's file.
        baseline: what is subtracted.
        path: the model's file.
        other: the model.

    Returns:
        The paired differences of all figures that both have.

    Raises:
        EvalError: they were not scored on the same tokens in the same chunks.
    """
    again = (
        "Score both with the same --text, --chunks and --seq-len, and with the tokenizer of the"
        " same model."
    )
    if baseline.text_fingerprint != other.text_fingerprint:
        raise EvalError(f"{first} and {path} were scored on different tokens. {again}")
    cuts = [f"{scores.chunks} chunks of {scores.seq_len} tokens" for scores in (baseline, other)]
    if cuts[0] != cuts[1]:
        raise EvalError(f"{first} was scored in {cuts[0]}, {path} in {cuts[1]}. {again}")
    ours, theirs = baseline.series, other.series
    both = [name for name in ("nll", "delta_nll", "kl", "top1") if name in ours and name in theirs]
    gap = None
    if "ref_nll" in ours and "ref_nll" in theirs:
        gap = float(np.abs(ours["ref_nll"] - theirs["ref_nll"]).max())
    engines = None
    if baseline.engine != other.engine:
        named = [
            " ".join(filter(None, (scores.engine, scores.dtype))) for scores in (baseline, other)
        ]
        engines = (named[0], named[1])
    rounding = None
    if (baseline.kv, baseline.activations) != (other.kv, other.activations):
        rounding = (_rounding(baseline), _rounding(other))
    metrics: dict[str, PairedDifference] = {name: paired(ours[name], theirs[name]) for name in both}
    return Comparison(str(path), other.model, gap, metrics, engines, rounding)


def _rounding(scores: Scores) -> str:
    """What was rounded besides the model's weights."""
    named = {"cache": scores.kv, "activations": scores.activations}
    given = [f"{what} {kind}" for what, kind in named.items() if kind is not None]
    return ", ".join(given) or "nothing"


def paired(baseline: FloatArray, values: FloatArray) -> PairedDifference:
    """The mean difference of two series over the same chunks, its standard error and its p-value.

    Args:
        baseline: one value per chunk, [C].
        values: the same of the model, [C].
    """
    differences = values - baseline
    count = len(differences)
    error = p = None
    if count > 1:
        error = float(differences.std(ddof=1) / np.sqrt(count))
        with warnings.catch_warnings():
            # Differences that are all the same: scipy warns that their spread is rounding, and
            # gives 0 or NaN.
            warnings.simplefilter("ignore", RuntimeWarning)
            p = float(stats.ttest_1samp(differences, 0.0).pvalue)
        p = None if np.isnan(p) else p
    return PairedDifference(
        float(baseline.mean()), float(values.mean()), float(differences.mean()), error, p
    )
