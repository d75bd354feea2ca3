# SPDX-License-Identifier: Apache-2.0
"""The steps of a sweep for one model: make it, score it. What a step gives is kept in a file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

import svsk_eval
from svsk_eval.errors import EvalError, first_problem
from svsk_eval.processes import run_request
from svsk_eval.sweep.request import OwnVariant, PeerVariant, SweepRequest, Variant
from svsk_eval.sweep.schema import Size, TextFigures
from svsk_eval.text.request import TextRequest
from svsk_offline.calibration import CalibrationSet
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.storage.atomic import PartialFolder, write_text
from svsk_offline.storage.inspection import inspect_checkpoint
from svsk_vllm.format import Checkpoint

__all__ = ["StepProgress", "Steps", "check_peers", "peer_title"]

StepProgress = Callable[[str, str, int, int], None]
"""Called with a model's label, what it does, how much is done and how much there is."""

_SOURCES: Final = Path(svsk_eval.__file__).resolve().parents[1]
_PEERS: Final = _SOURCES / "peers" / "run.py"
_ROOTS: Final = (_SOURCES.parent, *(_SOURCES.parent / name for name in ("offline", "kernels")))
_ERROR: Final = re.compile(r"^Error: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Steps:
    """The steps, for any model of a sweep.

    Attributes:
        request: the sweep.
        model: folder of the dense model.
        texts: calibration samples.
        asked: samples that were asked for; a short text has fewer.
        progress: see :data:`StepProgress`.
    """

    request: SweepRequest
    model: Path
    texts: CalibrationSet
    asked: int
    progress: StepProgress

    def folder(self, variant: Variant) -> Path:
        """Where a model is made."""
        return self.request.out / "models" / variant.label

    def make(self, variant: Variant) -> None:
        """Make a model, unless it is there or will not be needed."""
        if self.folder(variant).exists():
            return
        if isinstance(variant, OwnVariant):
            self._quantize(variant)
        else:
            _run_peer(self, variant)

    def size(self, variant: Variant) -> Size:
        """How large a model is: from the file that keeps it, or from its folder."""
        path = self.kept(variant) / "size.json"
        if path.exists():
            return _read_size(path)
        folder = self.folder(variant)
        own = isinstance(variant, OwnVariant)
        size = _own_size(folder, None) if own else _peer_size(folder)
        write_text(path, size.model_dump_json(indent=1) + "\n")
        return size

    def text(self, variant: Variant) -> TextFigures | None:
        """The figures of a model on the text; None where it was not scored yet."""
        path = self.kept(variant) / "scores.json"
        if not path.is_file():
            return None
        figures = json.loads(path.read_bytes())
        kept = {name: figures.get(name) for name in TextFigures.model_fields}
        return TextFigures.model_validate(kept)

    def score(self, variant: Variant) -> None:
        """Score a model on the text, in a process so that its memory is free afterwards."""
        request, folder = self.request, self.kept(variant)
        asked = TextRequest(
            model=str(self.folder(variant).resolve()),
            reference=str(self.model.resolve()),
            text=request.text.resolve(),
            chunks=request.chunks,
            seq_len=request.seq_len,
            device=request.device,
            trust_remote_code=request.trust_remote_code,
        )
        self.progress(variant.label, "scoring the text", 0, request.chunks)

        def take(message: dict[str, Any]) -> None:
            self.progress(variant.label, "scoring the text", message["done"], message["total"])

        run_request("svsk_eval.text.worker", asked, folder, variant.label, take)

    def kept(self, variant: Variant) -> Path:
        """The folder of what its steps gave."""
        folder = self.request.out / "results" / variant.label
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _quantize(self, variant: OwnVariant) -> None:
        folder, recipe = self.folder(variant), variant.recipe
        interrupted = PartialFolder(folder).path.exists()
        started = time.perf_counter()
        self.progress(variant.label, "quantising", 0, 0)
        quantize(
            self.model,
            folder,
            recipe,
            calibration=self.texts,
            device=self.request.device,
            trust_remote_code=self.request.trust_remote_code,
            measurements=self.measurements if recipe.needs_gradients else None,
            progress=Progress(
                block=lambda done, total: self.progress(variant.label, "quantising", done, total)
            ),
        )
        seconds = None if interrupted else time.perf_counter() - started
        size = _own_size(folder, seconds)
        write_text(self.kept(variant) / "size.json", size.model_dump_json(indent=1) + "\n")

    @property
    def measurements(self) -> Path:
        """Folder of what is measured of the model once."""
        return self.request.measurements or self.request.out / "measurements"


def _own_size(folder: Path, seconds: float | None) -> Size:
    """Of an SVSK checkpoint."""
    found, reader = inspect_checkpoint(folder), Checkpoint(folder).tensors
    producer = found["producer"]
    return Size(
        bits_per_weight=found["bits_per_weight"],
        bits_per_weight_of_all=found["bits_per_weight_of_all"],
        size_bytes=sum(reader.describe(name).num_bits for name in reader.names) // 8,
        seconds=seconds,
        made_with={
            key: producer.get(key) for key in ("svsk", "recipe", "recipe_hash", "calibration")
        },
    )


def _peer_size(folder: Path) -> Size:
    """Of a peer's checkpoint, as its ``peer.json`` says."""
    record = json.loads((folder / "peer.json").read_bytes())
    told = (
        "title",
        "group_size",
        "settings",
        "calibration",
        "versions",
        "types_by_linear",
        "tables",
        "notes",
    )
    return Size(
        bits_per_weight=record["bits_per_weight"],
        bits_per_weight_of_all=record["bits_per_weight_of_all"],
        size_bytes=record["bytes"],
        seconds=record["seconds"],
        made_with={key: record[key] for key in told},
    )


def peer_title(size: Size) -> str:
    """What a peer's row is called: its name, and its group size where it was given one."""
    title, group = str(size.made_with["title"]), size.made_with["group_size"]
    return title if group is None else f"{title}, groups of {group}"


def check_peers(steps: Steps) -> None:
    """Have every peer that is still to run check its request and make its environment.

    Raises:
        EvalError: one cannot be run as asked.
    """
    peers = [one for one in steps.request.peers if not steps.folder(one).exists()]
    if peers and not _PEERS.is_file():
        raise EvalError(
            "--peer: other quantisers are run from a checkout of the project, and this package is"
            " installed without eval/peers. Run `svsk sweep` from the checkout's environment."
        )
    for peer in peers:
        steps.progress(peer.label, "checking", 0, 0)
        _run_peers(peer, [*_arguments(steps, peer), "--check"], steps.kept(peer))


def _run_peer(steps: Steps, peer: PeerVariant) -> None:
    """Quantise with a peer; all it prints goes to a log.

    Raises:
        EvalError: it failed, or was calibrated on other tokens.
    """
    steps.progress(peer.label, "quantising", 0, 0)
    more = ["--samples", str(steps.asked), "--fewer", "--measurements", str(steps.measurements)]
    _run_peers(peer, [*_arguments(steps, peer), *more], steps.kept(peer))
    folder = steps.folder(peer)
    calibration = json.loads((folder / "peer.json").read_bytes())["calibration"]
    if calibration is not None and calibration["fingerprint"] != steps.texts.fingerprint:
        raise EvalError(
            f"{peer.label}: was calibrated on other tokens than the sweep's. Remove {folder}, and"
            " start again with the text as it was."
        )


def _arguments(steps: Steps, peer: PeerVariant) -> list[str]:
    request = steps.request
    options: dict[str, object] = {
        "--seq-len": request.seq_len,
        "--seed": request.recipe.calibration.seed,
        "--tables": request.tables,
        "--env-dir": request.env_dir,
    }
    if peer.group_size is not None:
        options["--group-size"] = peer.group_size
    parts = [peer.peer, steps.model.resolve(), steps.folder(peer)]
    parts += [part for pair in options.items() for part in pair]
    parts += [part for name in request.calibration for part in ("--calibration", name)]
    return [str(part) for part in parts]


def _run_peers(peer: PeerVariant, arguments: list[str], folder: Path) -> None:
    """Run ``python -m peers.run`` to its end.

    It and what it started end with this process, however that ends: by a signal, or because the
    pipe of their standard input closes.
    """
    log = folder / "peer.txt"
    paths = os.pathsep.join(str(path) for path in (_SOURCES, *_ROOTS))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "SVSK_PEER_ENDS_WITH_PARENT": "1",
    }
    command = [sys.executable, "-m", "peers.run", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code:
        said = _ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
        reason = said[-1] if said else f"exit code {code}"
        raise EvalError(f"{peer.label}: {reason} What it printed is in {log}.")


def _read_size(path: Path) -> Size:
    try:
        return Size.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise EvalError(f"{path}: is damaged ({first_problem(error)}). Remove it.") from error
