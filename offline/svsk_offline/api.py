# SPDX-License-Identifier: Apache-2.0
"""What Python programs and notebooks use: typed, and shown as tables in a notebook."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svsk_offline.printable import html_table
from svsk_offline.storage.inspection import inspect_checkpoint
from svsk_offline.storage.layer_report import stored_errors

__all__ = ["Inspection", "Matrices", "inspect"]


@dataclass(frozen=True)
class Matrices:
    """Quantised matrices of one kind, shape and scheme.

    Attributes:
        kind: last part of their names.
        count: how many.
        shape: N outputs, K inputs.
        codebook: of the base.
        group_size: weights per scale.
        scale_bits: bits of a scale.
        rank: of the sidecar per tile, 0 for none.
        factor_bits: bits of a sidecar factor.
        bits_per_weight: every stored bit counted.
    """

    kind: str
    count: int
    shape: tuple[int, int]
    codebook: str
    group_size: int
    scale_bits: int
    rank: int
    factor_bits: int
    bits_per_weight: float


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        folder: of the checkpoint.
        version: of the format.
        matrices: the quantised ones.
        bits_per_weight: of the quantised linears of the blocks; None where no block has one.
        bits_per_weight_of_all: of all weights in the file.
        bytes_on_disk: of the folder.
        errors: of each matrix's outputs, as the run measured it; empty where the folder keeps none.
        producer: what config.json says of recipe and calibration.
    """

    folder: Path
    version: str
    matrices: tuple[Matrices, ...]
    bits_per_weight: float | None
    bits_per_weight_of_all: float
    bytes_on_disk: int
    errors: dict[str, float]
    producer: dict[str, Any]

    def _repr_html_(self) -> str:
        rows = [
            (
                one.kind,
                one.count,
                f"{one.shape[0]} x {one.shape[1]}",
                f"{one.codebook}, groups of {one.group_size}, {one.scale_bits}-bit scales",
                f"rank {one.rank}, {one.factor_bits} bits" if one.rank else "none",
                f"{one.bits_per_weight:.4f}",
            )
            for one in self.matrices
        ]
        bits = "none" if self.bits_per_weight is None else f"{self.bits_per_weight:.4f}"
        note = (
            f"{self.folder}: {bits} bits per weight in the blocks,"
            f" {self.bits_per_weight_of_all:.4f} over all, {self.bytes_on_disk / 1e6:,.1f} MB"
        )
        return html_table(
            ("kind", "count", "N x K", "base", "sidecar", "bits per weight"), rows, note
        )


def inspect(folder: str | Path) -> Inspection:
    """What an SVSK checkpoint holds, from its config and the headers of its files.

    Raises:
        SvskFormatError: not a readable SVSK checkpoint.
    """
    path = Path(folder)
    found = inspect_checkpoint(path)
    return Inspection(
        folder=path,
        version=found["version"],
        matrices=tuple(
            Matrices(
                kind=row["kind"],
                count=row["count"],
                shape=(row["shape"][0], row["shape"][1]),
                codebook=row["codebook"],
                group_size=row["group_size"],
                scale_bits=row["scale_bits"],
                rank=row["rank"],
                factor_bits=row["factor_bits"],
                bits_per_weight=row["bits_per_weight"],
            )
            for row in found["groups"]
        ),
        bits_per_weight=found["bits_per_weight"],
        bits_per_weight_of_all=found["bits_per_weight_of_all"],
        bytes_on_disk=found["bytes_on_disk"],
        errors={name: row["error"] for name, row in stored_errors(path).items()},
        producer=found["producer"],
    )
