# SPDX-License-Identifier: Apache-2.0
"""What ``svsk sweep`` writes into ``sweep.json``: a row for each model, and what all share.

It holds no weights, and the pages of docs/benchmarks are made of such files.
"""

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from svsk_eval.report.schema import load_document

__all__ = [
    "SCHEMA_VERSION",
    "Recovery",
    "Size",
    "SweepReport",
    "SweepRow",
    "TaskScore",
    "TextFigures",
    "load_sweep",
]

SCHEMA_VERSION: Final = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Size(_Model):
    """How large a checkpoint is, and what making it took.

    Attributes:
        bits_per_weight: stored bits of the linears of the decoder blocks over their weights.
        bits_per_weight_of_all: stored bits of all tensors, embedding and output head among them,
            over all weights of the model; what is tied counts once.
        size_bytes: of all stored tensors.
        seconds: of quantising; None for the reference, and where a run was interrupted.
        made_with: recipe or settings, versions, calibration: what tells how it was made.
    """

    bits_per_weight: float
    bits_per_weight_of_all: float
    size_bytes: int
    seconds: float | None = None
    made_with: dict[str, Any] = {}


class TextFigures(_Model):
    """How far the predictions on the text are from the reference's, see ``svsk eval``.

    Attributes:
        nll: mean negative log-likelihood, nats per token; ``delta_nll`` less the reference's.
        kl_mean: mean KL(reference || model), nats per token.
        top1: share of positions where model and reference predict the same token.
        per_chunk: means over chunks, by figure, for paired differences.

    A name that ends in ``_se`` is the standard error over chunks of the figure before it.
    """

    nll: float
    nll_se: float | None = None
    delta_nll: float
    delta_nll_se: float | None = None
    kl_mean: float
    kl_mean_se: float | None = None
    top1: float
    top1_se: float | None = None
    per_chunk: dict[str, tuple[float, ...]]


class TaskScore(_Model):
    """A model on a task.

    Attributes:
        metric: lm-eval's name of it and of the filter.
        items: how many.
        score: mean over the items.
        score_se: its standard error.
    """

    metric: str
    items: int
    score: float
    score_se: float | None = None


class Recovery(_Model):
    """Mean over tasks of the variant's score divided by the reference's; 95% interval."""

    mean: float
    low: float | None = None
    high: float | None = None


class SweepRow(_Model):
    """One model.

    Attributes:
        label: unique in a report.
        title: what it is, in words.
        kind: the dense reference, an SVSK checkpoint, or another quantiser's.
        error: why it could not be made or scored, in a line; then there is no figure.
        size: None with an error.
        text: None for the reference, and with an error.
        tasks: scores by name; empty where no tasks were run.
        recovery: over the tasks; None where there is none.
    """

    label: str
    title: str
    kind: Literal["reference", "svsk", "peer"]
    error: str | None = None
    size: Size | None = None
    text: TextFigures | None = None
    tasks: dict[str, TaskScore] = {}
    recovery: Recovery | None = None


class SweepReport(_Model):
    """The file.

    Attributes:
        created: time in UTC, ISO 8601.
        command: the command line, with folders shortened to their names.
        hardware: processor or GPU, in words.
        model: name of the reference's folder.
        settings: what all rows depend on, in words that ``svsk sweep`` compares.
        rows: the reference first.
    """

    kind: Literal["svsk-sweep"] = "svsk-sweep"
    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: str
    hardware: str
    model: str
    settings: dict[str, Any]
    rows: tuple[SweepRow, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _reference_first(self) -> "SweepReport":
        labels = [row.label for row in self.rows]
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels are not unique: {', '.join(labels)}")
        if [row.kind == "reference" for row in self.rows] != [True] + [False] * (len(labels) - 1):
            raise ValueError("the first row, and no other, is the reference")
        return self


def load_sweep(path: str | Path) -> SweepReport:
    """Read a file of ``svsk sweep``.

    Raises:
        EvalError: it is missing or not such a file.
    """
    return load_document(SweepReport, path, "sweep.json", "svsk sweep")
