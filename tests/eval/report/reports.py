# SPDX-License-Identifier: Apache-2.0
"""Made-up reports of ``svsk bench``.

Models that share the difficulty of items and differ by noise, as real ones do.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from svsk_eval.report.schema import (
    BenchReport,
    BenchSettings,
    Generation,
    ModelRun,
    TaskRun,
    TextScores,
)

LABELS = ("Qwen3-4B", "svsk-best-4.62", "svsk-quad8-4.25", "W4A16-GPTQ", "AWQ-g64", "Q4_K_M")
METHODS = ("none", "svsk", "svsk", "compressed-tensors", "compressed-tensors", "gguf")
BPW = (16.0, 4.62, 4.25, 4.25, 4.31, 5.53)

# name, metric, type of output, examples in the prompt, items, difficulty, mean tokens
TASKS: tuple[tuple[str, str, str, int, int, float, float], ...] = (
    ("gsm8k_cot", "exact_match,strict-match", "generate_until", 8, 250, -0.9, 140),
    ("ifeval", "prompt_level_strict_acc,none", "generate_until", 0, 120, -0.4, 310),
    ("arc_challenge", "acc_norm,none", "multiple_choice", 25, 300, -0.1, 0),
    ("truthfulqa_mc2", "acc,none", "multiple_choice", 6, 200, 0.1, 0),
    ("mmlu_pro_law", "exact_match,custom-extract", "generate_until", 5, 150, 0.8, 480),
)


def task_run(
    scores: list[float] | tuple[float, ...],
    name: str = "gsm8k_cot",
    *,
    metric: str = "exact_match,none",
    **fields: Any,
) -> TaskRun:
    """A task of given scores of items; keywords replace fields."""
    count = len(scores)
    stored: dict[str, Any] = {
        "task": name,
        "version": "3.0",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "primary": metric,
        "doc_ids": tuple(range(count)),
        "item_hashes": tuple(
            hashlib.sha256(f"{name} {item}".encode()).hexdigest() for item in range(count)
        ),
        "scores": {metric: tuple(scores)},
    }
    return TaskRun(**{**stored, **fields})


def model_run(label: str, tasks: list[TaskRun], **fields: Any) -> ModelRun:
    """A model on given tasks; keywords replace fields."""
    stored: dict[str, Any] = {
        "label": label,
        "model": f"models/{label}",
        "fingerprint": hashlib.sha256(label.encode()).hexdigest(),
        "method": "none",
        "bpw": None,
        "size_bytes": 1,
        "dtype": "bfloat16",
        "generation": None,
        "tasks": {task.task: task for task in tasks},
    }
    return ModelRun(**{**stored, **fields})


def report(
    models: list[ModelRun],
    *,
    command: str = "svsk bench",
    hardware: str = "a processor",
    **settings: Any,
) -> BenchReport:
    """A report of given models; keywords replace settings."""
    stored: dict[str, Any] = {
        "tasks": tuple(models[0].tasks),
        "engine": "vllm",
        "limit": None,
        "seed": 1234,
        "gen_kwargs": {},
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": None,
        "model_args": {},
        "data": "hub",
        "versions": {"lm_eval": "0.4.9", "vllm": "0.32.1"},
    }
    return BenchReport(
        created="2026-11-21T20:15:00Z",
        command=command,
        hardware=hardware,
        settings=BenchSettings(**{**stored, **settings}),
        models=tuple(models),
    )


def realistic(models: int = 4, tasks: int = 5, seed: int = 0) -> BenchReport:
    """A report of ``models`` models on ``tasks`` tasks, with texts, speeds and answers' lengths.

    Tasks after the fifth repeat the first five under other names. ``truthfulqa_mc2`` has scores
    between 0 and 1.
    """
    rng = np.random.default_rng(seed)
    runs: list[list[TaskRun]] = [[] for _ in range(models)]
    for number in range(tasks):
        name, metric, output_type, shots, count, difficulty, length = TASKS[number % len(TASKS)]
        name = name if number < len(TASKS) else f"{name}_{number}"
        items = rng.normal(difficulty, 1.3, count)
        for index in range(models):
            ability = -items - 0.09 * index + rng.normal(0, 0.35 + 0.05 * index, count)
            values = (ability > 0).astype(float)
            if name.startswith("truthfulqa"):
                values = 1 / (1 + np.exp(-ability))
            fields: dict[str, Any] = {
                "metric": metric,
                "output_type": output_type,
                "num_fewshot": shots,
            }
            if output_type == "generate_until":
                ended = (rng.random(count) < 0.985 - 0.02 * index).astype(float)
                tokens = np.where(
                    ended > 0, rng.gamma(9, length / 9, count) * (1 + 0.04 * index), 1024
                ).round()
                fields |= {
                    "output_tokens": tuple(tokens.tolist()),
                    "terminated": tuple(ended.tolist()),
                }
            runs[index].append(task_run(values.tolist(), name, **fields))
    return report(
        [_model(index, runs[index]) for index in range(models)],
        command=(
            "svsk bench Qwen3-4B svsk-best-4.62 svsk-quad8-4.25 W4A16-GPTQ --reference Qwen3-4B"
            " \\\n  --tasks gsm8k_cot,ifeval,arc_challenge,truthfulqa_mc2,mmlu_pro_law --json"
            " bench.json --html bench.html"
        ),
        hardware="NVIDIA H100 80GB HBM3",
        gen_kwargs={"max_gen_toks": 1024, "temperature": 0.0},
        model_args={"max_model_len": 8192},
    )


def _model(index: int, tasks: list[TaskRun]) -> ModelRun:
    tokens = int(sum(sum(task.output_tokens or ()) for task in tasks))
    common: dict[str, Any] = {
        "text_fingerprint": "5f" * 32,
        "tokens": 16352,
        "chunks": 32,
        "seq_len": 512,
    }
    loss = 0.021 * index
    relative: dict[str, Any] = {
        "delta_nll": loss,
        "delta_nll_se": 0.0031,
        "kl_mean": 0.034 * index,
        "kl_mean_se": 0.0022,
        "kl_p99": 0.61 + 0.2 * index,
        "kl_p99_se": 0.05,
        "top1": 0.94 - 0.02 * index,
        "top1_se": 0.002,
    }
    texts = [
        TextScores(
            engine="hf", nll=2.31 + loss, nll_se=0.041, **common, **(relative if index else {})
        )
    ]
    vllm = {"delta_nll": loss + 0.001, "delta_nll_se": 0.003, "top1": 0.93} if index else {}
    texts.append(TextScores(engine="vllm", nll=2.312 + loss, nll_se=0.041, **common, **vllm))
    return model_run(
        LABELS[index],
        tasks,
        method=METHODS[index],
        bpw=BPW[index],
        size_bytes=int(8.05e9 * (BPW[index] + 1.2) / 17.2),
        generation=Generation(tokens=tokens, seconds=tokens / (2900 + 260 * index)),
        text=tuple(texts),
    )


def save(path: Path, content: BenchReport) -> Path:
    """Write a report as ``svsk bench --json`` does."""
    path.write_text(content.model_dump_json(), encoding="utf-8")
    return path
