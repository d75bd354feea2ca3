# SPDX-License-Identifier: Apache-2.0
"""Loading models and tokenizers to score them, and what can be refused before weights are read."""

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from svsk_eval.errors import EvalError
from svsk_kernels.errors import SvskError
from svsk_offline.calibration.limits import check_token_ids, longest_sequence
from svsk_offline.pipeline import resolve_device
from svsk_offline.storage.hub import check_on_hub
from svsk_offline.storage.model_loading import (
    attention_arguments,
    own_code_refused,
    read_model_config,
)

__all__ = [
    "DTYPES",
    "check_fits",
    "check_folder",
    "check_longest",
    "check_same_vocabulary",
    "declared_limits",
    "is_svsk",
    "load_model",
    "load_tokenizer",
    "resolve_dtype",
    "silence_progress_bars",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for scoring; SVSK checkpoints are dequantised.

    Attention is what the model means
    (:func:`svsk_offline.storage.model_loading.attention_arguments`).

    Args:
        path: a Hugging Face folder, dense or SVSK, or the name of a model on the hub.
        dtype: of weights and activations, or its name; None is float32 on a CPU and bfloat16
            elsewhere.
        device: None is the first CUDA device if there is one, else the CPU.
        trust_remote_code: run Python files that come with the model.

    Returns:
        The model in evaluation mode on ``device``.

    Raises:
        EvalError: there is no such model, or no such dtype.
        SvskError: the model needs its own Python files and may not run them.
        SvskFormatError: it is an SVSK checkpoint that this package cannot read.
    """
    where = device if isinstance(device, torch.device) else resolve_device(device or "auto")
    what = resolve_dtype(dtype, where)
    check_folder(path)
    try:
        if is_svsk(path):
            # registers the method with transformers when it is imported
            importlib.import_module("svsk_vllm.hf")
        config = read_model_config(path, trust_remote_code=trust_remote_code)
        with own_code_refused(path):
            model = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=what,
                trust_remote_code=trust_remote_code,
                **attention_arguments(config),
            )
    # ImportError: transformers asks for a package per quantisation method
    except (OSError, ImportError) as error:
        raise EvalError(f"{path}: cannot load a model from it. {error}") from error
    return model.to(where)


def silence_progress_bars() -> None:
    """Keep transformers from drawing a bar per model, for programs that draw their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: a Hugging Face folder or the name of a model on the hub.
        trust_remote_code: run Python files that come with the model.

    Returns:
        The tokenizer.

    Raises:
        EvalError: there is none.
        SvskError: it needs Python files of the model and may not run them.
    """
    check_folder(path)
    try:
        with own_code_refused(path):
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise EvalError(
            f"{path}: cannot load a tokenizer from it. Copy the tokenizer files of the original"
            f" model there. {error}"
        ) from error


def check_fits(
    path: str | Path, vocabulary: int, longest: int | None, tokens: torch.Tensor
) -> None:
    """Check that a model can take the tokens.

    Args:
        path: of the model, for errors.
        vocabulary: tokens the model knows.
        longest: tokens it takes at most, None if that is not limited.
        tokens: int64 [chunks, seq_len].

    Raises:
        EvalError: a token is beyond the vocabulary, or the chunks are too long.
    """
    try:
        check_token_ids(
            tokens, vocabulary, lambda token: _spelled(path, token), str(path), "the text to score"
        )
    except SvskError as error:
        raise EvalError(str(error)) from error
    check_longest(path, longest, tokens.shape[1])


def check_longest(path: str | Path, longest: int | None, seq_len: int) -> None:
    """Check that a model takes chunks of a length.

    Raises:
        EvalError: it does not.
    """
    if longest is not None and seq_len > longest:
        raise EvalError(
            f"{path}: takes {longest} tokens at most, chunks have {seq_len}. Use shorter chunks."
        )


def _spelled(path: str | Path, token: int) -> Any:
    """A token's text, None where the tokenizer cannot be loaded just so."""
    try:
        return load_tokenizer(path).convert_ids_to_tokens(token)
    except (EvalError, SvskError):
        return None


def declared_limits(path: str | Path, *, trust_remote_code: bool = False) -> tuple[int, int | None]:
    """Size of the vocabulary and longest sequence of a model by its config.

    Args:
        path: folder or hub name.
        trust_remote_code: run Python files that come with the model.

    Raises:
        EvalError: its config cannot be read.
        SvskError: the config's class is among those files, and may not be run.
    """
    check_folder(path)
    try:
        config = read_model_config(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise EvalError(f"{path}: cannot read a model's config from it. {error}") from error
    return int(config.get_text_config().vocab_size), longest_sequence(config)


def check_same_vocabulary(
    model_path: str | Path, size: int, reference_path: str | Path, reference_size: int
) -> None:
    """Check that model and reference choose among equally many tokens.

    Raises:
        EvalError: they do not.
    """
    if size != reference_size:
        raise EvalError(
            f"{model_path} has a vocabulary of {size}, the reference {reference_path} one of"
            f" {reference_size}. Compare a model with the one it was made from."
        )


def is_svsk(path: str | Path) -> bool:
    """Whether the config of a folder or hub model declares the quantisation method ``svsk``."""
    declared = PretrainedConfig.get_config_dict(str(path))[0].get("quantization_config")
    return isinstance(declared, dict) and declared.get("quant_method") == "svsk"


def check_folder(path: str | Path) -> None:
    """Check that a path is a model folder, or else a name that the hub or its local cache has.

    Raises:
        EvalError: it has no ``config.json``.
        SvskError: it is not there, and the hub does not have it.
    """
    if not Path(path).exists():
        check_on_hub(str(path))
    elif not (Path(path) / "config.json").is_file():
        raise EvalError(f"{path}: not a model folder, it has no config.json.")


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """A dtype by its name; None is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        EvalError: there is no such name.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise EvalError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
