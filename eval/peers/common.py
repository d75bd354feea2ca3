# SPDX-License-Identifier: Apache-2.0
"""What the scripts in the peers' own environments share.

The job they are given and the result they hand back.

Imports only the standard library, torch and safetensors, which every peer's environment has.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = [
    "TABLES",
    "Job",
    "PeerError",
    "Result",
    "StoredLinear",
    "all_bits",
    "block_linears",
    "end_with_parent",
    "load_folder",
    "load_tokens",
    "run_job",
    "save_tokens",
    "stored_bits",
    "unpack_nibbles",
    "versions",
]

RESULT = "result.json"
ENDS_WITH_PARENT = "SVSK_PEER_ENDS_WITH_PARENT"
WEIGHTS = "weights.safetensors"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Embedding and output head; a tied one is stored under the first name."""
_LINEAR = re.compile(r"^model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$")


class PeerError(ValueError):
    """A peer cannot be run as asked, or gave something unexpected.

    The message says what, where and what to do.
    """


@dataclass(frozen=True)
class Job:
    """One quantisation, as run.py asks for it."""

    peer: str
    model: str  # folder of the reference
    tokens: str  # safetensors file, see load_tokens
    work: str  # empty folder for the peer's own checkpoint and the result
    environment: str  # folder of the peer's environment
    group_size: int
    seed: int
    settings: dict[str, Any]  # of this peer
    measured: str | None = None  # file that keeps what the peer measured of model and tokens


@dataclass(frozen=True)
class StoredLinear:
    """How a checkpoint stores one linear."""

    type: str
    weights: int
    bits: int  # of codes, scales and zero points


@dataclass(frozen=True)
class Result:
    """What a peer's script hands back; ``tensors`` go to a file of their own."""

    # calibration, quantisation and saving the checkpoint; GGUF: without writing the dense GGUF
    seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]
    linears: dict[str, StoredLinear]  # name of the weight -> how it is stored
    file_bits: int  # of all tensors that the peer's checkpoint stores, tables and norms among them
    # float32; the linears, whatever else must follow them, and tables that the peer quantised
    tensors: dict[str, torch.Tensor] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    # of TABLES, those that the peer stores otherwise than the reference
    tables: dict[str, StoredLinear] = field(default_factory=dict)
    calibrated: bool = True  # whether it used the calibration tokens


def block_linears(shapes: Mapping[str, Any]) -> list[str]:
    """Names of the weights of the seven linears of every decoder block, in the order of ``shapes``.

    Raises:
        PeerError: there are none, or not seven in each block.
    """
    names = [name for name in shapes if _LINEAR.match(name)]
    blocks: dict[str, int] = {}
    for name in names:
        block = name.split(".")[2]
        blocks[block] = blocks.get(block, 0) + 1
    wrong = sorted(block for block, count in blocks.items() if count != 7)
    if not names or wrong:
        raise PeerError(
            f"The model has {len(names)} linears named like Llama's, blocks without exactly seven: "
            f"{', '.join(wrong) or 'all'}. Only Llama-like dense models can be compared."
        )
    return names


def save_tokens(path: Path, tokens: torch.Tensor) -> None:
    """Write calibration tokens, int64 [samples, seq_len]."""
    save_file({"tokens": tokens.contiguous()}, path)


def load_tokens(path: str | Path) -> torch.Tensor:
    """Read calibration tokens, int64 [samples, seq_len].

    Raises:
        PeerError: the file does not hold them.
    """
    tokens = load_file(path).get("tokens")
    if tokens is None or tokens.dtype != torch.int64 or tokens.ndim != 2:
        content = (
            "no tensor `tokens`"
            if tokens is None
            else f"`tokens` {tokens.dtype} {list(tokens.shape)}"
        )
        raise PeerError(
            f"{path}: holds {content}, expected int64 [samples, seq_len]. Let run.py write it."
        )
    return tokens


def load_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a Hugging Face folder, in their own dtypes.

    Raises:
        PeerError: there are no such files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise PeerError(
            f"{folder}: holds no .safetensors file."
            " Name a Hugging Face folder with safetensors weights."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def stored_bits(tensors: Mapping[str, torch.Tensor], module: str, parts: tuple[str, ...]) -> int:
    """Bits that the tensors ``module.part`` occupy.

    Args:
        tensors: of a checkpoint.
        module: name of a layer, such as ``model.layers.0.mlp.up_proj``.
        parts: names of its stored parts; those that the checkpoint does not have count nothing.

    Raises:
        PeerError: the checkpoint has none of them.
    """
    stored = [tensors[f"{module}.{part}"] for part in parts if f"{module}.{part}" in tensors]
    if not stored:
        has = sorted(name for name in tensors if name.startswith(f"{module}."))
        raise PeerError(
            f"{module}: the checkpoint stores {has or 'nothing'} of it,"
            f" expected some of {list(parts)}."
        )
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)


def all_bits(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bits of all tensors of a checkpoint."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit values, eight to an int32 along the last dimension, the lowest bits first.

    Args:
        packed: int32 [..., n].

    Returns:
        int32 [..., 8 n] of 0 to 15.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python and of packages."""
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {
        name: metadata.version(name) for name in packages
    }


def end_with_parent() -> None:
    """End this process when standard input ends, if the process that started it asks for that.

    ``svsk sweep`` does, through a pipe that closes when it is killed: nobody waits for a peer that
    works for hours then, and a second one would be started beside it.
    """

    def wait() -> None:
        # not sys.stdin, whose lock this thread would hold when the process ends
        while os.read(0, 1024):
            pass
        os._exit(1)

    if os.environ.get(ENDS_WITH_PARENT):
        threading.Thread(target=wait, daemon=True).start()


def run_job(quantize: Callable[[Job], Result]) -> None:
    """Do the job whose file the command's first argument names; write its result beside it."""
    end_with_parent()
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.manual_seed(job.seed)
    started = time.monotonic()
    result = quantize(job)
    work = Path(job.work)
    save_file(
        {name: tensor.float().contiguous() for name, tensor in result.tensors.items()},
        work / WEIGHTS,
    )
    record = asdict(replace(result, tensors={}, seconds=round(result.seconds, 1)))
    del record["tensors"]
    record["seconds_with_dequantisation"] = round(time.monotonic() - started, 1)
    (work / RESULT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
