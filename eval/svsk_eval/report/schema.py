# SPDX-License-Identifier: Apache-2.0
"""What ``svsk bench --json`` writes.

Every model's scores item by item, so that any two can be compared in pairs.
"""

from collections.abc import Sized
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svsk_eval.errors import EvalError, first_problem

__all__ = [
    "SCHEMA_VERSION",
    "BenchReport",
    "BenchSettings",
    "Engine",
    "Generation",
    "ModelRun",
    "ReferenceAnswers",
    "TaskRun",
    "TextScores",
    "load_document",
    "load_report",
]

SCHEMA_VERSION: Final = 1

Engine = Literal["vllm", "hf"]
Document = TypeVar("Document", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ReferenceAnswers(_Model):
    """A variant on the reference's own answers to the first items of a task, token by token.

    All lists have one entry per item, in the order of ``doc_ids``.

    Attributes:
        answers_fingerprint: SHA-256 of the tokens of all prompts and answers.
        doc_ids: numbers of the items in the task's data.
        tokens: of an answer that were scored, its end not counted.
        per_item: figures by name, those of :mod:`svsk_eval.chat.metrics` and ``first_flip``, the
            tokens before the first place where the models' likeliest ones differ; None where an
            answer has no such figure.
        left_out: items whose answers could not be scored.
    """

    answers_fingerprint: str
    doc_ids: tuple[int, ...] = Field(min_length=1)
    tokens: tuple[int, ...]
    per_item: dict[str, tuple[float | None, ...]]
    left_out: int

    @model_validator(mode="after")
    def _same_lengths(self) -> "ReferenceAnswers":
        for name, found in {"tokens": self.tokens, **self.per_item}.items():
            if len(found) != len(self.doc_ids):
                raise ValueError(f"{name} has {len(found)} entries, doc_ids {len(self.doc_ids)}")
        return self


class TaskRun(_Model):
    """One model on one task. All lists have one entry per item, in the order of ``doc_ids``.

    Attributes:
        task: lm-eval's name of the task.
        version: the version in the task's file.
        output_type: lm-eval's: ``generate_until``, ``multiple_choice``, ...
        num_fewshot: solved examples in the prompt.
        primary: the key of ``scores`` that reports show; the higher, the better.
        doc_ids: numbers of the items in the task's data.
        item_hashes: of an item's prompts and target; items of two models are a pair if these are
            equal.
        scores: per metric and filter (``exact_match,strict-match``), values of the items, 0 to 1
            for rates of success; with several answers to an item, their mean.
        on_reference: figures on the reference's own answers, if they were asked for; None for the
            reference.
        elsewhere: answers that were made otherwise than the others and merged on purpose, by what
            was different there.
        repeat_scores: those of the primary metric by answer, [items][answers]; None with one each.
        output_tokens: tokens the model wrote, averaged over an item's repeats; None for tasks
            without generation.
        terminated: share of an item's answers that ended by themselves (end of text or a stop
            string) rather than at the limit of tokens; None for tasks without generation.
    """

    task: str
    version: str
    output_type: str
    num_fewshot: int
    primary: str
    doc_ids: tuple[int, ...] = Field(min_length=1)
    item_hashes: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]
    output_tokens: tuple[float, ...] | None = None
    terminated: tuple[float, ...] | None = None
    repeat_scores: tuple[tuple[float, ...], ...] | None = None
    on_reference: ReferenceAnswers | None = None
    elsewhere: dict[str, int] = {}

    @property
    def repeats(self) -> int:
        """Answers to each item."""
        return len(self.repeat_scores[0]) if self.repeat_scores else 1

    @model_validator(mode="after")
    def _same_lengths(self) -> "TaskRun":
        if self.primary not in self.scores:
            raise ValueError(f"task {self.task}: no scores for its primary metric {self.primary!r}")
        lists: dict[str, Sized] = {"item_hashes": self.item_hashes, **self.scores}
        for name in ("output_tokens", "terminated"):
            if (values := getattr(self, name)) is not None:
                lists[name] = values
        if self.repeat_scores is not None:
            lists["repeat_scores"] = self.repeat_scores
            counts = {len(scores) for scores in self.repeat_scores}
            if len(counts) != 1 or min(counts) < 2:
                raise ValueError(
                    f"task {self.task}: repeat_scores has {sorted(counts)} scores for an item,"
                    " expected as many for each, and two or more"
                )
        for name, found in lists.items():
            if len(found) != len(self.doc_ids):
                raise ValueError(
                    f"task {self.task}: {name} has {len(found)} entries, doc_ids"
                    f" {len(self.doc_ids)}"
                )
        return self


