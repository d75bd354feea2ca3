# SPDX-License-Identifier: Apache-2.0
"""The process that serves one model of a throughput measurement, and the handle on it."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svsk_eval.errors import EvalError

__all__ = ["Load", "Server", "serve"]


@dataclass(frozen=True)
class Load:
    """What every model is asked for.

    Attributes:
        input_len: tokens per prompt.
        tokens: to decode per request, after the first.
        batches: numbers of requests that are sent together.
        repeats: of each measurement, after one that does not count.
        step_tokens: most tokens of a step of the engine.
    """

    input_len: int
    tokens: int
    batches: tuple[int, ...]
    repeats: int
    step_tokens: int = 8192

    def first(self, batch: int) -> int:
        """Tokens of the shorter of the two measurements.

        As many as the engine needs steps for the prompts.

        While the prompts of a large batch are read step by step, early requests decode already.
        Both measurements then hold the same of that, and what the longer one takes more is decoding
        of the whole batch.

        Raises:
            EvalError: decoding is shorter than that.
        """
        steps = -(-batch * self.input_len // self.step_tokens)
        if steps > self.tokens // 2:
            raise EvalError(
                f"batch {batch}: {self.input_len} prompt tokens each take {steps} steps of"
                f" {self.step_tokens}, but only {self.tokens} tokens are decoded. Raise --tokens to"
                f" {2 * steps} or more, or lower --input-len."
            )
        return steps


class Server:
    """A model in a process of its own, ready when this returns.

    Args:
        model: model folder.
        load: what it will be asked for.
        environment: added to the present one.
        engine: further arguments of ``vllm.LLM``.

    Raises:
        EvalError: the process ended, see its output.
    """

    def __init__(
        self, model: Path, load: "Load", environment: Mapping[str, str], engine: Mapping[str, Any]
    ) -> None:
        read, write = os.pipe()
        self.model = model
        arguments = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "max_model_len": load.input_len + load.tokens + 1,
            "max_num_seqs": max(load.batches),
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **engine,
        }
        job = {"engine": arguments, "input_len": load.input_len}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "svsk_eval.speed.throughput",
                "serve",
                json.dumps(job),
                str(write),
            ],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            text=True,
            pass_fds=[write],
            # A forked engine would keep the pipe open, and its end would not be noticed.
            env={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
            | os.environ
            | dict(environment),
        )
        os.close(write)
        self.answers = os.fdopen(read)
        self._answer()

    def seconds(self, batch: int, tokens: int) -> float:
        """Time to generate ``tokens`` tokens for each of ``batch`` prompts sent together."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{batch} {tokens}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.answers.close()

    def _answer(self) -> float:
        line = self.answers.readline()
        if not line:
            raise self._ended()
        return float(line)

    def _ended(self) -> EvalError:
        return EvalError(f"{self.model}: the vLLM process ended, see its output above.")


def serve(job: str, pipe: int) -> None:
    """Answer requests on stdin: batch and tokens, to seconds."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    settings = json.loads(job)
    if current_platform.is_cpu():
        # The engine in the process itself, so that nothing but the model competes for the cores.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm: Any = LLM(**settings["engine"])
    _check_cache(llm, settings["engine"])
    vocabulary = _vocabulary(settings["engine"]["model"])
    with os.fdopen(pipe, "w", buffering=1) as answers:
        answers.write("0\n")
        for number, line in enumerate(sys.stdin):
            batch, count = map(int, line.split())
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(
                vocabulary, (batch, settings["input_len"]), generator=generator
            ).tolist()
            params = SamplingParams(
                temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            start = time.perf_counter()
            outputs = llm.generate(
                [{"prompt_token_ids": row} for row in ids], params, use_tqdm=False
            )
            seconds = time.perf_counter() - start
            if any(len(output.outputs[0].token_ids) != count for output in outputs):
                raise EvalError(
                    f"{settings['engine']['model']}: a request ended before its {count} tokens."
                )
            answers.write(f"{seconds}\n")


def _check_cache(llm: Any, engine: Mapping[str, Any]) -> None:
    """Raise EvalError unless all requests of the largest batch fit the cache.

    Those that wait would be timed.
    """
    cache = llm.llm_engine.vllm_config.cache_config
    needed = engine["max_num_seqs"] * engine["max_model_len"]
    room = cache.num_gpu_blocks * cache.block_size
    if room < needed:
        raise EvalError(
            f"{engine['model']}: {engine['max_num_seqs']} requests of {engine['max_model_len']}"
            f" tokens need room for {needed} tokens in the cache, it has {room}. Give it more"
            " memory, or use smaller --batches."
        )


def _vocabulary(model: str) -> int:
    from svsk_offline.storage.model_loading import read_model_config

    return int(read_model_config(model).get_text_config().vocab_size)
