# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's config.json and the headers of its files say, read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from svsk_vllm.format.config import ConfigGroup, SvskCheckpointConfig
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import read_json
from svsk_vllm.format.shard_headers import ShardHeaders
from svsk_vllm.format.suffixes import WEIGHT_PACKED, split_suffix

__all__ = [
    "Contents",
    "StoredLinear",
    "StoredTensor",
    "parse_quantization_config",
    "shape_and_scheme",
]

_BITS: Final = {"F8": 8, "BF16": 16, "BOOL": 8, "F4": 4, "F6": 6}
"""Of a value, by the beginning of safetensors' name of its dtype where that has no number."""


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, as safetensors calls it, and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    @property
    def num_bits(self) -> int:
        """Stored size in bits."""
        named = self.dtype.partition("_")[0]
        bits = _BITS.get(named) or int(named.lstrip("FIUC"))
        return bits * self.num_values


@dataclass(frozen=True)
class StoredLinear:
    """A quantised linear: shape [n, k] = [out, in], scheme, and what is stored of it."""

    n: int
    k: int
    scheme: ConfigGroup
    tensors: dict[str, StoredTensor]

    @property
    def num_weights(self) -> int:
        """Number of weights, ``n * k``."""
        return self.n * self.k

    @property
    def stored_bits(self) -> int:
        """Every stored bit, bias excluded."""
        return sum(tensor.num_bits for tensor in self.tensors.values())


class Contents:
    """What a checkpoint holds, by name; no tensor is read.

    Attributes:
        linears: the quantised ones, in the order of the index.
        dense: the other tensors.

    Raises:
        SvskFormatError: the folder is not an SVSK checkpoint that this package can read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.hf_config: dict[str, Any] = read_json(self.folder / "config.json")
        self.config = parse_quantization_config(self.folder, self.hf_config)
        headers = ShardHeaders(self.folder)
        parts: dict[str, dict[str, StoredTensor]] = {}
        self.dense: dict[str, StoredTensor] = {}
        for name in headers.names:
            stored, split = StoredTensor(*headers.stored(name)), split_suffix(name)
            if split:
                parts.setdefault(split[0], {})[split[1]] = stored
            else:
                self.dense[name] = stored
        self.linears: dict[str, StoredLinear] = {}
        for module, tensors in parts.items():
            if WEIGHT_PACKED in tensors:
                packed = tensors[WEIGHT_PACKED].shape
                shape = shape_and_scheme(self.config, module, packed)
                self.linears[module] = StoredLinear(*shape, tensors)


def parse_quantization_config(folder: Path, hf_config: dict[str, Any]) -> SvskCheckpointConfig:
    """The checked ``quantization_config`` of a loaded config.json.

    Raises:
        SvskFormatError: it is missing, belongs to another method, or is invalid.
    """
    source = f"{folder / 'config.json'}: quantization_config"
    raw = hf_config.get("quantization_config")
    if not isinstance(raw, dict):
        raise SvskFormatError(
            f"{source}: missing. This is not a quantised checkpoint; run `svsk quantize` first."
        )
    if raw.get("quant_method") != "svsk":
        raise SvskFormatError(
            f"{source}: quant_method {raw.get('quant_method')!r}, expected 'svsk'."
        )
    return SvskCheckpointConfig.from_dict(raw, source)


def shape_and_scheme(
    config: SvskCheckpointConfig, module: str, packed: Sequence[int]
) -> tuple[int, int, ConfigGroup]:
    """Rows, columns and scheme of a stored linear.

    Args:
        config: of its checkpoint.
        module: its name.
        packed: shape of its ``weight_packed``.

    Raises:
        SvskFormatError: it has no scheme in the config, or a shape that no scheme can have.
    """
    if len(packed) != 2 or 0 in packed:
        raise SvskFormatError(
            f"{module}.weight_packed: shape {list(packed)}, expected a matrix of one row or more."
        )
    scheme = config.scheme_for(module)
    if scheme is None:
        why = "is on the ignore list" if config.is_ignored(module) else "matches no config group"
        raise SvskFormatError(
            f"{module}: stored quantised, but {why} in config.json. Correct the config."
        )
    n, k = scheme.weights.shape_of(packed)
    group = scheme.weights.group_size
    if k % group:
        raise SvskFormatError(
            f"{module}.weight_packed: shape {list(packed)} holds K = {k} input features, not a"
            f" multiple of the group size {group} that config.json gives it. Correct the config,"
            " or quantise the model again."
        )
    return n, k, scheme
