# SPDX-License-Identifier: Apache-2.0
"""A model of lm-eval that answers from a journal first and notes what it has to compute."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from svsk_eval.bench.journal import Generated, Journal, Likelihood, request_keys
from svsk_eval.errors import EvalError

__all__ = ["AnswerCount", "AnswerProgress", "JournaledModel", "is_sampled", "likelihood"]

_RUNNING_SECONDS: Final = 1.0
"""How often the tokens of answers that are not finished are told."""


@dataclass(frozen=True)
class AnswerCount:
    """How far a task is.

    Attributes:
        done: requests that have an answer.
        known: that came so far.
        kept: of those done, the ones whose answer was in the journal, or is that of an equal one.
        tokens: generated in this task, those of answers that are not finished among them.
    """

    done: int
    known: int
    kept: int
    tokens: int


AnswerProgress = Callable[[AnswerCount], None]
"""Called after every answer, and while long ones are generated."""


class JournaledModel(TemplateLM):
    """What both engines share: look into the journal, run the rest, answer in order.

    Attributes:
        journal: answers, old and new.
        new_tokens: that were generated, of new answers only.
        running_tokens: those of answers that are not finished yet.
        seconds: that generating them took.
        repeats: answers to each request that are drawn.
        repeat: which of them :meth:`generate_until` returns, from 0; with the first all are drawn.
        elsewhere: answers of this task that other machines made, by what was different there.
        cut_prompts: how many prompts did not fit the model's context and were cut, as lm-eval does;
            with vLLM only.
    """

    journal: Journal
    new_tokens: int
    running_tokens: int
    seconds: float
    repeats: int
    repeat: int
    elsewhere: Counter[str]
    cut_prompts: int

    def attach(self, journal: Journal, progress: AnswerProgress) -> None:
        """Set what lm-eval's constructor does not know."""
        self.journal, self._progress = journal, progress
        self.cut_prompts = self.new_tokens = 0
        self.seconds = self._told = 0.0
        self.begin_task()

    def begin_task(self, repeats: int = 1) -> None:
        """Count requests and tokens from zero; ``repeats`` answers to each request are drawn."""
        self.repeats, self.repeat = repeats, 0
        self._done = self._asked = self._kept = self.running_tokens = 0
        self._before = self.new_tokens
        self.elsewhere = Counter()

    def generated(self, requests: Iterable[tuple[str, dict[str, Any]]]) -> list[Generated]:
        """The kept answers to ``generate_until`` requests (prompt, settings) of one task, in order.

        Raises:
            KeyError: one has not been run.
        """
        keys = self._generation_keys(list(requests), self.repeat)
        return [self.journal.generated(key) for key in keys]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        keys = self._generation_keys(arguments, self.repeat)
        # All answers are drawn when the first are asked for, which fills a batch better.
        drawn = range(self.repeats) if self.repeat == 0 else [self.repeat]
        asked = [key for repeat in drawn for key in self._generation_keys(arguments, repeat)]
        if self.repeat == 0 or any(key not in self.journal for key in asked):
            todo = self._missing(asked)
            start = time.perf_counter()
            if todo:
                self._generate([(asked[i], *arguments[i % len(arguments)]) for i in todo])
            self.seconds += time.perf_counter() - start
        return [self.journal.generated(key).text for key in keys]

    def _generation_keys(
        self, arguments: Sequence[tuple[str, dict[str, Any]]], repeat: int
    ) -> list[str]:
        sampled = any(is_sampled(settings) for _, settings in arguments)
        return request_keys("generate_until", arguments, numbered=sampled, repeat=repeat)

    def _generate(self, requests: list[tuple[str, str, dict[str, Any]]]) -> None:
        """Run requests (key, prompt, settings) and keep their answers."""
        raise NotImplementedError

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """Indices of the first request of each key that has no answer; the others count as done."""
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in self.journal:
                first.setdefault(key, index)
        self.elsewhere.update(
            origin for key in dict.fromkeys(keys) if (origin := self.journal.origin(key))
        )
        self._asked += len(keys)
        self._done += len(keys) - len(first)
        self._kept += len(keys) - len(first)
        self._tell()
        return list(first.values())

    def _keep(self, key: str, answer: Generated | Likelihood) -> None:
        self.journal.add(key, answer)
        if isinstance(answer, Generated):
            self.new_tokens += answer.tokens
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        """Tell how far the task is."""
        self._told = time.monotonic()
        tokens = self.new_tokens - self._before + self.running_tokens
        self._progress(AnswerCount(self._done, self._asked, self._kept, tokens))

    def _tell_running(self) -> None:
        """The same where no answer was finished, not more often than is of use."""
        if time.monotonic() - self._told > _RUNNING_SECONDS:
            self._tell()


def is_sampled(settings: dict[str, Any]) -> bool:
    """Whether an answer is drawn at random, by lm-eval's rules."""
    normal = normalize_gen_kwargs(settings)
    return bool(normal.get("do_sample")) or float(normal.get("temperature", 0.0)) > 0


def likelihood(logprob: float, greedy: bool | None) -> Likelihood:
    """An answer of these values.

    Raises:
        EvalError: the log-probability is not finite.
    """
    if not math.isfinite(logprob):
        raise EvalError(
            f"The model gives a text the log-probability {logprob}. Try another --dtype, and check"
            " the weights: `svsk eval MODEL --text TEXT --dtype float32`."
        )
    return Likelihood(logprob=logprob, greedy=greedy)
