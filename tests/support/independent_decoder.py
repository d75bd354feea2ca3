# SPDX-License-Identifier: Apache-2.0
"""A second decoder, written from docs/format.md alone with numpy and the bytes of the files.

It shares no code with svsk_vllm.format, so that a mistake there, or in the page, shows as a
difference.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I8": "i1", "U8": "u1"}
WEIGHT_DEFAULTS = {
    "num_bits": 4,
    "group_size": 64,
    "codebook": "int4",
    "scale_bits": 16,
    "hot_rows": 0,
}
SIDECAR_DEFAULTS = {"rank": 0, "tile_m": 512, "tile_n": 1024, "num_bits": 8}
QUAD8 = [
    -16,
    -13.125,
    -10.5,
    -8.125,
    -6,
    -4.125,
    -2.5,
    -1.125,
    0,
    1.125,
    2.5,
    4.125,
    6,
    8.125,
    10.5,
    13.125,
]
LEVELS = {
    "int4": np.arange(-8.0, 8.0),
    "quad8": np.array(QUAD8),
    "int8": np.arange(-128.0, 128.0),
}


def read_safetensors(path: Path) -> dict[str, Array]:
    """Header length (u64), JSON header, data. bfloat16 is the upper half of a float32."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array
    return arrays


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return config, read_safetensors(folder / "model.safetensors")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {shard: read_safetensors(folder / shard) for shard in set(weight_map.values())}
    return config, {name: shards[shard][name] for name, shard in weight_map.items()}


def match(name: str, entries: list[str], *, table: bool = False) -> int | None:
    """Section 3: 0 for a name, 1 for a pattern, 2 for the class, the best of them."""
    kinds = [0 for entry in entries if entry == name]
    kinds += [1 for entry in entries if entry.startswith("re:") and re.match(entry[3:], name)]
    kinds += [2 for entry in entries if entry == "Linear" and not table]
    return min(kinds, default=None)


def scheme_of(config: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert match(name, config.get("ignore", [])) is None
    table = config.get("embedding", {}).get("module") == name
    matches = [
        (kind, g)
        for g in config["config_groups"].values()
        if (kind := match(name, g["targets"], table=table)) is not None
    ]
    best = min(kind for kind, _ in matches)
    (group,) = [group for kind, group in matches if kind == best]
    return WEIGHT_DEFAULTS | group.get("weights", {}), SIDECAR_DEFAULTS | group.get("sidecar", {})


def nibbles(stored: Array, per_element: int) -> Array:
    """Section 5.

    Nibble j of an element is entry ``per_element * index + j`` along the last axis, minus 8.
    """
    unsigned = stored.astype(np.int64) & 0xFFFFFFFF
    parts = np.stack([unsigned >> 4 * j & 15 for j in range(per_element)], axis=-1)
    codes: Array = parts.reshape(*stored.shape[:-1], -1) - 8
    return codes


def signed_bytes(stored: Array) -> Array:
    """Section 5: the four bytes of a word, lowest first, minus 128."""
    codes: Array = np.ascontiguousarray(stored).astype("<i4").view(np.uint8).astype(np.int64) - 128
    return codes


def scales(weights: dict[str, Any], tensors: dict[str, Array], name: str, groups: int) -> Array:
    """Section 5: scales of groups, from codes and a row's scale where there are two levels."""
    stored = tensors[f"{name}.weight_scale"]
    if weights["scale_bits"] == 6:
        bits = np.unpackbits(stored, axis=1, bitorder="little").reshape(len(stored), -1, 6)
        stored = (bits @ (1 << np.arange(6)))[:, :groups] - 32
    if weights["scale_bits"] == 16:
        return stored.astype(np.float64)
    product: Array = stored * tensors[f"{name}.weight_row_scale"].astype(np.float64)
    return product


def with_hot_rows(
    weights: dict[str, Any], tensors: dict[str, Array], name: str, others: Array
) -> Array:
    """Section 5: row after row, each the next hot one or the next of the others."""
    numbers, words, scale = (
        tensors[f"{name}.weight_hot_{part}"] for part in ("rows", "packed", "scale")
    )
    g, codes = weights["group_size"], signed_bytes(words)
    hot = scale.astype(np.float64)[:, np.arange(codes.shape[1]) // g] * codes
    rest, waiting = list(others), dict(zip(numbers.tolist(), hot, strict=True))
    total = len(others) + len(numbers)
    return np.stack([waiting[n] if n in waiting else rest.pop(0) for n in range(total)])


def decode(config: dict[str, Any], tensors: dict[str, Array], name: str) -> Array:
    """Sections 6 and 7, in float64."""
    weights, sidecar = scheme_of(config, name)
    words = tensors[f"{name}.weight_packed"]
    q = nibbles(words, 8) if weights["num_bits"] == 4 else signed_bytes(words)
    n, k = np.indices(q.shape)
    q_min = -(2 ** (weights["num_bits"] - 1))
    scale = scales(weights, tensors, name, q.shape[1] // weights["group_size"])
    weight: Array = scale[n, k // weights["group_size"]] * LEVELS[weights["codebook"]][q - q_min]
    if weights["hot_rows"]:
        return with_hot_rows(weights, tensors, name, weight)
    if sidecar["rank"] == 0:
        return weight
    u, v, gain = (tensors[f"{name}.sidecar_{part}"] for part in ("u", "v", "gain"))
    if sidecar["num_bits"] == 4:
        u, v = nibbles(u, 2), nibbles(v, 2)
    a, b = n // (sidecar["tile_m"] or q.shape[0]), k // (sidecar["tile_n"] or q.shape[1])
    for i in range(sidecar["rank"]):
        weight += gain[a, b, i].astype(np.float64) * u[n, b, i] * v[a, i, k]
    return weight
