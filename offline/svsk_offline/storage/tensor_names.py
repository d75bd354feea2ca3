# SPDX-License-Identifier: Apache-2.0
"""Which stored tensor fills which parameter, by transformers' own loading rules.

Folders do not always name tensors as the model class does: transformers renames some when it loads
and saves (GPT-NeoX, Gemma 3), drops or adds the base model's prefix, splits or joins a few, and
ties parameters by what is stored rather than by the config alone. Everything that reads or writes
weights asks here.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key

from svsk_kernels.errors import SvskError
from svsk_vllm.architecture.parameter_names import parameter_names
from svsk_vllm.format.spec import TensorSpec

__all__ = ["Conversion", "TensorMap", "require_complete"]

_OLD_TABLES: Final = re.compile(
    r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$"
)
"""Tables that older versions of transformers stored and that are computed from the config."""


@dataclass
class Conversion:
    """Parameters that transformers makes out of stored tensors in another way than by renaming.

    Attributes:
        pattern: source pattern of transformers' converter.
        inputs: stored names in transformers' order, with the source pattern each matches.
    """

    pattern: str
    inputs: list[tuple[str, str]] = field(default_factory=list)


class TensorMap:
    """The stored tensors of a folder against the parameters and buffers of its model class.

    Args:
        where: folder or checkpoint, for messages.
        model: the transformers model, on the meta device.
        stored: names of the stored tensors.
        equal: whether two stored tensors hold the same values; asked of the two ends of a tied
            pair.

    Attributes:
        sources: stored name by name of the parameter or buffer that it fills, tied ones under each
            of their names.
        conversions: how the other parameters are made, by the first parameter each conversion
            fills.
        unused: stored tensors that need not go into a checkpoint: second copies of tied ones, and
            old tables.
        spare: stored tensors that the model class says it does not use (parts for drafting, towers
            for images); other programs do.
        foreign: stored tensors of which the model class knows nothing.
        untied: parameters that the config ties to another but the stored values do not.

    Raises:
        SvskError: two stored tensors fill one parameter.
    """

    def __init__(
        self, where: object, model: Any, stored: Iterable[str], equal: Callable[[str, str], bool]
    ) -> None:
        self._where, self._model = where, model
        self.sources: dict[str, str] = {}
        self.conversions: dict[str, Conversion] = {}
        self.unused: set[str] = set()
        self.spare: list[str] = []
        self.foreign: list[str] = []
        self.untied: list[str] = []
        self._known = model.state_dict()
        # First parameter of the conversion, by each parameter it fills.
        self._made: dict[str, str] = {}
        self._targets: dict[str, tuple[str, ...]] = {}
        self._output: dict[str, str] = {}
        self._match(stored)
        pairs = self._tied_pairs()
        # Again, for the others of a set whose last member alone is stored.
        for target, source in pairs * 2:
            self._tie(target, source, equal)

    def targets(self, stored: str) -> tuple[str, ...]:
        """Parameters that a tensor fills, none for :attr:`unused` and :attr:`spare` ones."""
        return () if stored in self.unused else self._targets.get(stored, ())

    def stored_module(self, module: str) -> str | None:
        """Name in the folder of a module whose weight is stored as one tensor for it, else None."""
        stored = self.sources.get(f"{module}.weight", "")
        alone = self._targets.get(stored) == (f"{module}.weight",) and stored.endswith(".weight")
        return stored.removesuffix(".weight") if alone else None

    def output_name(self, stored: str) -> str:
        """Name of a tensor in a checkpoint: its own, unless only transformers would find it."""
        return self._output.get(stored, stored)

    def inputs_of(self, parameter: str) -> list[str]:
        """Stored names a parameter or buffer is made from; empty when none is there."""
        if parameter in self.sources:
            return [self.sources[parameter]]
        first = self._made.get(parameter)
        return [] if first is None else [name for name, _ in self.conversions[first].inputs]

    def convert(self, parameter: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A parameter that transformers converts from stored tensors.

        Args:
            parameter: one for which :meth:`inputs_of` names tensors and :attr:`sources` none.
            read: gives a stored tensor.
        """
        first = self._made[parameter]
        conversion = self.conversions[first]
        converters = [
            entry
            for entry in get_model_conversion_mapping(self._model)
            if isinstance(entry, WeightConverter) and conversion.pattern in entry.source_patterns
        ]
        converter: Any = copy.deepcopy(converters[0])
        for name, pattern in conversion.inputs:
            converter.add_tensor(first, name, pattern, lambda name=name: read(name))
        made = converter.convert(first, model=self._model, config=self._model.config)[parameter]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _match(self, stored: Iterable[str]) -> None:
        ordered = sorted(stored, key=dot_natural_key)  # some renamings depend on what came before
        for name, place in parameter_names(self._model, None, ordered).items():
            if place.targets[0] not in self._known:
                if _OLD_TABLES.search(name):
                    self.unused.add(name)
                else:
                    (self.spare if self._is_spare(name, place.targets[0]) else self.foreign).append(
                        name
                    )
                continue
            self._targets[name] = place.targets
            if place.pattern is not None:
                conversion = self.conversions.setdefault(
                    place.targets[0], Conversion(place.pattern)
                )
                conversion.inputs.append((name, place.pattern))
                self._made.update(dict.fromkeys(place.targets, place.targets[0]))
                continue
            other = self.sources.setdefault(place.targets[0], name)
            if other != name:
                raise SvskError(
                    f"{self._where}: {other} and {name} both fill {place.targets[0]} of"
                    f" {type(self._model).__name__}. Remove the one that is not meant."
                )

    def _is_spare(self, *names: str) -> bool:
        """Whether transformers itself expects such a tensor to be left over."""
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns for name in names)

    def _tied_pairs(self) -> list[tuple[str, str]]:
        """Parameters that are one tensor: tied by the config, or used twice by the class."""
        tied: dict[str, str] = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(parameter), name)
            if other != name and name not in tied and other not in tied:
                tied[name] = other
        return list(tied.items())

    def _tie(self, target: str, source: str, equal: Callable[[str, str], bool]) -> None:
        """What transformers' ``tie_weights`` does with a pair: values decide, either way."""
        of_target, of_source = self.sources.get(target), self.sources.get(source)
        if of_target is None and of_source is not None:
            self.sources[target] = of_source
        elif of_target is not None and of_source is None:
            self.sources[source] = of_target
            if (better := self.name_for(source)) is not None:
                self._output[of_target] = better
        elif of_target is not None and of_source is not None and of_target != of_source:
            if equal(of_target, of_source):
                self.unused.add(of_target)
                self.sources[target] = of_source
            elif target not in self.untied:
                self.untied.append(target)

    def name_for(self, parameter: str) -> str | None:
        """A name by which transformers finds a parameter in this folder; None if it is unclear.

        The names of its neighbours tell how the folder names things.
        """
        candidates = [parameter]
        for stored, (target, *_) in self._targets.items():
            tail = _common_tail(stored, target)
            head, new = target[: len(target) - tail], stored[: len(stored) - tail]
            if head and parameter.startswith(head):
                candidates.append(new + parameter[len(head) :])
        parameters = parameter_names(self._model, None, dict.fromkeys(candidates))
        return next(
            (name for name in reversed(candidates) if parameters[name].targets == (parameter,)),
            None,
        )


