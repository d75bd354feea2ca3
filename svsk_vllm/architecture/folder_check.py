# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder against the architecture its config.json names.

What `svsk validate` says and every loader asks.

The architecture is built without memory for its weights, and never by code from the folder unless
that is allowed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from svsk_vllm.format import SvskFormatError, validate_checkpoint
from svsk_vllm.format.architecture_fit import Architecture
from svsk_vllm.format.shards import ShardedReader, read_json

__all__ = ["checkpoint_problems", "require_sound"]

_MAX_COUNT: Final = 100_000
"""Of layers, heads, labels and all else that is counted out one by one."""
_LARGE: Final = re.compile(
    r"size|position|length|theta|base|window|vocab|token|dim|period|seed|max|context|(^|_)ids?$"
)
"""Keys of numbers that may be larger: sizes and positions cost nothing without weights."""
_MAX_SHOWN: Final = 5


def checkpoint_problems(
    folder: Path, *, trust_remote_code: bool = False, serving: bool = True
) -> list[str]:
    """Everything that is wrong with a checkpoint folder, one line each.

    See :func:`validate_checkpoint`.

    Args:
        folder: the checkpoint.
        trust_remote_code: run Python files of the folder to build its architecture.
        serving: ask also whether vLLM can serve it.
    """
    try:
        hf_config = read_json(folder / "config.json")
        stored = ShardedReader(folder).names
        _check_numbers(folder, hf_config)
        model = build_architecture(folder, len(stored), trust_remote_code=trust_remote_code)
    except SvskFormatError as error:
        problems = validate_checkpoint(folder, serving=serving)
        return problems if str(error) in problems else [*problems, str(error)]
    return validate_checkpoint(
        folder, architecture=describe_architecture(model, stored), serving=serving
    )


def require_sound(folder: Path, hf_config: Any) -> None:
    """Refuse to load a folder that `svsk validate` calls damaged.

    A folder is looked at once in a process, until a file of it changes: an engine asks several
    times.

    Args:
        folder: the checkpoint.
        hf_config: the config object that the loader made of its config.json. A class from the
            folder's own code says that the user allowed it; one that is not of transformers, that
            only the loader knows the architecture.

    Raises:
        SvskFormatError: names the first few problems.
    """
    try:
        files = tuple(
            sorted(
                (path.name, path.stat().st_mtime_ns, path.stat().st_size)
                for path in folder.iterdir()
            )
        )
    except OSError as error:
        raise SvskFormatError(
            f"{folder}: cannot be read ({error}). Is it a folder that this user may read?"
        ) from error
    module = type(hf_config).__module__
    own_code, known = module.startswith("transformers_modules."), module.startswith("transformers.")
    # Transformers asks while it builds a model on another device.
    with (
        torch.device("cpu"),
        _one_thread(),
    ):
        problems = _problems_of(folder.absolute(), files, own_code, own_code or known)
    if problems:
        more = f" And {len(problems) - _MAX_SHOWN} more: `svsk validate {folder}`."
        raise SvskFormatError(
            " ".join(problems[:_MAX_SHOWN]) + (more if len(problems) > _MAX_SHOWN else "")
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread.

    vLLM asks before it forks its engine, and a fork of a process whose pool of threads has been
    used waits for those threads for ever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=4)
def _problems_of(
    folder: Path, files: tuple[tuple[str, int, int], ...], own_code: bool, known: bool
) -> tuple[str, ...]:
    if not known:
        return tuple(validate_checkpoint(folder, serving=False))
    return tuple(checkpoint_problems(folder, trust_remote_code=own_code, serving=False))


def build_architecture(folder: Path, stored: int, *, trust_remote_code: bool = False) -> Any:
    """The model class that config.json names, with all its parameters on the meta device.

    Args:
        folder: holds config.json.
        stored: how many tensors the folder holds; a model of far more parameters is not built to
            its end.
        trust_remote_code: run Python files of the folder.

    Raises:
        SvskFormatError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"), _at_most_parameters(2 * stored + 1000):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except SvskFormatError as error:
        raise SvskFormatError(f"{folder}: {error}") from error
    except Exception as error:  # whatever a hostile config.json makes of transformers
        if not trust_remote_code and "auto_map" in read_json(folder / "config.json"):
            raise SvskFormatError(
                f"{folder}: its architecture is Python code in the folder, which runs only with"
                " --trust-remote-code."
            ) from error
        raise SvskFormatError(
            f"{folder}: transformers cannot build the architecture that config.json describes "
            f"({type(error).__name__}: {_one_line(error)})."
        ) from error
    return model


def describe_architecture(model: Any, stored: list[str]) -> Architecture:
    """Parameters of a model, and which of them transformers fills from each stored tensor.

    Experts that are stored one by one are taken apart in ``model``.
    """
    # Here, for they import transformers, which takes seconds.
    from svsk_vllm.architecture.experts import separate_experts
    from svsk_vllm.architecture.parameter_names import parameter_names

    separate_experts(model, stored)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    everything = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def targets(names: list[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
        filled = parameter_names(model, None, names)
        whole = any(name.startswith(prefix) for name in names)
        return {
            name: (
                ((name,), True)
                if _only_prefixed(name, filled[name].targets[0], prefix, whole)
                else (filled[name].targets, filled[name].pattern is None)
            )
            for name in names
        }

    prefix = f"{model.base_model_prefix}."
    linears = frozenset(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    )
    return Architecture(
        required=parameters,
        optional={name: shape for name, shape in everything.items() if name not in parameters},
        linears=linears,
        tables=frozenset(
            name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
        ),
        tied=dict(tied),
        floating=frozenset(
            name for name, value in model.state_dict().items() if value.is_floating_point()
        ),
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        targets=targets,
    )


def _only_prefixed(name: str, target: str, prefix: str, whole: bool) -> bool:
    """Whether only transformers' tolerance for prefixes, which vLLM lacks, finds its parameter.

    A checkpoint of the body alone, without the prefix on any name, is in order.
    """
    return name == prefix + target or (target == prefix + name and whole)


@contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Stop the construction of a model of more than ``limit`` parameters."""
    count = 0

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise SvskFormatError(
                f"config.json describes a model of more than {limit} parameters, the folder holds"
                " far fewer. One of them is damaged: copy or download the folder again."
            )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _check_numbers(folder: Path, config: Any, key: str = "") -> None:
    """Refuse counts that transformers would try to reach.

    A config of 1e9 layers lists the type of each.

    Raises:
        SvskFormatError: names the key and the number.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            if name != "quantization_config":
                _check_numbers(folder, value, f"{key}.{name}" if key else name)
    elif isinstance(config, list):
        for value in config:
            _check_numbers(folder, value, key)
    elif isinstance(config, int) and abs(config) > _MAX_COUNT:
        last = key.rpartition(".")[2]
        if not _LARGE.search(last) or (
            abs(config) >= 2**31 and "theta" not in last and "base" not in last
        ):
            raise SvskFormatError(
                f"{folder / 'config.json'}: {key} is {str(config)[:20]}, too large for any model. "
                "Copy or download the file again."
            )


def _one_line(error: Exception) -> str:
    """The first line of a message, cut to a readable length, without what a terminal would obey."""
    lines = str(error).strip().splitlines() or ["no message"]
    line = "".join(character if character.isprintable() else "?" for character in lines[0])
    return line if len(line) <= 300 else f"{line[:300]}..."
