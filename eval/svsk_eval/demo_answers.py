# SPDX-License-Identifier: Apache-2.0
"""One model's answers to the demo's prompts, in a process: ``python -m svsk_eval.demo_answers``."""

import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from svsk_eval.processes import answer_request

__all__ = ["AnswerRequest", "main"]


class AnswerRequest(BaseModel):
    """Prompts for a model folder, answered with its chat template.

    Attributes:
        model: folder.
        dtype: vLLM's name.
        max_tokens: most tokens of an answer.
        prompts: asked in one batch, one turn each.
    """

    model: Path
    dtype: str
    max_tokens: int
    prompts: tuple[str, ...]


def main(request_file: Path, report: Callable[..., None]) -> None:
    """Answer greedily; ``report`` gets the ``answers``."""
    request = AnswerRequest.model_validate_json(request_file.read_bytes())
    # GiB: on a CPU vLLM would take most of the memory; the model is on disk, no hub is needed
    for name in ("VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(request.model), dtype=request.dtype, max_model_len=1024, disable_log_stats=True
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in request.prompts]
    params = SamplingParams(temperature=0, max_tokens=request.max_tokens)
    outputs = llm.chat(chats, params, use_tqdm=False)
    report(answers=[output.outputs[0].text for output in outputs])


if __name__ == "__main__":
    answer_request(main)
