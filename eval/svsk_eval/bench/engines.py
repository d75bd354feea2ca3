# SPDX-License-Identifier: Apache-2.0
"""lm-eval's models for vLLM and transformers, with a journal of every finished answer.

Requests whose answer is in the journal are not run. The prompts, stop strings and settings are
lm-eval's own; vLLM is fed request by request instead of in one call, because a call returns only
when its last answer is finished.
"""

import importlib
from typing import Any

from svsk_eval.bench.hf_engine import _JournaledHF
from svsk_eval.bench.journal import Journal
from svsk_eval.bench.journaled_model import AnswerProgress, JournaledModel
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
    model = _JournaledHF(**{**attention, **arguments})
    model.attach(journal, progress)
    model.seed = seed
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
        from svsk_eval.bench.vllm_engine import JournaledVLLM  # starts vLLM
    except ImportError as error:
        raise EvalError(
            f"--engine vllm: vLLM is not installed ({error}). Install it, or use --engine hf."
        ) from error
    model: JournaledModel = JournaledVLLM(**arguments)
    model.attach(journal, progress)
    return model
