# SPDX-License-Identifier: Apache-2.0
"""Damage to a checkpoint folder.

What downloads, disks, hands and enemies do to it, drawn by hypothesis.

A mutation is a kind and a few integers that choose the tensor, the file, the key and the value,
modulo what there is.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
VALUES = (
    float("nan"),
    float("inf"),
    float("-inf"),
    1e38,
    -1e38,
    3e38,
    1e30,
    7e4,
    -0.0,
    0.0,
    1e-45,
    2.0,
)
SHAPES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t.flatten(),
    lambda t: (
        t.mT if t.ndim > 1 and t.shape[-1] != t.shape[-2] else t.unsqueeze(0)
    ),  # a square one keeps its shape
    lambda t: t[:0],
    lambda t: t.unsqueeze(0),
    lambda t: torch.cat([t, t]),
    lambda t: t.reshape(-1)[0],
)
JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    32,
    48,
    64,
    128,
    10**6,
    10**9,
    10**12,
    10**30,
    -(10**12),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "svsk",
    "float16",
    "bfloat16",
    "int4",
    "quad8",
    "int8",
    8,
    "\x1b[2J",
    "\ud800",
    "a\0b",
    "re:(a+)+$",
    "re:[",
    "Linear",
    "../x.safetensors",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    ["Linear"],
    "1.0",
    "2.0",
    "x" * 10**5,
)


@dataclass(frozen=True)
class Mutation:
    """One kind of damage, and the integers that choose its place and its value."""

    kind: str
    a: int
    b: int
    c: int

    def apply(self, folder: Path, other: Path) -> None:
        """Damage ``folder``; ``other`` is a checkpoint of the same model from another run."""
        KINDS[self.kind](folder, other, self)

    @property
    def changes_values(self) -> bool:
        """Whether the folder may be whole and mean other numbers, as after somebody's own edit."""
        return self.kind in ("value", "swap names")


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _edit(folder: Path, mutation: Mutation, change: Callable[[Tensors, str], None]) -> None:
    """Alter the shard of one tensor, and leave the index as it should then be."""
    index = json.loads((folder / INDEX).read_text())
    name = sorted(index["weight_map"])[mutation.a % len(index["weight_map"])]
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    for tensor in [*tensors]:
        del index["weight_map"][tensor]
    change(tensors, name)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    index["metadata"]["total_size"] = 0
    (folder / INDEX).write_text(json.dumps(index))


def _remove(folder: Path, other: Path, m: Mutation) -> None:
    def change(tensors: Tensors, name: str) -> None:
        del tensors[name]

    _edit(folder, m, change)


def _rename(folder: Path, other: Path, m: Mutation) -> None:
    endings = ("x", ".weight", ".q_scale", "_orig", ".sidecar_u", "\x1b[1m")
    kept = (lambda name: name, lambda name: name.rpartition(".")[0] or name)
    to = (
        lambda name: kept[m.c % 2](name) + endings[m.b % len(endings)],
        lambda name: "model." + name,
    )[m.c // 2 % 2]
    _edit(folder, m, lambda tensors, name: tensors.update({to(name): tensors.pop(name)}))


def _retype(folder: Path, other: Path, m: Mutation) -> None:
    _edit(
        folder,
        m,
        lambda tensors, name: tensors.update({name: tensors[name].to(DTYPES[m.b % len(DTYPES)])}),
    )


def _reshape(folder: Path, other: Path, m: Mutation) -> None:
    _edit(
        folder,
        m,
        lambda tensors, name: tensors.update({name: SHAPES[m.b % len(SHAPES)](tensors[name])}),
    )


def _value(folder: Path, other: Path, m: Mutation) -> None:
    def change(tensors: Tensors, name: str) -> None:
        flat = tensors[name].clone().view(-1)
        value = VALUES[m.b % len(VALUES)]
        limits = None if flat.is_floating_point() else torch.iinfo(flat.dtype)
        flat[m.c % len(flat)] = value if limits is None else m.b % (limits.max + 1)
        tensors[name] = flat.view(tensors[name].shape)

    _edit(folder, m, change)


def _swap_names(folder: Path, other: Path, m: Mutation) -> None:
    def change(tensors: Tensors, name: str) -> None:
        second = sorted(tensors)[m.b % len(tensors)]
        tensors[name], tensors[second] = tensors[second], tensors[name]

    _edit(folder, m, change)


def _add(folder: Path, other: Path, m: Mutation) -> None:
    names = (
        "lm_head.weight_packed",
        "lm_head.weight",
        "model.layers.9.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "x",
    )
    extra = (torch.zeros(2), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(0, 3))[m.c % 3]
    _edit(folder, m, lambda tensors, name: tensors.update({names[m.b % len(names)]: extra}))


def _truncate(folder: Path, other: Path, m: Mutation) -> None:
    path = shards_of(folder)[m.a % len(shards_of(folder))]
    raw = path.read_bytes()
    path.write_bytes(raw[: m.b * m.c % len(raw)])


def _flip(folder: Path, other: Path, m: Mutation) -> None:
    """Another byte in the header of a shard, its length included."""
    path = shards_of(folder)[m.a % len(shards_of(folder))]
    raw = bytearray(path.read_bytes())
    raw[m.b % (8 + int.from_bytes(raw[:8], "little"))] = m.c % 256
    path.write_bytes(raw)


def _append(folder: Path, other: Path, m: Mutation) -> None:
    path = shards_of(folder)[m.a % len(shards_of(folder))]
    path.write_bytes(path.read_bytes() + bytes(m.b % 100 + 1))


def _delete(folder: Path, other: Path, m: Mutation) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    needed = [
        path
        for path in files
        if path.suffix == ".safetensors" or path.name in ("config.json", INDEX)
    ]
    needed[m.a % len(needed)].unlink()


def _swap_shards(folder: Path, other: Path, m: Mutation) -> None:
    shards = shards_of(folder)
    first, second = (
        shards[m.a % len(shards)],
        shards[(m.a + 1 + m.b % (len(shards) - 1)) % len(shards)],
    )
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)


