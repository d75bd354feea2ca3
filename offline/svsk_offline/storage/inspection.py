# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, and whether it is whole. Torch is imported for the second only."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from svsk_offline.console_tables import new_table, show_table
from svsk_vllm.format.contents import Contents
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import read_json

__all__ = [
    "inspect_checkpoint",
    "print_inspection",
    "serving_note",
    "smoothing_lines",
    "validate_against_architecture",
    "whole_bits_per_weight",
]

_IN_BLOCK: Final = re.compile(r"\.\d+\.")
"""Finds the number of a decoder block in the name of a linear: embeddings and heads have none."""


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Sizes and schemes of a checkpoint, JSON-ready.

    ``bits_per_weight`` is that of the quantised linears of the decoder blocks,
    ``bits_per_weight_of_all`` that of the whole file, embedding and head among them. Linears with
    the same kind (last part of the name), shape and scheme are one group.

    Raises:
        SvskFormatError: not a readable SVSK checkpoint.
    """
    contents = Contents(folder)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, linear in contents.linears.items():
        kind = name.rpartition(".")[2]
        side, weights = linear.scheme.sidecar, linear.scheme.weights
        scheme = linear.scheme.model_dump_json(include={"weights", "sidecar"})
        row = groups.setdefault(
            (kind, linear.n, linear.k, scheme),
            {
                "kind": kind,
                "count": 0,
                "shape": [linear.n, linear.k],
                "codebook": weights.codebook,
                "group_size": weights.group_size,
                "scale_bits": weights.scale_bits,
                "hot_rows": weights.hot_rows,
                "rank": side.rank,
                "tile": [side.tile_m, side.tile_n],
                "factor_bits": side.num_bits,
                "bits_per_weight": linear.stored_bits / linear.num_weights,
                "bits": dict.fromkeys(linear.tensors, 0),
            },
        )
        row["count"] += 1
        for suffix, tensor in linear.tensors.items():
            row["bits"][suffix] = row["bits"].get(suffix, 0) + tensor.num_bits
    in_blocks = [linear for name, linear in contents.linears.items() if _IN_BLOCK.search(name)]
    block_weights = sum(linear.num_weights for linear in in_blocks)
    return {
        "folder": str(folder),
        "version": contents.config.version,
        "groups": list(groups.values()),
        "linears": len(contents.linears),
        "quantized_weights": sum(linear.num_weights for linear in contents.linears.values()),
        "bits_per_weight": (
            sum(linear.stored_bits for linear in in_blocks) / block_weights
            if block_weights
            else None
        ),
        "bits_per_weight_of_all": _whole_bits_per_weight(contents),
        "dense_tensors": len(contents.dense),
        "dense_bytes": sum(tensor.num_bits for tensor in contents.dense.values()) // 8,
        "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "ignore": list(contents.config.ignore),
        "activations": contents.config.activations,
        "producer": contents.config.producer,
    }


def whole_bits_per_weight(folder: Path) -> float:
    """Stored bits of all tensors of a checkpoint over all weights, those left dense among them.

    Tensors that are tied are stored, and counted, once.
    """
    return _whole_bits_per_weight(Contents(folder))


def _whole_bits_per_weight(contents: Contents) -> float:
    linears, dense = contents.linears.values(), contents.dense.values()
    weights = sum(one.num_weights for one in linears) + sum(one.num_values for one in dense)
    bits = sum(one.stored_bits for one in linears) + sum(one.num_bits for one in dense)
    return bits / weights


def print_inspection(console: Console, inspection: dict[str, Any]) -> None:
    """Show the result of :func:`inspect_checkpoint` as a table."""
    headings = ("layers", "count", "N x K", "base", "sidecar", "bits per weight", "MB")
    table = new_table(*headings, numbers=(1, 5, 6))
    for row in inspection["groups"]:
        tile_m, tile_n = (size or "all" for size in row["tile"])
        sidecar = f"rank {row['rank']}, {row['factor_bits']} bit" if row["rank"] else "none"
        if row["rank"] and any(row["tile"]):
            sidecar += f", {tile_m} x {tile_n}"
        table.add_row(
            escape(row["kind"]),
            str(row["count"]),
            f"{row['shape'][0]} x {row['shape'][1]}",
            f"{row['codebook']} g{row['group_size']} s{row['scale_bits']}"
            + (f", {row['hot_rows']} rows int8" if row["hot_rows"] else ""),
            sidecar,
            f"{row['bits_per_weight']:.4f}",
            f"{sum(row['bits'].values()) / 8e6:.2f}",
        )
    show_table(console, table)
    producer = inspection["producer"]
    bpw = inspection["bits_per_weight"]
    for line in (
        (
            f"format {inspection['version']}, {inspection['linears']} quantised linears,"
            f" {inspection['quantized_weights']:,} weights"
        ),
        "bits per weight "
        + ("none" if bpw is None else f"{bpw:.4f}")
        + " (every stored bit of the quantised linears of the blocks),"
        + f" {inspection['bits_per_weight_of_all']:.4f} of all weights in the file",
        (
            f"on disk {inspection['bytes_on_disk'] / 1e6:.1f} MB, of"
            f" which {inspection['dense_bytes'] / 1e6:.1f} MB in"
            f" {inspection['dense_tensors']} tensors kept as they were"
        ),
        (
            f"recipe {producer.get('recipe', 'unknown')}"
            f" ({str(producer.get('recipe_hash', 'unknown'))[:12]}), written by svsk"
            f" {producer.get('svsk', 'unknown')}"
        ),
        *(["activations: 8 bits recommended"] if inspection["activations"] == "int8" else []),
        _calibration_line(producer.get("calibration")),
        *smoothing_lines(producer.get("smoothing")),
    ):
        # What the folder says of itself: no markup, nothing that a terminal obeys.
        console.print("".join(c if c.isprintable() else "?" for c in line), markup=False)


def _calibration_line(record: Any) -> str:
    """What ``producer.calibration`` says of the text; anybody may have written it."""
    if not isinstance(record, dict):
        return f"calibration {record or 'unknown'}"
    line = (
        f"calibration {record.get('source', 'unknown')}, {record.get('samples', '?')} samples of"
        f" {record.get('seq_len', '?')} tokens"
    )
    held_out = record.get("held_out")
    return f"{line}, {held_out} of them held out" if held_out else line


def smoothing_lines(record: Any) -> list[str]:
    """What ``producer.smoothing`` says, if anything: in a line, and a line for what is left."""
    if not isinstance(record, dict):
        return []
    kinds = {"norms": "outputs of norms", "o": "inputs of o_proj", "down": "inputs of down_proj"}
    folded = record.get("folded")
    counts = [
        f"{count} {kinds.get(kind, f'layers of {kind}')}"
        for kind, count in (folded.items() if isinstance(folded, dict) else ())
    ]
    rule = "".join(f"{key} {record[key]}, " for key in ("alpha", "above") if key in record)
    left = record.get("left_alone")
    return [
        f"smoothing {rule}folded into the weights: {', '.join(counts) or 'nothing'}",
        *(
            f"smoothing left alone: {count} x {what}"
            for what, count in (left.items() if isinstance(left, dict) else ())
        ),
    ]


def serving_note(folder: Path) -> str | None:
    """What to know before serving a checkpoint with vLLM, if anything; no fault of it."""
    from svsk_vllm.format.architectures import vllm_class

    return vllm_class(read_json(folder / "config.json")).note()


def validate_against_architecture(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """What is wrong with a checkpoint, one line each, as its loaders see it.

    Args:
        folder: the checkpoint.
        trust_remote_code: run Python files of the folder, where its model class is in them.
        note: told in a sentence what could not be checked.
    """
    from svsk_offline.storage.model_loading import needs_own_code
    from svsk_vllm.architecture.folder_check import checkpoint_problems
    from svsk_vllm.format.validate import validate_checkpoint

    if not trust_remote_code:
        try:
            unknown = needs_own_code(read_json(folder / "config.json"))
        except SvskFormatError:
            unknown = False  # listed as a problem below
        if unknown:
            note(
                f"{folder}: its model class is among Python files of its own,"
                " which are run only with --trust-remote-code. Read them"
                " first. Its tensors were not compared with that class."
            )
            return validate_checkpoint(folder)
    return checkpoint_problems(folder, trust_remote_code=trust_remote_code)
