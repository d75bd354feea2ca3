# SPDX-License-Identifier: Apache-2.0
"""What of a decoder block can be scaled against what, so that it computes the same.

Norms are found by what linears read, other writers by name (``v_proj`` before ``o_proj``,
``up_proj`` before ``down_proj``), rotary pairs by either layout. Whether a block does with them
what they seem to be for is not concluded from names: :mod:`svsk_offline.planning.smoothing` tries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from svsk_offline.calibration.channel_maxima import MOMENT, BlockMaxima, LinearInput
from svsk_offline.storage.fold import powers_of_two

__all__ = [
    "InputPair",
    "KeyPair",
    "Kind",
    "Pair",
    "Part",
    "even_factors",
    "input_pairs",
    "key_pairs",
    "key_writers",
    "query_writer",
]

Kind = Literal["norms", "o", "down", "keys"]
"""What is scaled: outputs of norms, inputs of ``o_proj``, inputs of ``down_proj``, keys."""

_WRITERS: Final[Mapping[str, tuple[str, Kind]]] = {
    "o_proj": ("v_proj", "o"),
    "down_proj": ("up_proj", "down"),
}
"""Of the input of the linear with a name: the name of the one that writes it, beside it."""


@dataclass(frozen=True)
class Part:
    """A parameter whose rows or columns take factors.

    Attributes:
        parameter: its name below the block.
        axis: 0 for rows (entries of a vector), 1 for columns.
        sign: 1 where it is multiplied, -1 where it is divided.
        index: int64, the factor that each row or column takes; None for one each, in order.
    """

    parameter: str
    axis: Literal[0, 1]
    sign: Literal[1, -1]
    index: torch.Tensor | None = None

    def exponents(self, exponents: torch.Tensor) -> torch.Tensor:
        """Of its rows or columns, from those of the pair's factors."""
        return self.sign * (exponents if self.index is None else exponents[self.index])