def _foreign_shard(folder: Path, other: Path, m: Mutation) -> None:
    shards = shards_of(folder)
    shutil.copyfile(other / shards[m.a % len(shards)].name, shards[m.a % len(shards)])


def _stray_shard(folder: Path, other: Path, m: Mutation) -> None:
    names = ("model.safetensors", "old.safetensors", "model-00009-of-00009.safetensors")
    shutil.copyfile(shards_of(other)[m.a % len(shards_of(other))], folder / names[m.b % len(names)])


def _no_file(folder: Path, other: Path, m: Mutation) -> None:
    """Something else in place of a file."""
    places = [folder / "config.json", folder / INDEX, *shards_of(folder)]
    path = places[m.a % len(places)]
    path.unlink()
    (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/proc/self/mem"),
    )[m.b % 6]()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be altered."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = [] if path == () else [path]
    return found + [deeper for key, child in items for deeper in _paths(child, (*path, key))]


def _edit_json(file: Path, m: Mutation) -> None:
    value = json.loads(file.read_text())
    paths = _paths(value)
    *parents, key = paths[m.a % len(paths)]
    owner = value
    for parent in parents:
        owner = owner[parent]
    change = m.c % 4
    if change == 0:
        del owner[key]
    elif change == 1 and isinstance(owner, dict):
        owner[JSON_KEYS[m.b % len(JSON_KEYS)]] = owner.pop(key)
    elif change == 2 and isinstance(owner[key], int):
        owner[key] = owner[key] * (2, -1, 10**9, 0)[m.b % 4]
    else:
        owner[key] = JSON_VALUES[m.b % len(JSON_VALUES)]
    file.write_text(json.dumps(value))


JSON_KEYS = ("self", "x", "quant_method", "config", "num_hidden_layers", "auto_map", "\ud800", "")


def _config(folder: Path, other: Path, m: Mutation) -> None:
    _edit_json(folder / "config.json", m)


def _quantization(folder: Path, other: Path, m: Mutation) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    alone = folder / "quantization.json"
    alone.write_text(json.dumps(config["quantization_config"]))
    _edit_json(alone, m)
    path.write_text(json.dumps({**config, "quantization_config": json.loads(alone.read_text())}))
    alone.unlink()


def _index(folder: Path, other: Path, m: Mutation) -> None:
    _edit_json(folder / INDEX, m)


def _raw_json(folder: Path, other: Path, m: Mutation) -> None:
    path = (folder / "config.json", folder / INDEX)[m.a % 2]
    text = path.read_text()
    # Stock libraries read all of config.json before they ask a quantiser anything.
    lists = 7 * 10**6 if path.name == INDEX else 10**4
    path.write_bytes(
        (
            b"",
            b"null",
            b"[]",
            text.encode()[:-2],
            b'{"a":' * 5000 + b"1" + b"}" * 5000,
            b"[" * 10**6,
            text.encode("utf-16"),
            b"\xff" + text.encode(),
            text.replace("{", '{"n": ' + "9" * 5000 + ", ", 1).encode(),
            b'{"a": [' + b"[]," * lists + b"0]}",
            text.replace("{", '{"a": ' + "[" * 900 + "]" * 900 + ", ", 1).encode(),
        )[m.b % 11]
    )


KINDS: dict[str, Callable[[Path, Path, Mutation], None]] = {
    "remove": _remove,
    "rename": _rename,
    "retype": _retype,
    "reshape": _reshape,
    "value": _value,
    "swap names": _swap_names,
    "add": _add,
    "truncate": _truncate,
    "header byte": _flip,
    "append": _append,
    "delete file": _delete,
    "swap shards": _swap_shards,
    "foreign shard": _foreign_shard,
    "stray shard": _stray_shard,
    "no file": _no_file,
    "config key": _config,
    "quantization key": _quantization,
    "index key": _index,
    "raw JSON": _raw_json,
}

number = st.integers(0, 10**6)
mutations = st.builds(Mutation, st.sampled_from(sorted(KINDS)), number, number, number)