def require_complete(
    tensor_map: TensorMap, folder: object, model: Any, describe: Callable[[str], TensorSpec]
) -> None:
    """Refuse a folder whose tensors are not those of its model class.

    Args:
        tensor_map: of the folder.
        folder: it, for messages.
        model: the transformers model, on the meta device.
        describe: dtype and shape of a stored tensor.

    Raises:
        SvskError: the folder lacks a tensor that the model needs or holds it in another shape, or
            holds one that the model class does not know.
    """
    kind = type(model).__name__
    if tensor_map.foreign:
        more = f", and {len(tensor_map.foreign) - 1} more" if len(tensor_map.foreign) > 1 else ""
        raise SvskError(
            f"{folder}: {kind} has no tensor {tensor_map.foreign[0]}{more}:"
            " transformers would leave it out of the model. If config.json"
            " is the right one, take the tensor out of the folder."
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, want in model.state_dict().items():
        inputs = tensor_map.inputs_of(name)
        if not inputs and name in parameters:
            raise SvskError(
                f"{folder}: no tensor {name}, which {kind} needs. Download or copy the model again."
            )
        for stored in inputs:
            # Of a converter's inputs, only whether they can be read.
            shape = describe(stored).shape
            if name in tensor_map.sources and tuple(shape) != tuple(want.shape):
                raise SvskError(
                    f"{folder}: {stored} has shape {list(shape)}, expected {list(want.shape)} by"
                    " config.json."
                )


def _common_tail(left: str, right: str) -> int:
    """Characters of the whole dotted parts in which two names end alike."""
    count = 0
    for a, b in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if a != b:
            break
        count += len(a) + 1
    return min(count - 1, len(left), len(right)) if count else 0