@dataclass(frozen=True)
class Pair:
    """Channels that are divided where they are written and multiplied where they are read.

    Attributes:
        kind: what is scaled.
        name: of it, below the block, for messages.
        maxima: float32 [factors], largest magnitudes of the channels of each factor.
        parts: all that is scaled.
    """

    kind: Kind
    name: str
    maxima: torch.Tensor
    parts: tuple[Part, ...]

    def apply(self, block: nn.Module, exponents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scale a loaded block; what :meth:`undo` takes back.

        Args:
            block: its parameters get new tensors: the old ones may be the folder's own pages.
            exponents: of two, int8 or float32 [factors].
        """
        before = {}
        for part in self.parts:
            parameter = block.get_parameter(part.parameter)
            before[part.parameter] = parameter.data
            factors = powers_of_two(part.exponents(exponents)).to(parameter)
            if part.axis == 0:
                factors = factors.reshape(-1, *[1] * (parameter.ndim - 1))
            parameter.data = parameter.data * factors
        return before

    @staticmethod
    def undo(block: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
        """Take :meth:`apply` back."""
        for name, data in before.items():
            block.get_parameter(name).data = data


@dataclass(frozen=True)
class InputPair(Pair):
    """A pair that scales an input of linears.

    Attributes:
        weights: float32 [factors], largest magnitudes of the weights that read it.
    """

    weights: torch.Tensor


@dataclass(frozen=True)
class KeyPair(Pair):
    """A pair that scales the keys of a layer.

    Attributes:
        heads: equal parts of the factors, each of which is scaled for itself.
        even: float32 [factors], factors that even the keys out, see :func:`even_factors`.
        channel: int64 [head_dim], which of a head's factors each of its channels takes.
    """

    heads: int
    even: torch.Tensor
    channel: torch.Tensor


def input_pairs(
    block: nn.Module, found: BlockMaxima, head_dim: int | None
) -> tuple[list[InputPair], dict[str, str]]:
    """Pairs that scale the inputs of a block's linears.

    Args:
        block: loaded.
        found: what was seen of it.
        head_dim: channels of an attention head, None where that is not known.

    Returns:
        The pairs, and by name below the block why the input of each other linear has none.
    """
    pairs: list[InputPair] = []
    left: dict[str, str] = {}
    for read in found.inputs:
        result = _norm_pair(block, read) or _written_pair(block, read, head_dim)
        if isinstance(result, InputPair):
            pairs.append(result)
        else:
            left |= dict.fromkeys(read.linears, result)
    return pairs, left


def _norm_pair(block: nn.Module, read: LinearInput) -> InputPair | None:
    if read.norm is None:
        return None
    parts = [*_rows(block, read.norm, -1), *(_columns(name) for name in read.linears)]
    name = ", ".join(read.linears)
    return InputPair("norms", name, read.maxima, tuple(parts), _column_maxima(block, read.linears))


def _written_pair(block: nn.Module, read: LinearInput, head_dim: int | None) -> InputPair | str:
    """The pair of a linear and the one that writes its input, or why there is none."""
    reader = read.linears[0]
    parent, _, last = reader.rpartition(".")
    writer_name, kind = _WRITERS.get(last, (None, None))
    if writer_name is None or kind is None or len(read.linears) > 1:
        return "reads neither a norm's output nor that of a linear that is known to scale it"
    writer = f"{parent}.{writer_name}" if parent else writer_name
    if not isinstance(linear := dict(block.named_modules()).get(writer), nn.Linear):
        return f"no {writer_name} beside it"
    features, weights = linear.out_features, _column_maxima(block, read.linears)
    parts = _rows(block, writer, -1)
    if features == len(weights):
        return InputPair(kind, reader, read.maxima, (*parts, _columns(reader)), weights)
    if kind != "o" or not head_dim or features % head_dim or len(weights) % features:
        return f"its {len(weights)} inputs are not the {features} outputs of {writer_name}"
    # Query heads that share a key/value head follow one another, and share its factors.
    heads = features // head_dim
    index = torch.arange(features, device=weights.device).view(heads, 1, head_dim)
    index = index.expand(heads, len(weights) // features, head_dim).flatten()
    maxima, weights = (
        values.view(heads, -1, head_dim).amax(1).flatten() for values in (read.maxima, weights)
    )
    return InputPair(kind, reader, maxima, (*parts, _columns(reader, index)), weights)


def key_writers(block: nn.Module) -> dict[str, str]:
    """Modules that write a block's keys, before rotary: by ``k_proj`` its norm, or itself."""
    modules = dict(block.named_modules())
    found = {}
    for name, module in modules.items():
        if name.rpartition(".")[2] == "k_proj" and isinstance(module, nn.Linear):
            norm = _beside(name, "k_norm")
            found[name] = norm if norm in modules else name
    return found


def query_writer(writer: str) -> str:
    """The module that writes the queries beside one that writes keys: ``q_proj`` or ``q_norm``."""
    return _beside(writer, writer.rpartition(".")[2].replace("k_", "q_"))


def even_factors(powers: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """What keys are divided by, so that a scale for many channels costs attention least.

    Channel i is stored with an error of ``s f_i``, s the scale of all, so the error of a score has
    the mean square ``s^2 sum_i E[q_i^2] f_i^2``. The scale follows the largest ``|k_i| / f_i``, for
    which the norm of order p stands: ``s^p = sum_i E|k_i|^p / f_i^p``. Of their product the
    derivative by f_i is 0 at ``f_i^(p + 2) = E|k_i|^p / E[q_i^2]``, up to a factor for all.

    On Qwen2.5-Coder-0.5B the largest magnitudes as factors (p infinite, all queries alike) leave
    q4_0 twice this KL, and p = 4 a quarter more than p = 8 (docs/benchmarks/keys.md).

    Args:
        powers: ``E|k|^p``, p = :data:`MOMENT`, float64 [factors].
        energies: ``E[q^2]`` of the channels that meet them, float64 [factors].

    Returns:
        float32 [factors]; 0 for keys that are always 0.
    """
    # A channel that no query reads could be as coarse as it likes: as coarse as a millionth allows.
    least = 1e-6 * energies.mean()
    weights = energies.clamp(min=float(least)) if least else torch.ones_like(energies)
    return (powers / weights).pow(1 / (MOMENT + 2)).float()


def key_pairs(
    block: nn.Module, found: BlockMaxima, writer: str, head_dim: int, rotary_dim: int
) -> list[KeyPair] | str:
    """Ways to scale keys: each is right for one layout of the rotary pairs.

    Args:
        block: loaded.
        found: what was seen of it, the outputs of the writer and of :func:`query_writer` among it.
        writer: what writes keys, see :func:`key_writers`.
        head_dim: channels of a head.
        rotary_dim: how many of them, the first, rotary turns.

    Returns:
        The ways, the more usual one first; or why there is none.
    """
    reader = query_writer(writer)
    if reader not in dict(block.named_modules()):
        return f"no {reader.rpartition('.')[2]} beside it"
    if "weight" not in dict(block.get_submodule(writer).named_parameters()):
        return "its norm has no weight"
    keys, queries = found.outputs[writer], found.outputs[reader]
    maxima = keys.maxima
    written, read = (len(block.get_parameter(f"{name}.weight")) for name in (writer, reader))
    if written != len(maxima) or written % head_dim or read % written:
        return f"its {written} channels are not those of heads of {head_dim}"
    heads, shared = written // head_dim, read // written
    ways = []
    for channel in _rotary_layouts(head_dim, rotary_dim, maxima.device):
        count = int(channel.max()) + 1
        index = channel + count * torch.arange(heads, device=maxima.device).unsqueeze(1)
        largest = torch.zeros(heads * count, device=maxima.device)
        largest = largest.scatter_reduce(0, index.flatten(), maxima, "amax")
        readers = index.unsqueeze(1).expand(heads, shared, head_dim).flatten()
        parts = (
            *_rows(block, writer, -1, index.flatten()),
            *_rows(block, reader, 1, readers),
        )
        nothing = torch.zeros(heads * count, dtype=torch.float64, device=maxima.device)
        even = even_factors(
            nothing.index_add(0, index.flatten(), keys.powers / keys.count),
            nothing.index_add(0, readers, queries.squares / queries.count),
        )
        ways.append(KeyPair("keys", writer, largest, parts, heads, even, channel))
    return ways


def _rotary_layouts(head_dim: int, rotary_dim: int, device: torch.device) -> list[torch.Tensor]:
    """Which factor each channel of a head takes, int64 [head_dim], in either layout of pairs.

    Rotary turns channel i with i + rotary_dim / 2 (GPT-NeoX, Llama), or 2 i with 2 i + 1 (GPT-J).
    Channels that it leaves alone take one factor each.
    """
    pairs = torch.arange(rotary_dim // 2, device=device)
    alone = torch.arange(head_dim - rotary_dim, device=device) + rotary_dim // 2
    halves = torch.cat((pairs, pairs, alone))
    return [halves, torch.cat((pairs.repeat_interleave(2), alone))]


def _beside(name: str, other: str) -> str:
    parent = name.rpartition(".")[0]
    return f"{parent}.{other}" if parent else other


def _rows(
    block: nn.Module, module: str, sign: Literal[1, -1], index: torch.Tensor | None = None
) -> list[Part]:
    """Rows of a module's weight, and of its bias where it has one."""
    own: dict[str, Any] = dict(block.get_submodule(module).named_parameters(recurse=False))
    return [Part(f"{module}.{key}", 0, sign, index) for key in ("weight", "bias") if key in own]


def _columns(linear: str, index: torch.Tensor | None = None) -> Part:
    return Part(f"{linear}.weight", 1, 1, index)


def _column_maxima(block: nn.Module, linears: list[str]) -> torch.Tensor:
    """Largest magnitude of each input's weights over linears of one input, float32 [K]."""
    weights = (block.get_parameter(f"{name}.weight").detach() for name in linears)
    return torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
