# SPDX-License-Identifier: Apache-2.0
"""lm-eval's models for vLLM and transformers, with a journal of every finished answer.

Requests whose answer is in the journal are not run. The prompts, stop strings and settings are
lm-eval's own; vLLM is fed request by request instead of in one call, because a call returns only
when its last answer is finished.
"""

import hashlib
import importlib
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from svsk_eval.bench.journal import Generated, Journal, request_keys
from svsk_eval.bench.journaled_model import AnswerProgress, JournaledModel, is_sampled, likelihood
from svsk_eval.errors import EvalError
from svsk_offline.storage.model_loading import attention_arguments, read_model_config

__all__ = ["hf_model", "vllm_model"]


def hf_model(
    arguments: dict[str, Any], journal: Journal, progress: AnswerProgress, seed: int = 0
) -> JournaledModel:
    """lm-eval's ``hf`` model with a journal; SVSK checkpoints are dequantised.

    Args:
        arguments: of :class:`lm_eval.models.huggingface.HFLM`.
        journal: takes the answers.
        progress: see :data:`AnswerProgress`.
        seed: of answers that are sampled.
    """
    # registers the method with transformers when it is imported
    importlib.import_module("svsk_vllm.hf")
    trust = bool(arguments.get("trust_remote_code"))
    attention = attention_arguments(
        read_model_config(arguments["pretrained"], trust_remote_code=trust)
    )
    model = _JournaledHF(seed, **{**attention, **arguments})
    model.attach(journal, progress)
    return model


def vllm_model(
    arguments: dict[str, Any], journal: Journal, progress: AnswerProgress
) -> JournaledModel:
    """lm-eval's ``vllm`` model with a journal.

    Args:
        arguments: of lm-eval's class; what it does not know goes to :class:`vllm.LLM`.
        journal: takes the answers.
        progress: see :data:`AnswerProgress`.

    Raises:
        EvalError: vLLM is not installed, or replicas were asked for.
    """
    if int(arguments.get("data_parallel_size", 1)) > 1:
        raise EvalError(
            f"data_parallel_size={arguments['data_parallel_size']}: answers are kept one by one"
            " only from one engine. Use tensor_parallel_size, or run the models on a GPU each."
        )
    try:
        # starts vLLM
        from svsk_eval.bench.vllm_engine import STREAM_INTERVAL, JournaledVLLM
    except ImportError as error:
        raise EvalError(
            f"--engine vllm: vLLM is not installed ({error}). Install it, or use --engine hf."
        ) from error
    model: JournaledModel = JournaledVLLM(**{"stream_interval": STREAM_INTERVAL, **arguments})
    model.attach(journal, progress)
    return model


class _JournaledHF(JournaledModel, HFLM):
    """HFLM tells its cache hook of each answer after each batch: this class is that hook."""

    def __init__(self, seed: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seed = seed
        self.cache_hook = self
        self._rows: list[tuple[list[int], bool]] = []
        self._drawn_with: int | None = None
        self._keys: dict[str, list[str]] = {}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        keys = request_keys("loglikelihood", (request.args for request in requests))
        if todo := self._missing(keys):
            super().loglikelihood([requests[i] for i in todo], disable_tqdm=disable_tqdm)
        answers = [self.journal.likelihood(key) for key in keys]
        return [(answer.logprob, bool(answer.greedy)) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        keys = request_keys("loglikelihood_rolling", (request.args for request in requests))
        # one by one: HFLM reports an answer after all windows of all texts
        for index in self._missing(keys):
            super().loglikelihood_rolling([requests[index]], disable_tqdm=True)
        return [self.journal.likelihood(key).logprob for key in keys]

    def add_partial(self, attr: str, req: tuple[Any, ...], res: Any) -> None:
        """lm-eval's cache hook: an answer is finished."""
        if attr == "generate_until":
            ids, stopped = self._rows.pop(0)
            key = self._keys[request_keys(attr, [req])[0]].pop(0)
            answer = Generated(
                text=res,
                tokens=len(ids),
                stopped=stopped,
                ids=tuple(ids),
                seed=self._drawn_with,
            )
            self._keep(key, answer)
        elif attr == "loglikelihood":
            self._keep(request_keys(attr, [req])[0], likelihood(*res))
        else:
            self._keep(request_keys(attr, [req])[0], likelihood(res, None))

    def _generate(self, requests: list[tuple[str, str, dict[str, Any]]]) -> None:
        size = len(requests)
        sampled = any(is_sampled(settings) for _, _, settings in requests)
        if sampled:
            # torch's random numbers belong to a batch: a seed of its own makes them independent of
            # the batches before it, so that a run that goes on does not draw the same again.
            size = int(self.batch_size)
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            text = f"{self.seed} {' '.join(key for key, _, _ in batch)}"
            seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
            torch.manual_seed(seed)
            self._drawn_with = seed if sampled else None
            self._keys = {}
            for key, *arguments in batch:
                self._keys.setdefault(request_keys("generate_until", [arguments])[0], []).append(
                    key
                )
            HFLM.generate_until(
                self,
                [
                    Instance("generate_until", {}, (prompt, settings), i)
                    for i, (_, prompt, settings) in enumerate(batch)
                ],
            )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        output: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)
        rows = output[:, context.shape[1] :].tolist()
        endings = [self._ending(row, stop) for row in rows]
        self._rows = [
            (row[:tokens], stopped) for row, (tokens, stopped) in zip(rows, endings, strict=True)
        ]
        return output

    def _ending(self, row: list[int], stop: list[str]) -> tuple[int, bool]:
        """Tokens of an answer up to its end, and whether it has one.

        A batch runs on until its last answer ends.
        """
        ends = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        length = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        text = self.tok_decode(row[:length], skip_special_tokens=False)
        if not any(term and term in text for term in stop):
            return (len(row), False) if length is None else (length, True)
        low, high = 1, length or len(row)  # the fewest tokens whose text holds a stop string
        while low < high:
            middle = (low + high) // 2
            text = self.tok_decode(row[:middle], skip_special_tokens=False)
            low, high = (
                (low, middle) if any(term and term in text for term in stop) else (middle + 1, high)
            )
        return low, True
