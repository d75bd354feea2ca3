# SPDX-License-Identifier: Apache-2.0
"""What arrives at the layers while vLLM loads: whether it is complete, and as it was stored.

vLLM looks for parameters that nothing was loaded into, but not in quantised models, and it lets a
model's own ``load_weights`` change tensors by their names. A quantisation method sees neither. So
torch's registration hook, which tells who becomes whose parent, finds the models that hold layers
of ours, and their ``load_weights`` is observed: the stored tensors as they enter it, and at its end
every parameter of the model.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from svsk_vllm.format import SvskFormatError

__all__ = [
    "LinearRecord",
    "ShardId",
    "Stored",
    "expect",
    "loaded_shards",
    "record_loads",
    "stored_tensor",
]

ShardId = str | int | tuple[int, ...] | None
Loader = Callable[..., Any]

_PACKED = (".sidecar_u", ".sidecar_v", ".weight_scale")
"""Ends of names of tensors that may be stored as bytes of packed integers."""


@dataclass(frozen=True)
class Stored:
    """A tensor as vLLM read it from the checkpoint.

    Packed factors and scale codes go on as int8, ``dtype`` is the stored one.
    """

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype


@dataclass
class LinearRecord:
    """What was loaded into one linear of vLLM's model, by its own loaders.

    Attributes:
        shards: vLLM's ids of the parts fused into it, (None,) for an unfused one.
        skip: parameters that somebody else counts.
        counted: whether anything has to be loaded at all: not where weights are made up.
        seen: shard ids that arrived, by the name of the parameter.
    """

    shards: tuple[ShardId, ...]
    skip: frozenset[str] = frozenset()
    counted: bool = True
    seen: dict[str, set[ShardId]] = field(default_factory=dict)

    def lacks(self, parameter: str) -> set[ShardId]:
        """Shards of a parameter that did not arrive; a tensor that is fused already fills all."""
        seen = self.seen.get(parameter, set())
        return set() if None in seen else set(self.shards) - seen


_records: "weakref.WeakKeyDictionary[torch.nn.Module, LinearRecord]" = weakref.WeakKeyDictionary()
_holders: "weakref.WeakSet[torch.nn.Module]" = (
    weakref.WeakSet()
)  # modules that hold a linear of ours
_loaded_once: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
_streams: list["_Stream"] = []  # that of the outermost load_weights in progress, if any
_hooks: list[Any] = []


def expect(layer: torch.nn.Module, record: LinearRecord) -> None:
    """Have a linear's parameters looked for after loading, and the models observed that hold it."""
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_note_parent))
    _records[layer] = record
    _holders.add(layer)


def record_loads(layer: Any) -> None:
    """Have the layer's own loaders, of weight and bias, note what they are called with."""
    for name in ("weight_loader", "weight_loader_v2"):
        if hasattr(type(layer), name):
            setattr(layer, name, _recording(layer, name))


def _recording(layer: Any, loader: str) -> Loader:
    """A method of the layer that loads. vLLM's reload binds arguments by these names.

    The closure must not hold the layer, which would keep it alive.
    """
    held, own_loader = weakref.ref(layer), getattr(type(layer), loader)

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> Any:
        layer = held()
        assert layer is not None, "a loader outlives its layer"
        if (record := _records.get(layer)) is not None:
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter is param:
                    record.seen.setdefault(name, set()).update(loaded_shards(loaded_shard_id))
        return own_loader(
            layer, param, loaded_weight, *(() if loaded_shard_id is None else (loaded_shard_id,))
        )

    return load


def loaded_shards(shard: Any) -> tuple[ShardId, ...]:
    """The shards that one call of a loader fills: one tensor may hold several."""
    return shard if isinstance(shard, tuple) else (shard,)


def stored_tensor(arrived: torch.Tensor, suffix: str) -> Stored | None:
    """The stored tensor that a loader was given, or given a part or a copy of.

    None when no first load is observed.

    Args:
        arrived: what the layer's loader got.
        suffix: last part of the stored tensor's name, for those who pass on a copy.
    """
    return _streams[0].origin(arrived, suffix) if _streams else None


