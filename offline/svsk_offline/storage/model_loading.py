# SPDX-License-Identifier: Apache-2.0
"""Building a model's class as its makers mean it.

The one place where transformers is asked.

Code that comes with a model runs only where the caller says ``trust_remote_code``; transformers'
own question at the terminal is never reached.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from svsk_kernels.errors import SvskError, one_line

__all__ = [
    "attention_arguments",
    "build_skeleton",
    "needs_own_code",
    "own_code_refused",
    "read_model_config",
]

_SOFT_CAPS: Final = ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_softcapping")


@contextlib.contextmanager
def own_code_refused(where: object) -> Iterator[None]:
    """Turn transformers' refusal to run a model's own code into a line that names the option.

    Raises:
        SvskError: the model needs its own code, and was loaded with ``trust_remote_code=False``.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise SvskError(
            f"{where}: this model comes with Python files of its own (auto_map in its"
            " configuration), which are run only with --trust-remote-code. Read them first."
        ) from error


def needs_own_code(config: dict[str, Any]) -> bool:
    """Whether the class that a config.json names is in files beside it, not in transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named, kind = config.get("auto_map"), config.get("model_type")
    if not isinstance(named, dict):
        return False
    missing = {"AutoConfig": kind not in CONFIG_MAPPING_NAMES}
    missing["AutoModelForCausalLM"] = kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return any(missing.get(name, False) for name in named)


def read_model_config(where: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder or hub name.

    Raises:
        SvskError: the model needs its own code and may not run it.
        OSError, ValueError, KeyError: as transformers.
    """
    from transformers import AutoConfig

    with own_code_refused(where):
        return AutoConfig.from_pretrained(str(where), trust_remote_code=trust_remote_code)


def attention_arguments(config: Any) -> dict[str, Any]:
    """Keywords for ``from_config`` and ``from_pretrained`` under which attention is the model's.

    transformers' default, torch's scaled_dot_product_attention, leaves out the soft cap of Gemma
    2's attention logits without a word. Models with other such features (attention sinks) declare
    that they cannot use it.

    Args:
        config: transformers configuration of the model.

    Returns:
        ``attn_implementation`` where the default would compute another function, else nothing.
    """
    parts = [config, config.get_text_config()]
    capped = any(getattr(part, key, None) for part in parts for key in _SOFT_CAPS)
    return {"attn_implementation": "eager"} if capped else {}


def build_skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a folder, parameters on the meta device, buffers real.

    In evaluation mode.

    Raises:
        SvskError: transformers has no such causal language model, cannot build it from config.json,
            or would have to run code that came with it and may not.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        config = read_model_config(folder, trust_remote_code=trust_remote_code)
        with own_code_refused(folder), init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                **attention_arguments(config),
            )
        model.tie_weights()
    except SvskError:
        raise
    except ImportError as error:
        raise SvskError(
            f"{folder}: its model class needs a package that is not installed"
            f" ({one_line(error)[:300]})."
        ) from error
    except Exception as error:  # a wrong value in config.json may raise anything in a model class
        raise SvskError(
            f"{folder}: transformers cannot build a causal language model from its config.json "
            f"({type(error).__name__}: {one_line(error)[:300]})."
        ) from error
    module: nn.Module = model.eval().requires_grad_(False)
    return module
