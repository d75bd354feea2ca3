# SPDX-License-Identifier: Apache-2.0
"""Quantise a model with another project's quantiser, and write the result as a dense folder.

    PYTHONPATH=eval python -m peers.run gptq MODEL model-gptq --calibration wiki.valid.txt
    svsk eval model-gptq --reference MODEL --text wiki.test.raw

Every peer runs from its own package in its own environment, sees the same calibration tokens as
``svsk quantize``, and is scored from float32 weights, so that no difference of kernels enters. The
seven linears of each decoder block differ from the reference (with AWQ also the norms before them,
which carry its scales), and the embedding and output head where the peer quantises them, unless
``--tables reference`` keeps the reference's. ``peer.json`` in the folder says what was done, with
what, for how long, and how many bits the peer's checkpoint stores for those linears, and for all.
"""

import collections
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from peers.common import (
    RESULT,
    TABLES,
    WEIGHTS,
    Job,
    PeerError,
    all_bits,
    block_linears,
    end_with_parent,
    load_folder,
    save_tokens,
)
from peers.environment import environment_python, run_shown
from peers.listed import PEERS
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import CalibrationSet, load_calibration
from svsk_offline.command_app import App
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.side_files import copy_side_files

__all__ = ["Prepared", "Request", "compare_peer", "summarize"]

HERE = Path(__file__).resolve().parent
RECORD = "peer.json"
GROUP_SIZES = (128, 64, 32)


app = App(add_completion=False)