class _Stream:
    """The tensors that one call of a model's ``load_weights`` consumes."""

    def __init__(self, *, first: bool) -> None:
        self._first = first  # a reload passes tensors on late, and by the same code
        self._current: Stored | None = None
        self._alive: dict[int, tuple[str, weakref.ref[torch.Tensor], torch.dtype]] = {}

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            dtype = tensor.dtype
            if dtype == torch.uint8 and name.endswith(_PACKED):
                # The parameter holds unpacked integers: vLLM would warn of another dtype for each
                # tensor.
                tensor = tensor.view(torch.int8)
            self._current = Stored(name, tensor, dtype)
            self._alive[tensor.untyped_storage().data_ptr()] = (name, weakref.ref(tensor), dtype)
            yield name, tensor
        self._current = None

    def origin(self, arrived: torch.Tensor, suffix: str) -> Stored | None:
        if not self._first:
            return None
        storage = arrived.untyped_storage().data_ptr()
        if (
            self._current is not None
            and self._current.tensor.untyped_storage().data_ptr() == storage
        ):
            return self._current
        if storage in self._alive:
            name, held, dtype = self._alive[storage]
            if (tensor := held()) is not None:
                return Stored(name, tensor, dtype)
        # A copy. A model that collects tensors before it passes them on is not followed here.
        return (
            self._current
            if self._current is not None and self._current.name.endswith(f".{suffix}")
            else None
        )


def _note_parent(module: torch.nn.Module, _: str, submodule: torch.nn.Module | None) -> None:
    if submodule not in _holders or module in _holders:
        return
    _holders.add(module)
    if callable(getattr(type(module), "load_weights", None)):
        module.load_weights = _observed(module)  # type: ignore[assignment]


def _observed(module: torch.nn.Module) -> Loader:
    """The module's ``load_weights``, observed when it is the outermost one.

    Does not hold the module.
    """
    held = weakref.ref(module)

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        model: Any = held()
        assert model is not None, "a loader outlives its model"
        if _streams:
            return type(model).load_weights(model, weights, *args, **kwargs)
        with _stream(first=model not in _loaded_once) as stream:
            loaded = type(model).load_weights(model, stream.watch(weights), *args, **kwargs)
        if model not in _loaded_once:  # later ones may bring a few tensors each
            _loaded_once.add(model)
            _check_complete(model, loaded)
        return loaded

    return load_weights


@contextmanager
def _stream(*, first: bool) -> Iterator[_Stream]:
    stream = _Stream(first=first)
    _streams.append(stream)
    try:
        yield stream
    finally:
        _streams.remove(stream)


def _check_complete(model: torch.nn.Module, loaded: set[str] | None) -> None:
    """Refuse a model with parameters that nothing was loaded into.

    Args:
        model: the whole model.
        loaded: names of parameters that its ``load_weights`` says it filled, None where it does not
            say.
    """
    records = {
        name: record
        for name, module in model.named_modules()
        if (record := _records.get(module)) is not None
    }
    if not any(record.counted for record in records.values()):
        return
    missing = []
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        record = records.get(owner)
        if record is not None:
            if last not in record.skip:
                missing += _missing_shards(name, record, last, loaded)
        elif (
            loaded is not None
            and name not in loaded
            and not _made_up(model, owner, parameter, tied)
        ):
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:5]) + (
            f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        )
        raise SvskFormatError(
            f"The checkpoint lacks what vLLM loads into {shown}. Copy or download the folder again;"
            " `svsk validate` lists what is missing."
        )


def _missing_shards(
    name: str, record: LinearRecord, parameter: str, loaded: set[str] | None
) -> list[str]:
    lacks = record.lacks(parameter)
    if not record.seen.get(parameter) and (loaded is None or name in loaded):
        return []  # filled by a loader of its own, which is the model's business
    return [
        name if shard is None else f"{name} (part {shard!r})"
        for shard in record.shards
        if shard in lacks
    ]


def _made_up(model: torch.nn.Module, owner: str, parameter: torch.Tensor, tied: bool) -> bool:
    """Parameters that a checkpoint need not hold.

    Those of the KV cache, empty ones, a tied head.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    module = model.get_submodule(owner)
    return (
        parameter.numel() == 0
        or isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        or (tied and isinstance(module, ParallelLMHead))
    )
