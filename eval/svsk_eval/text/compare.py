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

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from svsk_eval.errors import EvalError

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

_STORED: Final = ("nll", "ref_nll", "kl", "top1")
_ENGINES: Final = ("hf", "vllm")
_AGAIN: Final = "Score it again with this version: svsk eval MODEL --text TEXT --json FILE."


@dataclass(frozen=True)
class Scores:
    """One file of ``svsk eval --json``.

    Attributes:
        path: the file.
        model: folder or hub name of the model.
        reference: the same of the reference, None without one.
        text_fingerprint: SHA-256 of the scored tokens.
        seq_len: tokens per chunk.
        per_chunk: means over chunks, float64 [C] each: ``nll``, and with a reference ``ref_nll``,
            ``delta_nll``, ``kl`` (nats per token) and ``top1`` (0 to 1). vLLM gives no ``kl``.
        engine: what ran the model, ``hf`` or ``vllm``; ``hf`` in files of versions that had nothing
            else.
        dtype: of the arithmetic, None where the file does not say.
    """

    path: Path
    model: str
    reference: str | None
    text_fingerprint: str
    seq_len: int
    per_chunk: Mapping[str, FloatArray]
    engine: str = "hf"
    dtype: str | None = None

    @property
    def chunks(self) -> int:
        """The number of chunks, C."""
        return len(self.per_chunk["nll"])


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
    """

    file: str
    model: str
    reference_gap: float | None
    metrics: Mapping[str, PairedDifference]
    engines: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The comparison as a dictionary that ``json`` can write.

        What is not known is None (null).
        """
        return asdict(self)


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
    return [compare_scores(baseline, load_scores(path, paths[0])) for path in paths[1:]]


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
    path = Path(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read it ({error.strerror}). Name a file of `svsk eval --json`."
        ) from error
    except ValueError as error:  # not UTF-8, not JSON
        raise EvalError(f"{path}: not a file of `svsk eval --json` ({error}).") from error
    needed = ("per_chunk", "text_fingerprint", "seq_len", "model")
    missing = [key for key in needed if not isinstance(stored, dict) or stored.get(key) is None]
    if missing:
        raise EvalError(
            f"{path}: has no {missing[0]}, so it cannot be compared with {partner}. {_AGAIN}"
        )
    series = _series(path, partner, stored["per_chunk"])
    if "ref_nll" in series:
        series["delta_nll"] = series["nll"] - series["ref_nll"]
    engine, dtype = stored.get("engine", "hf"), stored.get("dtype")
    if engine not in _ENGINES:
        raise EvalError(
            f"{path}: its engine is {engine!r}, expected {' or '.join(_ENGINES)}, so it cannot be"
            f" compared with {partner}. {_AGAIN}"
        )
    what = stored["model"], stored.get("reference"), stored["text_fingerprint"], stored["seq_len"]
    return Scores(path, *what, series, engine, dtype)


def compare_scores(baseline: Scores, other: Scores) -> Comparison:
    """Pair a model's figures with the baseline's.

    Args:
        baseline: what is subtracted.
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
        raise EvalError(
            f"{baseline.path} and {other.path} were scored on different tokens. {again}"
        )
    cuts = [f"{scores.chunks} chunks of {scores.seq_len} tokens" for scores in (baseline, other)]
    if cuts[0] != cuts[1]:
        raise EvalError(
            f"{baseline.path} was scored in {cuts[0]}, {other.path} in {cuts[1]}. {again}"
        )
    ours, theirs = baseline.per_chunk, other.per_chunk
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
    metrics = {name: paired(ours[name], theirs[name]) for name in both}
    return Comparison(str(other.path), other.model, gap, metrics, engines)


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


def _series(path: Path, partner: str | Path, per_chunk: Any) -> dict[str, FloatArray]:
    """The stored series, checked to be finite numbers of one length."""
    problem = f"{path}: its per_chunk is damaged, so it cannot be compared with {partner}. {_AGAIN}"
    if not isinstance(per_chunk, dict) or "nll" not in per_chunk:
        raise EvalError(problem)
    try:
        series = {
            name: np.asarray(per_chunk[name], dtype=np.float64)
            for name in _STORED
            if name in per_chunk
        }
    except (TypeError, ValueError) as error:
        raise EvalError(problem) from error
    shape = (series["nll"].size,)
    if shape == (0,) or any(
        values.shape != shape or not np.isfinite(values).all() for values in series.values()
    ):
        raise EvalError(problem)
    return series
