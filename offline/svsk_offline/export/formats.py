# SPDX-License-Identifier: Apache-2.0
"""What ``svsk export`` writes, who reads it, and what is lost in each format."""

from dataclasses import dataclass
from typing import Final

from svsk_offline.choices import choose

__all__ = ["FORMATS", "ExportFormat", "export_format"]


@dataclass(frozen=True)
class ExportFormat:
    """One row of the table in docs/what-runs-where.md.

    Attributes:
        name: value of ``--to``.
        read_by: programs that read it without this project.
        base: what becomes of the base.
        sidecar: what becomes of the sidecar.
        tables: what becomes of a quantised embedding or output head.
        refused: checkpoints that it cannot hold.
    """

    name: str
    read_by: str
    base: str
    sidecar: str
    tables: str
    refused: str

    @property
    def losses(self) -> str:
        """What the command says of a written export."""
        return f"base {self.base}; sidecar {self.sidecar}; embedding and head {self.tables}"


FORMATS: Final = {
    kind.name: kind
    for kind in (
        ExportFormat(
            "dense",
            "everything that reads the original model",
            "rounded together with the sidecar, once, to the model's dtype",
            "kept, in the weights",
            "as the other weights",
            "none",
        ),
        ExportFormat(
            "compressed-tensors",
            "vLLM without the plugin, transformers",
            "exact, as W4A16",
            "lost",
            "dense, rounded to the model's dtype",
            "`quad8` linears, groups of 16, experts",
        ),
        ExportFormat(
            "gguf",
            "llama.cpp",
            "exact: `int4` as Q4_0 (4.5 bits per weight), `quad8` as Q8_0 (8.5)",
            "with `--lora` an adapter in float16, else lost",
            "exact in Q8_0 or Q4_0; a sidecar of an embedding is lost",
            "groups of 16, scales that float16 does not hold, experts",
        ),
    )
}
"""By the value of ``--to``."""


def export_format(name: str) -> ExportFormat:
    """The format that ``--to`` names.

    Raises:
        SvskError: there is none of that name.
    """
    choose("--to", name, FORMATS)
    return FORMATS[name]
