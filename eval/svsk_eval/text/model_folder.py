# SPDX-License-Identifier: Apache-2.0
"""What a model folder tells without being loaded.

Identity, method, size, bits per weight. Any quantiser's.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from svsk_eval.errors import EvalError
from svsk_vllm.format import ShardedReader, SvskFormatError
from svsk_vllm.format.shards import INDEX_NAME, SINGLE_NAME, read_json, read_weight_map
from svsk_vllm.format.spec import TensorSpec

__all__ = ["Folder", "bits_per_weight", "read_folder"]

# of weights, where the names of Transformers are not used
_OTHER_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.gguf")
_IDENTITY: Final = ("*.json", "*.jinja", "*.model", "*.txt", *_OTHER_WEIGHTS)
_DENSE: Final = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Folder:
    """A model folder.

    Attributes:
        path: the folder.
        fingerprint: SHA-256 over configuration, tokenizer and weights.
        method: ``quant_method`` of its configuration, ``none`` for a dense model.
        size_bytes: of the weight files that are loaded; copies of the weights beside them do not
            count.
        tensors: by name; empty where the weights are not safetensors.
    """

    path: Path
    fingerprint: str
    method: str
    size_bytes: int
    tensors: dict[str, TensorSpec]

    @property
    def modules(self) -> dict[str, dict[str, TensorSpec]]:
        """Tensors by the module they belong to, and by the rest of their names."""
        modules: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        for name, stored in self.tensors.items():
            # bitsandbytes puts the state of a weight under the weight's own name
            module, dot, rest = name.partition(".weight.")
            if not dot:
                module, _, rest = name.rpartition(".")
            modules[module][rest] = stored
        return dict(modules)


def read_folder(path: Path) -> Folder:
    """Look at a model folder; reads all its files once.

    Raises:
        EvalError: it is not a model folder, or a file in it is damaged.
    """
    try:
        config = read_json(path / "config.json")
    except (OSError, SvskFormatError) as error:
        raise EvalError(f"{path}: not a model folder. {error}") from error
    whole = hashlib.sha256()
    for file in sorted({file for pattern in _IDENTITY for file in path.glob(pattern)}):
        with file.open("rb") as handle:
            digest = hashlib.sha256()
            while block := handle.read(1 << 22):
                digest.update(block)
        whole.update(f"{file.name} {digest.hexdigest()}\n".encode())
    try:
        weights = _weight_files(path)
        tensors = _tensors(path, weights)
    except SvskFormatError as error:
        raise EvalError(str(error)) from error
    declared = config.get("quantization_config") or {}
    return Folder(
        path=path,
        fingerprint=whole.hexdigest(),
        method=str(declared.get("quant_method", "none")),
        size_bytes=sum(file.stat().st_size for file in weights),
        tensors=tensors,
    )


def _weight_files(path: Path) -> list[Path]:
    """The files that loading the model reads.

    Shards of the index, else the single file, else all of the first kind.

    Raises:
        EvalError: there are none, or vLLM and transformers would load different ones.
        SvskFormatError: the index is damaged.
    """
    if (path / INDEX_NAME).exists():
        names = sorted(set(read_weight_map(path / INDEX_NAME).values()))
        if names and SINGLE_NAME not in names and (path / SINGLE_NAME).exists():
            raise EvalError(
                f"{path}: transformers loads {SINGLE_NAME}, vLLM what {INDEX_NAME} names. Remove"
                " the one that is old."
            )
        files = [path / name for name in names]
    elif (path / SINGLE_NAME).exists():
        files = [path / SINGLE_NAME]
    else:
        matches = (sorted(path.glob(pattern)) for pattern in _OTHER_WEIGHTS)
        files = next(filter(None, matches), [])
    if not files:
        raise EvalError(
            f"{path}: has no weights, expected *.safetensors files. Copy or write the folder again."
        )
    return files


def _tensors(path: Path, weights: list[Path]) -> dict[str, TensorSpec]:
    if weights[0].suffix != ".safetensors":
        return {}
    if (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists():
        reader = ShardedReader(path)
        return {name: reader.describe(name) for name in reader.names}
    tensors: dict[str, TensorSpec] = {}
    shard_of: dict[str, str] = {}
    for file in weights:  # of any name, as AutoGPTQ writes them
        reader = ShardedReader(path, shards=[file.name])
        for name in reader.names:
            if name in shard_of:
                raise EvalError(
                    f"{path}: {name} is in {shard_of[name]} and in {file.name}, and there is no"
                    f" {INDEX_NAME} that says which is loaded. Remove the file that is not."
                )
            shard_of[name], tensors[name] = file.name, reader.describe(name)
    return tensors


def bits_per_weight(reference: Folder, folders: Iterable[Folder]) -> list[float | None]:
    """Bits stored per weight, over the reference's linears that some folder stores otherwise.

    Everything stored under a linear's name counts, but for its bias: codes, scales, zero points,
    permutations, factors. The same linears are counted for all, so that a folder that leaves some
    of them dense pays for it.

    Args:
        reference: a dense model.
        folders: the models to measure.

    Returns:
        One figure per folder; None where the folder names its linears otherwise or is not in
        safetensors, and for all if no folder stores anything otherwise.
    """
    dense = {
        name: parts["weight"]
        for name, parts in reference.modules.items()
        if "weight" in parts and parts["weight"].dtype in _DENSE and len(parts["weight"].shape) == 2
    }
    stored = [folder.modules for folder in folders]
    changed = {
        name
        for name, weight in dense.items()
        for modules in stored
        if _is_changed(weight, modules.get(name))
    }
    weights = sum(math.prod(dense[name].shape) for name in changed)
    if not weights:
        return [None] * len(stored)

    def bits(modules: Mapping[str, Mapping[str, TensorSpec]]) -> int:
        parts = [part for name in changed for part in modules[name].items()]
        return sum(part.num_bits for rest, part in parts if rest != "bias")

    return [bits(modules) / weights if changed <= modules.keys() else None for modules in stored]


def _is_changed(dense: TensorSpec, parts: dict[str, TensorSpec] | None) -> bool:
    if not parts:
        return False
    weight = parts.get("weight")
    return weight is None or weight.dtype not in _DENSE or weight.shape != dense.shape
