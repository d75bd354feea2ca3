# SPDX-License-Identifier: Apache-2.0
"""What ``svsk_eval.text.served`` uses of vLLM, computed by transformers.

Its processes are tested with it.

The environment variable ``FAKE_VLLM_LOG`` names a file for the arguments of every engine,
``FAKE_VLLM`` what goes wrong: ``fail``, ``kill``, ``hang``, ``other`` (an answer for another
prompt) or ``nan``.
"""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

__version__ = "0.0.fake"


def SamplingParams(**options: Any) -> None:  # noqa: N802
    assert options == {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}


class LLM:
    def __init__(self, **arguments: Any) -> None:
        self.mode, self.arguments, self.calls = os.environ.get("FAKE_VLLM"), arguments, 0
        with Path(os.environ["FAKE_VLLM_LOG"]).open("a") as log:
            log.write(json.dumps({**arguments, "pid": os.getpid(), "env": dict(os.environ)}) + "\n")
        if self.mode == "fail":
            print("\n".join(f"log line {number}" for number in range(100)))
            raise RuntimeError("no memory for this model")
        from transformers import AutoModelForCausalLM

        dtype = (
            torch.bfloat16 if arguments["dtype"] == "auto" else getattr(torch, arguments["dtype"])
        )
        self.model: Any = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=dtype)
        config = SimpleNamespace(
            additional_config={"svsk_kernels": ["FakeKernel"]},
            device_config=SimpleNamespace(device_type="cpu"),
            model_config=SimpleNamespace(dtype=dtype),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def generate(
        self, prompts: list[dict[str, list[int]]], params: None, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        assert not use_tqdm
        assert len(prompts) <= self.arguments["max_num_seqs"]
        self.calls += 1
        if self.calls == 2 and self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == 2 and self.mode == "hang":
            time.sleep(600)
        return [self.score(prompt["prompt_token_ids"]) for prompt in prompts]

    @torch.no_grad()
    def score(self, ids: list[int]) -> SimpleNamespace:
        assert len(ids) < self.arguments["max_model_len"]
        rows = self.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        places: list[Any] = [None]
        for own, row in zip(ids[1:], rows, strict=True):
            top = int(row.argmax())
            places.append(
                {own: SimpleNamespace(logprob=float(row[own]), rank=int((row >= row[own]).sum()))}
            )
            places[-1][top] = SimpleNamespace(logprob=float(row[top]), rank=1)
        if self.mode == "nan" and self.calls == 2:
            places[3][ids[3]].logprob = float("nan")
        return SimpleNamespace(
            prompt_token_ids=ids[1:] if self.mode == "other" else ids, prompt_logprobs=places
        )
