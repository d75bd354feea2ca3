# SPDX-License-Identifier: Apache-2.0
"""Completing prompts with a dense or SVSK model, through vLLM or transformers."""

import os
from collections.abc import Sequence
from typing import Any

from svsk_eval.errors import EvalError
from svsk_eval.text.engine_args import served_dtype
from svsk_eval.text.models import load_model, load_tokenizer, silence_progress_bars
from svsk_kernels.errors import one_line
from svsk_offline.choices import choose
from svsk_offline.storage.model_loading import read_model_config

__all__ = ["ENGINES", "generate_texts"]

ENGINES = ("vllm", "hf")

_CONTEXT = 2048
"""Longest prompt and answer together: what fits the cache of a small machine."""


def generate_texts(
    model: str,
    prompts: Sequence[str],
    engine: str = "vllm",
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[str]:
    """Continue each prompt; all of them run as one batch.

    Args:
        model: folder or hub name, dense or SVSK.
        prompts: plain text, no chat template is applied.
        engine: ``vllm`` or ``hf``.
        max_tokens: most tokens to generate per prompt.
        temperature: 0 is greedy.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``auto``: the checkpoint's with ``vllm``,
            where that is fast.
        trust_remote_code: run Python files that come with the model.

    Raises:
        SvskError: unknown engine.
        EvalError: vLLM is not installed or cannot serve the model.
    """
    choose("--engine", engine, ENGINES)
    if engine == "vllm":
        return _with_vllm(model, prompts, max_tokens, temperature, dtype, trust_remote_code)
    return _with_transformers(model, prompts, max_tokens, temperature, dtype, trust_remote_code)


def _with_vllm(
    model: str,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float,
    dtype: str,
    trust_remote_code: bool,
) -> list[str]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise EvalError(
            f"--engine vllm: vLLM is not installed ({error}). Install it, or use --engine hf."
        ) from error

    config = read_model_config(model, trust_remote_code=trust_remote_code).get_text_config()
    context = min(_CONTEXT, getattr(config, "max_position_embeddings", _CONTEXT))
    try:
        llm = LLM(
            model=model,
            dtype=served_dtype(dtype),
            max_model_len=context,
            disable_log_stats=True,
            trust_remote_code=trust_remote_code,
        )
        outputs = llm.generate(
            list(prompts),
            SamplingParams(temperature=temperature, max_tokens=max_tokens),
            use_tqdm=False,
        )
    # too little memory, a model it does not know, a folder we refuse
    except (RuntimeError, ValueError) as error:
        raise EvalError(f"vLLM cannot serve {model}: {one_line(error)}") from error
    return [output.outputs[0].text for output in outputs]


def _with_transformers(
    model: str,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float,
    dtype: str,
    trust_remote_code: bool,
) -> list[str]:
    import torch

    silence_progress_bars()
    loaded: Any = load_model(
        model, None if dtype == "auto" else dtype, trust_remote_code=trust_remote_code
    )
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(loaded.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad():
        output = loaded.generate(
            **batch, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    new = output[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
