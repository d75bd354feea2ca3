# SPDX-License-Identifier: Apache-2.0
"""Powers of two by which rows and columns of a model's tensors are multiplied when they are read.

What the writer of a channel is divided by, its readers are multiplied by, so the model computes the
same function. A whole power of two changes exponents alone: products and sums are the same numbers,
and the logits the same bits, as long as nothing overflows or becomes subnormal. Where a channel's
size matters more than that, exponents are multiples of an eighth: the function is then the same up
to rounding.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.storage.atomic import write_tensors
from svsk_vllm.format import ShardedReader

__all__ = ["LARGEST_EXPONENT", "Fold", "powers_of_two", "to_steps"]

LARGEST_EXPONENT: Final = 16
"""Of a factor: 65,536 either way. Channels further apart than that hold nothing but noise, and two
factors that meet in one weight stay far from the ends of bfloat16's range."""

_POWERS: Final = tuple(math.ldexp(1.0, exponent) for exponent in range(-128, 128))
"""By exponent + 128. exp2 of a whole number need not be exact in every vector library."""


_STEPS: Final = 8
"""Steps of an exponent that is no whole number, per octave: factors within 4.4% of any wanted."""

_ROOTS: Final = tuple(2 ** (step / _STEPS) for step in range(_STEPS))


def to_steps(exponents: torch.Tensor) -> torch.Tensor:
    """The nearest exponents that are multiples of an eighth, float32."""
    return (exponents.float() * _STEPS).round() / _STEPS


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """``2 ** e``, float32 of the shape of ``exponents``.

    Args:
        exponents: in -126 to 127; integers, whose powers are exact, or floats, multiples of an
            eighth.
    """
    table = torch.tensor(_POWERS, dtype=torch.float32, device=exponents.device)
    whole = exponents.floor() if exponents.is_floating_point() else exponents
    powers = table[whole.long() + 128]
    if exponents.is_floating_point():
        roots = torch.tensor(_ROOTS, dtype=torch.float32, device=exponents.device)
        powers = powers * roots[((exponents - whole) * _STEPS).long()]
    return powers


@dataclass(frozen=True)
class Fold:
    """By what stored tensors are multiplied when they are read.

    Attributes:
        rows: [N] per tensor [N, ...]: exponents of two of its rows (of the entries of a vector),
            int8, or float32 where they are multiples of an eighth.
        columns: likewise [K] per tensor [N, K], of its columns.
    """

    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.columns

    def scale(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is read.

        Args:
            name: in the folder.
            tensor: its stored values, of float dtype [N] or [N, K].

        Returns:
            The product, a new tensor in :meth:`dtype` of the stored one.

        Raises:
            SvskError: a finite value became infinite.
        """
        if name not in self:
            return tensor
        scaled = tensor.to(self.dtype(name, tensor.dtype), copy=True)
        if name in self.rows:
            factors = powers_of_two(self.rows[name]).to(scaled)
            scaled *= factors.reshape(-1, *[1] * (tensor.ndim - 1))
        if name in self.columns:
            scaled *= powers_of_two(self.columns[name]).to(scaled)
        if not bool(torch.isfinite(scaled).all()) and bool(torch.isfinite(tensor).all()):
            raise SvskError(
                f"{name}: smoothing makes a value larger than {scaled.dtype} holds. Quantise"
                " without smoothing."
            )
        return scaled

    def dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Dtype of a tensor when it is scaled.

        The stored one, but float32 for float16, whose small values would lose bits, and where a
        factor is no whole power of two: what is quantised then is not rounded twice.
        """
        given = (part[name] for part in (self.rows, self.columns) if name in part)
        fine = any(exponents.is_floating_point() for exponents in given)
        return torch.float32 if fine or stored == torch.float16 else stored

    @property
    def digest(self) -> str:
        """SHA-256 of all exponents."""
        digest = hashlib.sha256()
        for axis, exponents in (("rows", self.rows), ("columns", self.columns)):
            for name in sorted(exponents):
                values = exponents[name].cpu().numpy().tobytes()
                digest.update(f"{axis} {name} {len(values)} ".encode() + values)
        return digest.hexdigest()

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write it to a safetensors file, atomically."""
        tensors = {f"{name}:rows": exponents for name, exponents in self.rows.items()}
        tensors |= {f"{name}:columns": exponents for name, exponents in self.columns.items()}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> tuple["Fold", dict[str, str]]:
        """What :meth:`save` wrote, and its metadata.

        Raises:
            SvskFormatError: the file is damaged.
        """
        reader = ShardedReader(path.parent, shards=[path.name])
        parts: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "columns": {}}
        for key in reader.names:
            name, _, axis = key.rpartition(":")
            parts[axis][name] = reader.read(key)
        return cls(parts["rows"], parts["columns"]), reader.metadata(path.name)
