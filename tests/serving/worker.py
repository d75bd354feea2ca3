# SPDX-License-Identifier: Apache-2.0
"""Runs one model through vLLM in a process of its own and writes what it answered as JSON.

A process per model: vLLM keeps global state.

    python -m tests.serving.worker JOB.json ANSWER.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily from ``prompts``, score ``sequences``, and after a reload generate again.

    Tokens come as ids. Each scored position holds the log-probability of the sequence's own token
    and the two likeliest tokens with theirs.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    as_prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    generated = [
        list(out.outputs[0].token_ids) for out in llm.generate(as_prompts, greedy, use_tqdm=False)
    ]
    sequences = job["sequences"] or [a + b for a, b in zip(job["prompts"], generated, strict=True)]
    found: dict[str, Any] = {
        "generated": generated,
        "sequences": sequences,
        "scores": score(llm, sequences),
        "methods": methods(llm),
        "kernels": llm.llm_engine.vllm_config.additional_config.get("svsk_kernels"),
    }
    if job["reload"]:
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        found["reloaded"] = score(llm, sequences)
    return found


def score(llm: Any, sequences: list[list[int]]) -> list[list[list[float]]]:
    """Per sequence, for each position from 1.

    Own log-probability, likeliest token, its and the second's.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    scored = []
    for ids, output in zip(sequences, outputs, strict=True):
        rows = []
        for own, entries in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
            ranked = sorted(entries.items(), key=lambda item: item[1].rank)
            (first, best), (_, second) = ranked[0], ranked[1]
            rows.append([entries[own].logprob, first, best.logprob, second.logprob])
        scored.append(rows)
    return scored


def methods(llm: Any) -> dict[str, int]:
    """How many layers of the model each quantisation method serves, per worker."""
    counts = llm.apply_model(count_methods)
    return dict(counts[0])


def count_methods(model: Any) -> dict[str, int]:
    """Layers by the class name of their quantisation method."""
    counts: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            counts[type(method).__name__] = counts.get(type(method).__name__, 0) + 1
    return counts


def imitate(features: str) -> None:
    """Let PyTorch say what a lesser processor has, so that vLLM loads that one's operators."""
    import torch

    lacking = ["_is_avx512_bf16_supported", "_is_amx_tile_supported"]
    for name in [*lacking, "_is_avx512_supported"] if features == "avx2" else lacking:
        assert hasattr(torch.cpu, name)
        setattr(torch.cpu, name, lambda: False)


def run(job: str, to: str) -> None:
    """Answer the job of one file in another."""
    if features := os.environ.get("SVSK_CPU_FEATURES"):
        imitate(features)
    Path(to).write_text(json.dumps(answer(json.loads(Path(job).read_text()))))


if __name__ == "__main__":
    run(*sys.argv[1:])
