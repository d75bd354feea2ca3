# SPDX-License-Identifier: Apache-2.0
"""The answers a model has given so far, on disk as they come.

What a killed run has finished is not asked again.
"""

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svsk_eval.errors import EvalError, first_problem

__all__ = ["JOURNAL", "Answer", "Generated", "Journal", "Likelihood", "request_keys"]

JOURNAL: Final = "journal.jsonl"
"""Name of the file in a model's folder."""

_SYNC_SECONDS: Final = 1.0


class Generated(BaseModel):
    """An answer to ``generate_until``.

    Attributes:
        text: after stop strings were cut off.
        tokens: that were generated, an end-of-text token included.
        stopped: whether it ended by itself, and not at the limit of tokens.
        ids: the tokens; None in answers of earlier versions.
        seed: that it was drawn with; with transformers that of its batch. None where it is greedy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["generated"] = "generated"
    text: str
    tokens: int
    stopped: bool
    ids: tuple[int, ...] | None = None
    seed: int | None = None


class Likelihood(BaseModel):
    """An answer to ``loglikelihood`` or ``loglikelihood_rolling``.

    Attributes:
        logprob: of the continuation, nats; of all tokens for ``loglikelihood_rolling``.
        greedy: whether the continuation is what greedy decoding gives; None for
            ``loglikelihood_rolling``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["likelihood"] = "likelihood"
    logprob: float
    greedy: bool | None


Answer = Generated | Likelihood


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: str = Field(min_length=1)
    answer: Annotated[Answer, Field(discriminator="kind")]
    origin: str | None = None


def request_keys(
    kind: str, requests: Iterable[Sequence[Any]], *, numbered: bool = False, repeat: int = 0
) -> list[str]:
    """Names under which answers are kept: SHA-256 of a request's kind and arguments.

    Args:
        kind: lm-eval's method, ``generate_until`` and the like.
        requests: arguments that JSON can write.
        numbered: tell equal requests apart by their order, for answers that are sampled; else they
            share one answer.
        repeat: which answer of several to each request, from 0.
    """
    seen: Counter[str] = Counter()
    keys = []
    for arguments in requests:
        text = json.dumps([kind, list(arguments)], sort_keys=True)
        if numbered:
            seen[text] += 1
            text += f"#{seen[text]}" + (f"~{repeat}" if repeat else "")
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:32])
    return keys


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[_Line, int]]:
    """A journal's whole lines with their lengths in bytes; EvalError if one is damaged."""
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return  # cut off by a kill
        try:
            entry = _Line.model_validate_json(line)
        except ValidationError as error:
            raise EvalError(
                f"{path}, line {number}: is damaged ({first_problem(error)}). Delete that line:"
                " its item will be run again."
            ) from error
        yield entry, len(line)


class Journal:
    """Answers by key in a file of JSON lines that only grows.

    A line is flushed when it is written, and synced to disk at least once a second, so that a
    killed process loses nothing and a machine that fails a second. What a killed process wrote of
    its last line is dropped.

    Args:
        path: the file; is made if there is none.

    Raises:
        EvalError: a line is damaged, or another process has the file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise EvalError(
                f"{path}: another run is writing to it. Wait for its end, or give another folder."
            ) from error
        self._origins: dict[str, str] = {}
        self._answers = self._load()
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def generated(self, key: str) -> Generated:
        """The generated answer under ``key``; KeyError if there is none."""
        answer = self._answers[key]
        assert isinstance(answer, Generated)
        return answer

    def likelihood(self, key: str) -> Likelihood:
        """The likelihood under ``key``; KeyError if there is none."""
        answer = self._answers[key]
        assert isinstance(answer, Likelihood)
        return answer

    def origin(self, key: str) -> str | None:
        """What was different where an answer was made; None for one that was made here."""
        return self._origins.get(key)

    def adopt(self, path: Path, origin: str) -> int:
        """Take over the answers of another journal to what has none here.

        Args:
            path: the other journal, which is only read.
            origin: what was different where they were made, in words; those that were taken over
                there keep what they have.

        Returns:
            How many.

        Raises:
            EvalError: a line is damaged.
        """
        before = len(self)
        with path.open("rb") as file:
            for line, _ in _lines(path, file):
                if line.key not in self:
                    self.add(line.key, line.answer, line.origin or origin)
        return len(self) - before

    def add(self, key: str, answer: Answer, origin: str | None = None) -> None:
        """Keep an answer; ``origin`` says what was different where it was made, if not here."""
        line = _Line(key=key, answer=answer, origin=origin)
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._file.flush()
        self._answers[key] = answer
        if origin is not None:
            self._origins[key] = origin
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Sync and close the file, which lets other processes have it."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _load(self) -> dict[str, Answer]:
        self._file.seek(0)
        answers: dict[str, Answer] = {}
        whole = 0
        for entry, length in _lines(self.path, self._file):
            answers[entry.key] = entry.answer
            if entry.origin is not None:
                self._origins[entry.key] = entry.origin
            whole += length
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        return answers
