# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's headers, config and kept measurements say of each matrix. Without torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from svsk_offline.storage.inspection import inspect_checkpoint
from svsk_offline.storage.layer_report import REPORT_NAME, stored_errors
from svsk_vllm.format.contents import Contents, StoredLinear
from svsk_vllm.format.experts import ExpertName
from svsk_vllm.format.suffixes import SCALE_SUFFIXES, SIDECAR_GAIN, SIDECAR_U, SIDECAR_V

__all__ = ["CheckpointContents", "DenseTable", "Matrix", "Place", "nested", "read_checkpoint"]

_BLOCK: Final = re.compile(r"\.(\d{1,9})\.")
_SIDECAR: Final = frozenset({SIDECAR_U, SIDECAR_V, SIDECAR_GAIN})


@dataclass(frozen=True)
class Matrix:
    """A quantised linear, embedding or output head.

    Attributes:
        name: in the folder.
        block: number of its decoder block; None outside them.
        kind: its name below the block, the number of an expert replaced by ``*``.
        shape: outputs N, inputs K.
        code_bits: stored bits of the base's codes.
        scale_bits: stored bits of its scales, and of the list of rows that have 8 bits.
        sidecar_bits: stored bits of the sidecar.
        codebook: of the base.
        group_size: weights per scale.
        rank: of the sidecar per tile, 0 without one.
        base_error: of the outputs without the sidecar, ``E|dW x|^2 / E|W x|^2``, as the run
            measured it; None where it is not kept, as are the next two.
        error: the same with the sidecar.
        held_out_tokens: tokens that both were measured on; 0 where those are the fitted ones.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    code_bits: int
    scale_bits: int
    sidecar_bits: int
    codebook: str
    group_size: int
    rank: int
    base_error: float | None = None
    error: float | None = None
    held_out_tokens: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def stored_bits(self) -> int:
        """Every stored bit, bias excluded."""
        return self.code_bits + self.scale_bits + self.sidecar_bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.weights

    @property
    def removed(self) -> float | None:
        """Share of the base's error that the sidecar takes away; None without either."""
        if self.rank == 0 or self.error is None or not self.base_error:
            return None
        return 1 - self.error / self.base_error

    def to_json(self) -> dict[str, Any]:
        """The attributes, and bits per weight."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight, "removed": self.removed}


@dataclass(frozen=True)
class Place:
    """Matrices of one kind in one block: one, or all experts.

    Attributes:
        block: number of the block.
        kind: of the matrices.
        matrices: in the order of the checkpoint.
    """

    block: int
    kind: str
    matrices: tuple[Matrix, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        weights = sum(one.weights for one in self.matrices)
        return sum(one.stored_bits for one in self.matrices) / weights

    @property
    def base_error(self) -> float | None:
        """Mean over those with one."""
        return _mean([one.base_error for one in self.matrices])

    @property
    def error(self) -> float | None:
        """Mean over those with one."""
        return _mean([one.error for one in self.matrices])


@dataclass(frozen=True)
class DenseTable:
    """A matrix with a row per token, stored as it was."""

    name: str
    shape: tuple[int, int]
    num_bytes: int


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint without its values.

    Attributes:
        folder: where it is.
        inspection: what :func:`svsk_offline.storage.inspection.inspect_checkpoint` says.
        hf_config: config.json.
        matrices: all that are quantised; in the order of the model where measurements are kept,
            else in that of the checkpoint.
        dense_tables: embedding and output head, where they are stored as they were.
        dense_bytes: of all that is stored as it was, those among them.
        other_files: bytes of the files that hold no tensors.
        measured: whether the folder keeps what its run measured of the matrices.
    """

    folder: Path
    inspection: Mapping[str, Any]
    hf_config: Mapping[str, Any]
    matrices: tuple[Matrix, ...]
    dense_tables: tuple[DenseTable, ...]
    dense_bytes: int
    other_files: int
    measured: bool

    @property
    def in_blocks(self) -> list[Matrix]:
        """The matrices of decoder blocks."""
        return [one for one in self.matrices if one.block is not None]

    @property
    def tables(self) -> list[Matrix]:
        """Embedding and output head, where they are quantised."""
        return [one for one in self.matrices if one.block is None]

    @property
    def head(self) -> list[Matrix]:
        """The output head, if it is quantised; the one table where it is the embedding too."""
        embedding = nested(self.hf_config, "quantization_config", "embedding", "module", kind=str)
        return [one for one in self.tables if one.name != embedding] or self.tables

    @cached_property
    def kinds(self) -> dict[str, list[Matrix]]:
        """The matrices of decoder blocks by kind, kinds in the order they are first seen."""
        found: dict[str, list[Matrix]] = {}
        for one in self.in_blocks:
            found.setdefault(one.kind, []).append(one)
        return found

    @cached_property
    def places(self) -> list[Place]:
        """The matrices of decoder blocks by block and kind."""
        found: dict[tuple[int, str], list[Matrix]] = {}
        for one in self.in_blocks:
            if one.block is not None:
                found.setdefault((one.block, one.kind), []).append(one)
        order = {kind: index for index, kind in enumerate(self.kinds)}
        return [
            Place(*key, tuple(found[key]))
            for key in sorted(found, key=lambda key: (key[0], order[key[1]]))
        ]

    @property
    def with_errors(self) -> list[Matrix]:
        """The matrices whose error the folder keeps."""
        return [one for one in self.matrices if one.error is not None]

    @property
    def producer(self) -> Mapping[str, Any]:
        """What config.json says of the run that made it; anybody may have written it."""
        return nested(self.inspection, "producer", kind=Mapping) or {}

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The values of the recipe, as config.json has them; empty where it has none."""
        return nested(self.producer, "recipe_values", kind=Mapping) or {}

    @property
    def target(self) -> float | None:
        """The bits per weight that the recipe was to spend; None without a budget."""
        value = nested(self.recipe, "allocation", "target_bpw", kind=float)
        return value if value and value > 0 else None

    @property
    def bits_per_weight(self) -> float | None:
        """Of what a budget counts: the blocks, and the output head where it says so."""
        counted = self.in_blocks
        if "head" in (nested(self.recipe, "allocation", "includes", kind=list) or ()):
            counted = [*counted, *self.head]
        weights = sum(one.weights for one in counted)
        return sum(one.stored_bits for one in counted) / weights if weights else None


def nested(values: Any, *keys: str, kind: type) -> Any:
    """What lies below keys of an unchecked mapping; None where it is of another type.

    Args:
        values: JSON that anybody may have written.
        keys: from the outside in.
        kind: expected; ``float`` takes whole numbers too.
    """
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    if kind is float and isinstance(values, int) and not isinstance(values, bool):
        return float(values)
    return values if isinstance(values, kind) else None


def read_checkpoint(folder: Path) -> CheckpointContents:
    """Read headers, config and kept measurements of a checkpoint; no tensor is read.

    Raises:
        SvskFormatError: it is no readable SVSK checkpoint, or the file of measurements is damaged.
    """
    contents = Contents(folder)
    errors = stored_errors(folder)
    names = [*(name for name in errors if name in contents.linears), *contents.linears]
    sizes = [(path.suffix, path.stat().st_size) for path in folder.iterdir() if path.is_file()]
    return CheckpointContents(
        folder=folder,
        inspection=inspect_checkpoint(folder),
        hf_config=contents.hf_config,
        matrices=tuple(
            _matrix(name, contents.linears[name], errors.get(name)) for name in dict.fromkeys(names)
        ),
        dense_tables=_dense_tables(contents),
        dense_bytes=sum(tensor.num_bits for tensor in contents.dense.values()) // 8,
        other_files=sum(size for suffix, size in sizes if suffix != ".safetensors"),
        measured=(folder / REPORT_NAME).exists(),
    )


def _matrix(name: str, linear: StoredLinear, kept: Mapping[str, float] | None) -> Matrix:
    bits = {suffix: tensor.num_bits for suffix, tensor in linear.tensors.items()}
    sidecar = sum(value for suffix, value in bits.items() if suffix in _SIDECAR)
    scales = sum(value for suffix, value in bits.items() if suffix in SCALE_SUFFIXES)
    found = _BLOCK.search(name)
    kind = name[found.end() :] if found else name
    if expert := ExpertName.of(name):
        kind = f"{expert.layer[found.end() :] if found else expert.layer}.*.{expert.projection}"
    return Matrix(
        name=name,
        block=int(found[1]) if found else None,
        kind=kind,
        shape=(linear.n, linear.k),
        code_bits=linear.stored_bits - scales - sidecar,
        scale_bits=scales,
        sidecar_bits=sidecar,
        codebook=linear.scheme.weights.codebook,
        group_size=linear.scheme.weights.group_size,
        rank=linear.scheme.sidecar.rank,
        **({} if kept is None else _kept(kept)),
    )


def _kept(kept: Mapping[str, float]) -> dict[str, Any]:
    return {
        "base_error": kept["base_error"],
        "error": kept["error"],
        "held_out_tokens": int(kept["held_out_tokens"]),
    }


def _dense_tables(contents: Contents) -> tuple[DenseTable, ...]:
    """Dense matrices with as many rows as there are tokens."""
    config = contents.hf_config
    rows = {
        nested(config, "vocab_size", kind=int),
        nested(config, "text_config", "vocab_size", kind=int),
    }
    return tuple(
        DenseTable(name, (tensor.shape[0], tensor.shape[1]), tensor.num_bits // 8)
        for name, tensor in contents.dense.items()
        if len(tensor.shape) == 2 and tensor.shape[0] in rows
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