@app.command()
def main(
    peer: Annotated[str, typer.Argument(help=f"One of {', '.join(PEERS)}.")],
    model: Annotated[Path, typer.Argument(help="Hugging Face folder of the reference.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    calibration: Annotated[list[str], typer.Option(help="Text, as for `svsk quantize`.")],
    samples: Annotated[
        int, typer.Option(help="Calibration samples; `svsk quantize` takes more of wide models.")
    ] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the draw of samples, and the peer's.")] = 0,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights per scale; by default the largest of 128, 64, 32 that divides all."
        ),
    ] = None,
    tables: Annotated[
        str,
        typer.Option(help="Embedding and output head: own, as the peer stores them, or reference."),
    ] = "own",
    fewer: Annotated[
        bool, typer.Option("--fewer", help="Take as many samples as a short text has.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the request, make the environment, and end.")
    ] = False,
    measurements: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps importance matrices, for other types of GGUF."),
    ] = None,
    env_dir: Annotated[Path, typer.Option(help="Where the peers' environments are.")] = Path(
        ".venv-peers"
    ),
) -> None:
    """Quantise MODEL with PEER and write its dequantised weights to OUT, with ``peer.json``."""
    end_with_parent()
    try:
        request = Request(
            peer,
            model,
            out,
            tuple(calibration),
            samples,
            seq_len,
            seed,
            group_size,
            tables,
            fewer,
            measurements,
            env_dir,
        )
        prepared = Prepared.of(request)
        record = None if check else compare_peer(request, prepared)
    except (PeerError, SvskError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if record is None:
        typer.echo(f"{peer} can be run on {model}, as far as can be told beforehand.")
        return
    typer.echo(
        f"{out}: {record['title']}, {record['bits_per_weight']:.4f} bits per weight"
        f" ({record['bits_per_weight_of_all']:.4f} over all weights of the model),"
        f" {record['seconds']:.1f} s"
    )


@dataclass(frozen=True)
class Request:
    """What the command :func:`main` is asked for, by the names of its arguments."""

    peer: str
    model: Path
    out: Path
    calibration: tuple[str, ...]
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    group_size: int | None = None
    tables: str = "own"
    fewer: bool = False
    measurements: Path | None = None
    env_dir: Path = Path(".venv-peers")

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            PeerError: the peer is unknown or does not take an option, or ``out`` exists.
        """
        if self.peer not in PEERS:
            raise PeerError(f"{self.peer}: no such peer. There are {', '.join(PEERS)}.")
        if self.tables not in ("own", "reference"):
            raise PeerError(f"--tables {self.tables}: expected own or reference.")
        if self.group_size is not None and not PEERS[self.peer].grouped:
            raise PeerError(
                f"--group-size {self.group_size}: {self.peer} has groups of its own. Leave it out."
            )
        if self.out.exists():
            raise PeerError(f"{self.out}: exists already. Remove it, or name another folder.")


@dataclass(frozen=True)
class Prepared:
    """What is known of a request before anything is quantised."""

    reference: dict[str, torch.Tensor]
    group_size: int
    python: Path  # of the peer's environment

    @classmethod
    def of(cls, request: Request) -> "Prepared":
        """Check a request, and make the peer's environment where it is not there.

        Raises:
            PeerError: the peer does not take the request or the model, or has no environment.
        """
        request.check()
        peer, reference = PEERS[request.peer], load_folder(request.model)
        shapes = {name: tuple(reference[name].shape) for name in block_linears(reference)}
        size = choose_group_size(shapes, request.group_size) if peer.grouped else 0
        python = environment_python(HERE / peer.folder, request.env_dir.resolve())
        return cls(reference, size, python)


def compare_peer(request: Request, prepared: Prepared) -> dict[str, Any]:
    """What the command :func:`main` does; returns what ``peer.json`` holds.

    Raises:
        PeerError: the peer failed, or cannot take the model.
        SvskError: the calibration text cannot be used.
    """
    peer, model, out = PEERS[request.peer], request.model, request.out
    reference, python = prepared.reference, prepared.python
    tokens = load_calibration(
        request.calibration,
        AutoTokenizer.from_pretrained(model),
        request.samples,
        request.seq_len,
        request.seed,
        fewer=request.fewer,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f"{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as scratch:
        work = Path(scratch)
        save_tokens(work / "tokens.safetensors", tokens.tokens)
        kept = request.measurements
        job = Job(
            request.peer,
            str(model.resolve()),
            str(work / "tokens.safetensors"),
            str(work),
            str(python.parent.parent),
            prepared.group_size,
            request.seed,
            peer.settings,
            None if kept is None else measured_file(kept, model, tokens),
        )
        run_script(python, peer.folder, job)
        result = json.loads((work / RESULT).read_text(encoding="utf-8"))
        new = load_file(work / WEIGHTS)
        if request.tables == "reference":
            result = with_reference_tables(result, reference)
            new = {name: tensor for name, tensor in new.items() if name not in TABLES}
        write_dense(model, reference, new, partial)
    weights = sum(tensor.numel() for tensor in reference.values())
    record = summarize(request.peer, job, result, tokens, model, weights)
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.rename(out)
    return record


def choose_group_size(shapes: dict[str, tuple[int, ...]], requested: int | None) -> int:
    """Group size that divides the input features of every linear.

    Args:
        shapes: name of a weight -> (N, K).
        requested: what the user wants, or None for the largest of 128, 64 and 32.

    Raises:
        PeerError: none, or not the one asked for, divides them all.
    """
    widths = sorted({shape[1] for shape in shapes.values()})
    for size in GROUP_SIZES if requested is None else (requested,):
        if size > 0 and all(width % size == 0 for width in widths):
            return size
    tried = ", ".join(map(str, GROUP_SIZES)) if requested is None else str(requested)
    raise PeerError(
        f"Input features {widths} are not all multiples of a group size of {tried}."
        " Give --group-size."
    )


def measured_file(folder: Path, model: Path, tokens: CalibrationSet) -> str:
    """The file of a folder, which is made, that keeps what is measured of a model and tokens."""
    key = f"{ModelSource(model).content_sample} {tokens.fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"peer-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    return str(folder.resolve() / name)


def run_script(python: Path, folder: str, job: Job) -> None:
    """Run the peer's script on a job, offline, in its own environment."""
    file = Path(job.work) / "job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {
        "PYTHONPATH": str(HERE.parent),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    run_shown(
        [str(python), "-m", f"peers.{folder}.quantize", str(file)],
        f"Quantising with {job.peer}",
        environment,
    )


def write_dense(
    model: Path, reference: dict[str, torch.Tensor], new: dict[str, torch.Tensor], out: Path
) -> None:
    """Write the reference in float32 with some tensors replaced.

    Args:
        model: the reference's folder; its config and side files are copied.
        reference: its tensors.
        new: float32 tensors by the reference's names.
        out: folder to make.

    Raises:
        PeerError: a replacement is unknown, of another shape or not finite; or a linear of a block
            has none.
    """
    missing = [name for name in block_linears(reference) if name not in new]
    if missing:
        raise PeerError(
            f"{missing[0]}: the peer gave no weight for it and {len(missing) - 1} others."
        )
    for name, tensor in new.items():
        if name not in reference or tensor.shape != reference[name].shape:
            expected = list(reference[name].shape) if name in reference else "no such tensor"
            raise PeerError(
                f"{name}: the peer gave {list(tensor.shape)}, the reference has {expected}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PeerError(f"{name}: the peer gave values that are not finite.")
    out.mkdir()
    dense = {name: new.get(name, tensor).float().contiguous() for name, tensor in reference.items()}
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_side_files(model, out, typer.echo, code=False)


def with_reference_tables(
    result: dict[str, Any], reference: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What a peer's script handed back, as if it had left embedding and output head alone."""
    dense = all_bits({name: reference[name] for name in result["tables"]})
    less = sum(stored["bits"] for stored in result["tables"].values())
    return result | {"file_bits": result["file_bits"] - less + dense, "tables": {}}


def summarize(
    peer: str,
    job: Job,
    result: dict[str, Any],
    tokens: CalibrationSet,
    model: Path,
    all_weights: int,
) -> dict[str, Any]:
    """What ``peer.json`` says of a run.

    Bits per weight are over the linears of the decoder blocks; those ``of_all`` are all that the
    checkpoint stores, over all weights of the model, tied ones once.
    """
    linears = result["linears"]
    weights = sum(stored["weights"] for stored in linears.values())
    types: dict[str, dict[str, float]] = {}
    kinds: dict[str, collections.Counter[str]] = {}
    for name, stored in linears.items():
        row = types.setdefault(stored["type"], {"tensors": 0, "weights": 0, "bits": 0})
        row["tensors"] += 1
        row["weights"] += stored["weights"]
        row["bits"] += stored["bits"]
        kinds.setdefault(name.split(".")[-2], collections.Counter())[stored["type"]] += 1
    for row in types.values():
        row["bits_per_weight"] = round(row["bits"] / row["weights"], 4)
    return {
        "peer": peer,
        "title": PEERS[peer].title,
        "reference": model.name,
        "bits_per_weight": round(sum(stored["bits"] for stored in linears.values()) / weights, 6),
        "bits_per_weight_of_all": round(result["file_bits"] / all_weights, 6),
        "bytes": result["file_bits"] // 8,
        "tables": {name: stored["type"] for name, stored in result["tables"].items()},
        "seconds": result["seconds"],
        "group_size": job.group_size or None,
        "settings": result["settings"],
        "calibration": tokens.describe() | {"seed": job.seed} if result["calibrated"] else None,
        "versions": result["versions"],
        "types": types,
        "types_by_linear": {kind: dict(count) for kind, count in kinds.items()},
        "notes": result["notes"],
        "linears": linears,
    }


if __name__ == "__main__":
    app()
