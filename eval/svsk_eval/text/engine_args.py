# SPDX-License-Identifier: Apache-2.0
"""Arguments of the vLLM engine that scores a text.

What is chosen here, and what ``--engine-arg`` adds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from svsk_eval.errors import EvalError
from svsk_eval.text.models import DTYPES
from svsk_kernels.cpu.processor import has_bf16_products

__all__ = ["engine_arguments", "parse_engine_args", "served_dtype"]

STEP_TOKENS: Final = 1024
"""Most tokens of a step of the engine.

vLLM takes the logits of one request's share of a step at a time, in the model's dtype and as
float32 log-softmax: 0.9 GB for 1,024 tokens and a vocabulary of 150,000, beside what
it reserved for itself (``gpu_memory_utilization``). Longer chunks are prefilled in parts, several
short ones in one step.
"""

_RESERVED: Final = {
    "model": "it is the argument MODEL",
    "dtype": "use --dtype",
    "max_model_len": "it follows from --seq-len",
    "enable_prefix_caching": "a cached prefix has no log-probabilities",
    "logprobs_mode": "the figures are log-probabilities",
}
"""Engine arguments that the figures depend on, and why they cannot be given."""


def engine_arguments(
    model: str | Path, seq_len: int, dtype: str, engine_args: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for scoring chunks.

    Args:
        model: folder or hub name.
        seq_len: tokens per chunk.
        dtype: ``auto`` or the name of a dtype.
        engine_args: what the user adds or replaces.

    Raises:
        EvalError: the dtype is unknown, or an argument is not one to replace.
    """
    if dtype not in ("auto", *DTYPES):
        raise EvalError(f"--dtype {dtype}: vLLM takes auto, {', '.join(DTYPES)}.")
    for name in engine_args:
        if name in _RESERVED:
            raise EvalError(f"--engine-arg {name}: cannot be set, {_RESERVED[name]}. Leave it out.")
    for name in ("max_num_batched_tokens", "max_num_seqs"):
        value = engine_args.get(name, 1)
        if type(value) is not int or value < 1:
            raise EvalError(f"--engine-arg {name}={value}: expected a whole number, 1 or more.")
    step = int(engine_args.get("max_num_batched_tokens", STEP_TOKENS))
    together = int(engine_args.get("max_num_seqs", max(1, step // seq_len)))
    return {
        "model": str(model),
        "dtype": served_dtype(dtype),
        # vLLM generates a token after every prompt, it cannot only score
        "max_model_len": seq_len + 1,
        "max_num_seqs": together,
        "max_num_batched_tokens": min(step, together * (seq_len + 1)),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        **engine_args,
    }


def served_dtype(dtype: str) -> str:
    """``auto`` as vLLM is told it.

    Float32 on a CPU that does not multiply the checkpoint's 16 bits, else ``auto``.
    """
    slow = not torch.accelerator.is_available() and not has_bf16_products()
    return "float32" if dtype == "auto" and slow else dtype


def parse_engine_args(texts: Sequence[str], option: str = "--engine-arg") -> dict[str, Any]:
    """Read ``--engine-arg`` options, and others of their kind.

    Args:
        texts: ``name=value`` each. The value is JSON; a word that starts with a letter, such as
            ``fp8``, is itself.
        option: its name, for errors.

    Raises:
        EvalError: one has another form, or a name comes twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise EvalError(
                f"{option} {text}: expected name=value with an argument of vllm.LLM, as in"
                " tensor_parallel_size=2."
            )
        if name in arguments:
            raise EvalError(f"{option} {name}: given twice. Give it once.")
        try:
            arguments[name] = json.loads(value, parse_constant=_no_constant)
        except ValueError as error:
            if not value[:1].isalpha() or value in ("True", "False", "None", "NaN", "Infinity"):
                raise EvalError(
                    f"{option} {text}: its value is not JSON ({error}). Write a number, true,"
                    " false, null, a word, or quoted JSON such as '{\"level\": 3}'."
                ) from error
            arguments[name] = value
    return arguments


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