class TextScores(_Model):
    """Figures of ``svsk eval`` on one text, see :class:`svsk_eval.text.metrics.EvalResult`.

    Attributes:
        engine: what computed them: ``vllm`` the served model, ``hf`` its dequantised weights.
        text_fingerprint: SHA-256 of the scored tokens.
        tokens: that were predicted.
        chunks: pieces of text, each with an empty context.
        seq_len: tokens per chunk.
        nll: mean negative log-likelihood, nats per token.
        kl_mean: mean KL(reference || model), nats per token; kl_p99 its 99th percentile. None for
            the reference, and with vLLM, which gives no whole distributions.
        top1: share of positions where model and reference predict the same token.

    A name that ends in ``_se`` is the standard error over chunks of the figure before it.
    """

    engine: Engine
    text_fingerprint: str
    tokens: int
    chunks: int
    seq_len: int
    nll: float
    nll_se: float | None = None
    delta_nll: float | None = None
    delta_nll_se: float | None = None
    kl_mean: float | None = None
    kl_mean_se: float | None = None
    kl_p99: float | None = None
    kl_p99_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None


class Generation(_Model):
    """Speed of the generating part of a run, prompts included.

    Attributes:
        tokens: that were generated.
        seconds: it took. Items taken from an earlier, interrupted run count in neither.
    """

    tokens: int
    seconds: float


class ModelRun(_Model):
    """One model on all tasks.

    Attributes:
        label: name in reports, unique in one.
        model: last part of the folder's path, or the hub name.
        fingerprint: SHA-256 over the folder's configuration, tokenizer and weights.
        method: quantisation method that its config declares, ``none`` for a dense model.
        bpw: bits stored per weight of the linears that are quantised in the variants; None where it
            cannot be told.
        size_bytes: of all its weight files.
        dtype: of the arithmetic.
        generation: speed; None if every item came from an earlier run, or no task generates.
        tasks: by name.
        text: figures of ``svsk eval``, if a text was given.
    """

    label: str
    model: str
    fingerprint: str
    method: str
    bpw: float | None
    size_bytes: int
    dtype: str
    generation: Generation | None
    tasks: dict[str, TaskRun]
    text: tuple[TextScores, ...] = ()


class BenchSettings(_Model):
    """What all models of a report have in common.

    Attributes:
        tasks: as they were asked for, groups unexpanded.
        engine: that ran the tasks.
        limit: items per task, from the first; None for all.
        seed: of few-shot examples and sampling.
        repeats: answers to each item of tasks that generate.
        gen_kwargs: generation settings that override the tasks'.
        apply_chat_template: whether prompts were put into the model's chat template.
        fewshot_as_multiturn: whether examples were turns of that chat.
        system_instruction: system message, None for none.
        model_args: further arguments of lm-eval's model, common to all.
        data: ``hub``, or ``local`` when ``SVSK_DATA`` was set.
        versions: of the packages that decide, by name.
    """

    tasks: tuple[str, ...]
    engine: Engine
    limit: int | None
    seed: int
    gen_kwargs: dict[str, object]
    apply_chat_template: bool
    fewshot_as_multiturn: bool
    system_instruction: str | None
    model_args: dict[str, object]
    data: Literal["hub", "local"]
    versions: dict[str, str]
    repeats: int = 1


class BenchReport(_Model):
    """The file. The first of ``models`` is the reference; all have the same tasks.

    Attributes:
        created: time in UTC, ISO 8601.
        command: the command line, with folders shortened to their names.
        hardware: processor or GPU, in words.
    """

    kind: Literal["svsk-bench"] = "svsk-bench"
    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: str
    hardware: str
    settings: BenchSettings
    models: tuple[ModelRun, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_labels(self) -> "BenchReport":
        labels = [run.label for run in self.models]
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels are not unique: {', '.join(labels)}")
        return self


def load_report(path: str | Path) -> BenchReport:
    """Read a file of ``svsk bench --json``.

    Raises:
        EvalError: it is missing or not such a file.
    """
    return load_document(BenchReport, path, "file", "svsk bench --json")


def load_document(kind: type[Document], path: str | Path, what: str, command: str) -> Document:
    """Read a file that a command wrote.

    Args:
        kind: of the file.
        path: of the file.
        what: it is called, in errors.
        command: that writes such files.

    Raises:
        EvalError: it is missing or not such a file.
    """
    try:
        return kind.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read it ({error.strerror}). Name the one that `{command}` wrote."
        ) from error
    except ValidationError as error:
        raise EvalError(
            f"{path}: not a {what} of this version's `{command}`: {first_problem(error)}."
            " Run it again."
        ) from error
