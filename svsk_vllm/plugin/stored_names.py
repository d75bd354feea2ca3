# SPDX-License-Identifier: Apache-2.0
"""What the checkpoint holds, under the names that vLLM's model gives it.

vLLM renames modules (``hf_to_vllm_mapper``), puts prefixes before them (drafts, towers) and fuses
linears, while the targets and ignore entries of a checkpoint name its own modules. So a layer is
looked up among the stored tensors first, and targets and patterns are then matched with the name
that is stored.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from svsk_vllm.format import LinearSpec, ShardedReader, SvskFormatError, TensorSpec
from svsk_vllm.format.shards import STORED_DTYPES

__all__ = ["StoredModules", "other_size", "read_headers", "stored_dense", "stored_twice"]

Rename = Callable[[list[str]], list[str]]


def read_headers(model: str, revision: str | None) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of a model, by name.

    Empty where there are no safetensors to look into.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        revision: of the latter.

    Raises:
        SvskFormatError: a folder lacks a shard that its index lists, or one is damaged.
    """
    if Path(model).is_dir():
        if not any(Path(model).glob("*.safetensors*")):
            return {}
        reader = ShardedReader(Path(model))
        return {name: reader.describe(name) for name in reader.names}
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    return {
        name: TensorSpec(STORED_DTYPES.get(entry["dtype"], torch.float64), tuple(entry["shape"]))
        for name, entry in get_safetensors_params_metadata(model, revision=revision).items()
    }


class StoredModules:
    """The stored modules by vLLM's names.

    Args:
        tensors: every stored tensor.
        renames: vLLM's translations of names, in the order in which they were announced.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], renames: Iterable[Rename] = ()) -> None:
        self.tensors = tensors
        renames = list(renames)
        self._own_name: dict[str, str] = {}
        self._suffixes: dict[str, set[str]] = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            self._suffixes.setdefault(module, set()).add(last)
            renamed = name
            for rename in renames:
                # A dropped name is one the model does not load: it keeps its own.
                renamed = next(iter(rename([renamed])), renamed)
            self._own_name.setdefault(renamed.rpartition(".")[0], module)
        self._roots = {name.partition(".")[0] for name in self._own_name}

    def find(self, name: str) -> str | None:
        """The stored name of a module of vLLM's model, None when it holds no tensor of its own.

        A first part that begins no stored name (``draft_model.``, an empty one before a dot) is
        vLLM's own and is left out. If then nothing has the name, the only one that ends with it is
        taken.
        """
        while (
            "." in name and name not in self._own_name and name.partition(".")[0] not in self._roots
        ):
            name = name.partition(".")[2]
        if name in self._own_name:
            return self._own_name[name]
        longer = [known for known in self._own_name if known.endswith(f".{name}")]
        return self._own_name[longer[0]] if name and len(longer) == 1 else None

    @property
    def modules(self) -> list[str]:
        """Names of all stored modules that hold a tensor of their own."""
        return list(self._suffixes)

    def suffixes(self, module: str) -> set[str]:
        """Last parts of the names of a stored module's tensors."""
        return self._suffixes.get(module, set())

    def below(self, name: str) -> list[str]:
        """Stored names of the modules at or below a module of vLLM's model."""
        return [
            own
            for known, own in self._own_name.items()
            if known == name or known.startswith(f"{name}.")
        ]


def other_size(spec: LinearSpec, rows: int, columns: int) -> SvskFormatError:
    """What to raise of a stored weight that is of another size than vLLM's layer."""
    return SvskFormatError(
        f"{spec.name}.weight_packed: holds a weight of {spec.n} x {spec.k}, config.json asks for"
        f" {rows} x {columns}. The folder mixes files of two models: copy or quantise it again."
    )


def stored_twice(name: str) -> SvskFormatError:
    """What to raise of a module that is stored in both ways."""
    return SvskFormatError(
        f"{name}: stored both dense (.weight) and quantised. Remove one from the folder."
    )


def stored_dense(name: str) -> SvskFormatError:
    """What to raise of a module that is dense, and has a scheme by its name."""
    return SvskFormatError(
        f"{name}.weight: stored as it was, but config.json quantises {name}. Add it to the ignore"
        " list, or quantise it."
    )
