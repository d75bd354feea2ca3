# SPDX-License-Identifier: Apache-2.0
"""What two checkpoints differ in: config, bits, errors by their cards, tensors. Without torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console

from svsk_offline.console_tables import new_table, show_table
from svsk_offline.printable import printable
from svsk_offline.storage.inspection import inspect_checkpoint
from svsk_offline.storage.layer_report import stored_errors
from svsk_vllm.format.contents import Contents
from svsk_vllm.format.files import open_regular
from svsk_vllm.format.shard_headers import ShardHeaders

__all__ = ["compare_checkpoints", "print_comparison"]

_SHOWN: Final = 20
_CHUNK: Final = 1 << 24
_FIGURES: Final = ("bits_per_weight", "bits_per_weight_of_all", "bytes_on_disk", "linears")


def compare_checkpoints(first: Path, second: Path) -> dict[str, Any]:
    """What two SVSK checkpoints differ in, JSON-ready.

    ``config`` has the keys of config.json that differ, ``producer`` among them, with both values;
    ``schemes`` the linears that have another scheme or are in one only; ``tensors`` the names in
    one only, of another dtype or shape, and of other bytes; ``errors`` the matrices whose outputs'
    errors, as both runs measured them, differ. Every byte of both is read.

    Raises:
        SvskFormatError: one of them is no readable SVSK checkpoint.
    """
    ours, theirs = Contents(first), Contents(second)
    figures = [inspect_checkpoint(folder) for folder in (first, second)]
    schemes = {}
    for name in dict.fromkeys([*ours.linears, *theirs.linears]):
        pair = [_scheme(contents, name) for contents in (ours, theirs)]
        if pair[0] != pair[1]:
            schemes[name] = pair
    return {
        "folders": [str(first), str(second)],
        "figures": {key: [one[key] for one in figures] for key in _FIGURES},
        "config": _differences(ours.hf_config, theirs.hf_config),
        "schemes": schemes,
        "errors": _errors(first, second),
        "tensors": _tensors(first, second),
    }


def _errors(first: Path, second: Path) -> dict[str, list[float]]:
    """Errors of outputs that both runs measured, and that differ, by matrix."""
    ours, theirs = stored_errors(first), stored_errors(second)
    pairs = {name: [ours[name]["error"], theirs[name]["error"]] for name in ours if name in theirs}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _scheme(contents: Contents, name: str) -> dict[str, Any] | None:
    linear = contents.linears.get(name)
    if linear is None:
        return None
    scheme = linear.scheme.model_dump(mode="json", include={"weights", "sidecar"})
    return {"bits_per_weight": linear.stored_bits / linear.num_weights, **scheme}


def _differences(ours: Any, theirs: Any, path: str = "") -> dict[str, list[Any]]:
    """Both values by the path of each key that differs; None where one lacks it."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return {} if ours == theirs else {path: [ours, theirs]}
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys([*ours, *theirs]):
        below = f"{path}.{key}" if path else str(key)
        found |= _differences(ours.get(key), theirs.get(key), below)
    return found


def _tensors(first: Path, second: Path) -> dict[str, list[str]]:
    """Names of tensors that differ, by how."""
    readers = [ShardHeaders(folder, by_headers=True) for folder in (first, second)]
    places = [_Places(folder) for folder in (first, second)]
    names = [set(reader.names) for reader in readers]
    both = sorted(names[0] & names[1])
    shape = [name for name in both if readers[0].stored(name) != readers[1].stored(name)]
    same_form = [name for name in both if name not in {*shape}]
    values = [
        name
        for name in same_form
        if places[0].digest(readers[0].shard_of(name), name)
        != places[1].digest(readers[1].shard_of(name), name)
    ]
    return {
        "only_first": sorted(names[0] - names[1]),
        "only_second": sorted(names[1] - names[0]),
        "dtype_or_shape": shape,
        "values": values,
        "equal": sorted({*same_form} - {*values}),
    }


class _Places:
    """Where the bytes of tensors lie in a folder's files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[str, tuple[dict[str, Any], int]] = {}

    def digest(self, shard: str, name: str) -> bytes:
        """SHA-256 of the bytes of a tensor."""
        with open_regular(self._folder / shard) as handle:
            if shard not in self._headers:
                self._headers[shard] = _header(handle)
            header, start = self._headers[shard]
            begin, end = header[name]["data_offsets"]
            handle.seek(start + begin)
            digest, left = hashlib.sha256(), end - begin
            while left and (piece := handle.read(min(left, _CHUNK))):
                digest.update(piece)
                left -= len(piece)
        return digest.digest()


def _header(handle: IO[bytes]) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(handle.read(8), "little")
    return json.loads(handle.read(size)), 8 + size


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Show the result of :func:`compare_checkpoints`."""
    table = new_table("", *map(printable, comparison["folders"]), numbers=(1, 2))
    for key, pair in comparison["figures"].items():
        table.add_row(key.replace("_", " "), *map(_number, pair))
    show_table(console, table)
    for title, found in (("config.json", comparison["config"]), ("schemes", comparison["schemes"])):
        if not found:
            console.print(f"{title}: the same", markup=False)
            continue
        console.print(f"{title}: {len(found)} differ", markup=False)
        for name, (ours, theirs) in list(found.items())[:_SHOWN]:
            console.print(f"  {name}: {_value(ours)} | {_value(theirs)}", markup=False)
        if len(found) > _SHOWN:
            console.print(f"  and {len(found) - _SHOWN} more (--json has all)", markup=False)
    errors = comparison["errors"]
    if errors:
        ratios = {name: pair[1] / pair[0] for name, pair in errors.items() if all(pair)}
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else 1.0
        console.print(
            f"errors of outputs: {len(errors)} differ, the second's are {mean:.3f} times the"
            " first's in the geometric mean",
            markup=False,
        )
        for name in sorted(ratios, key=lambda key: -abs(math.log(ratios[key])))[:5]:
            ours, theirs = errors[name]
            console.print(f"  {name}: {ours:.2e} | {theirs:.2e}", markup=False)
    tensors = comparison["tensors"]
    words = {
        "only_first": "only in the first",
        "only_second": "only in the second",
        "dtype_or_shape": "of another dtype or shape",
        "values": "of other values",
    }
    console.print(f"tensors: {len(tensors['equal'])} are the same", markup=False)
    for key, what in words.items():
        if tensors[key]:
            more = ", ..." if len(tensors[key]) > 3 else ""
            named = ", ".join(tensors[key][:3]) + more
            console.print(f"  {len(tensors[key])} {what}: {named}", markup=False)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if value else str(value)


def _value(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
