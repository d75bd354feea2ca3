# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model for vLLM with a journal. Importing it imports vLLM."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from lm_eval.models.utils import maybe_truncate, postprocess_generated_text
from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from svsk_eval.bench.journal import Generated, request_keys
from svsk_eval.bench.journaled_model import JournaledModel, is_sampled, likelihood
from svsk_eval.errors import EvalError

__all__ = ["STREAM_INTERVAL", "JournaledVLLM"]

_WAITING: Final = 1024
"""Requests given to vLLM at a time.

Enough to fill any batch, few enough to take no memory to speak of.
"""

STREAM_INTERVAL: Final = 32
"""Tokens after which an answer that is not finished is looked at, to show the speed."""


class JournaledVLLM(JournaledModel, VLLM):
    """Gives vLLM request by request, and keeps each answer when it is finished."""

    def _generate(self, requests: list[tuple[str, str, dict[str, Any]]]) -> None:
        eos = self.tokenizer.decode(self.eot_token_id) or self.tokenizer.eos_token
        encoded = self.tok_encode([prompt for _, prompt, _ in requests])
        prompts, params, stops = [], [], []
        for tokens, (key, _, settings) in zip(encoded, requests, strict=True):
            kwargs, until, limit = self.modify_gen_kwargs(
                dict(settings), eos=eos, default_max_gen_toks=self.max_gen_toks
            )
            if limit >= self.max_length:
                raise EvalError(
                    f"Answers may have {limit} tokens, which leaves no room for a prompt in a"
                    f" context of {self.max_length}. Lower max_gen_toks (--gen-kwargs) or raise"
                    " --model-arg max_model_len."
                )
            prompts.append(self._fitting(tokens, limit))
            if is_sampled(settings):
                # A seed of its own, so that an answer does not depend on what else is in the batch.
                kwargs.setdefault("seed", (self.model_args["seed"] + int(key[:8], 16)) % 2**32)
            else:
                # lm-eval leaves it out if a task does, and vLLM would sample
                kwargs["temperature"] = 0.0
            stops.append(until)
            # A thinking model may write the task's stop strings while it thinks: they are applied
            # afterwards.
            params.append(
                SamplingParams(
                    max_tokens=limit, stop=[eos] if self.think_end_token else until, **kwargs
                )
            )
        for index, output in self._stream(prompts, params):
            answer = output.outputs[0]
            if answer.finish_reason not in ("stop", "length"):
                raise EvalError(
                    f"vLLM ended a request with {answer.finish_reason!r},"
                    " expected 'stop' or 'length'."
                )
            text = postprocess_generated_text(answer.text, stops[index], self.think_end_token)
            stopped = answer.finish_reason == "stop"
            self._keep(
                requests[index][0],
                Generated(
                    text=text,
                    tokens=len(answer.token_ids),
                    stopped=stopped,
                    ids=tuple(answer.token_ids),
                    seed=params[index].seed,
                ),
            )

    def _fitting(self, tokens: list[int], limit: int) -> list[int]:
        """The prompt, cut as lm-eval does to fit beside an answer of ``limit`` tokens."""
        cut, _ = maybe_truncate(
            tokens,
            max_gen_toks=limit,
            max_model_len=self.max_length,
            side=self.truncation_side,
            verbose=False,
        )
        if len(cut) < len(tokens):
            self.cut_prompts += 1
        kept: list[int] = cut
        return kept

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        longest = self.max_length - 1  # vLLM generates one token at least
        inputs, contexts = [], []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-longest:]
            self.cut_prompts += len(tokens) < len(context) + len(continuation)
            inputs.append(tokens)
            contexts.append(len(tokens) - len(continuation))
            if contexts[-1] < 1:
                raise EvalError(
                    f"A continuation of {len(continuation)} tokens does not fit the model's"
                    f" {self.max_length}. Give a larger --model-arg max_model_len."
                )
        keys = request_keys("loglikelihood", zip(inputs, contexts, strict=True))
        todo = self._missing(keys)
        params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
        for index, output in self._stream([inputs[i] for i in todo], [params] * len(todo)):
            number = todo[index]
            self._keep(
                keys[number],
                likelihood(*self._parse_logprobs(inputs[number], output, contexts[number])),
            )
        answers = [self.journal.likelihood(key) for key in keys]
        return [(answer.logprob, bool(answer.greedy)) for answer in answers]

    def _stream(
        self, prompts: Sequence[list[int]], params: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Outputs with the numbers of their requests, as they finish; longest prompts first."""
        engine = self.model.llm_engine
        # Prompts that are not rendered are taken by all versions, but the later ones say that this
        # will end.
        render = getattr(getattr(engine, "renderer", None), "render_cmpl", lambda raw: raw)
        order = iter(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        running = 0
        unfinished: dict[str, int] = {}
        while True:
            while running < _WAITING and (index := next(order, None)) is not None:
                settings = params[index].clone()
                # the whole text so far, now and then; of a prompt's likelihood only the end
                kind = RequestOutputKind
                settings.output_kind = kind.CUMULATIVE if settings.detokenize else kind.FINAL_ONLY
                (prompt,) = render([TokensPrompt(prompt_token_ids=prompts[index])])
                engine.add_request(str(index), prompt, settings, lora_request=self.lora_request)
                running += 1
            if not running:
                return
            for output in engine.step():
                if output.finished:
                    running -= 1
                    unfinished.pop(output.request_id, None)
                    self.running_tokens = sum(unfinished.values())
                    yield int(output.request_id), output
                else:
                    unfinished[output.request_id] = len(output.outputs[0].token_ids)
            self.running_tokens = sum(unfinished.values())
            self._tell_running()
