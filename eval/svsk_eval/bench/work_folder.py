# SPDX-License-Identifier: Apache-2.0
"""Where a model's answers are kept, and which answers of other machines would fit.

Answers belong to what was asked (a model's files, settings) and to what computed them (hardware,
versions, environment, our own code). Only answers that agree in both are taken. A folder that was
copied from a machine of another kind holds some that agree in the first alone: that is said, and
they are taken on purpose only.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from svsk_eval.bench.fingerprint import environment_settings, model_sources, source_hash
from svsk_eval.bench.journal import JOURNAL
from svsk_offline.storage.atomic import write_text

__all__ = ["OtherAnswers", "Surroundings", "hardware", "other_answers", "work_folder"]

_MADE_WITH: Final = "made_with.json"


class Surroundings(BaseModel):
    """What changes answers besides the model and what is asked of it.

    Attributes:
        code: hash of the code that makes answers from weights.
        environment: variables that choose kernels or change how vLLM computes.
        hardware: processor or GPU, in words.
        versions: of packages, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    code: str
    environment: dict[str, str]
    hardware: str
    versions: dict[str, str]

    @staticmethod
    @cache
    def here() -> "Surroundings":
        """Those of this process."""
        versions = {}
        for name in ("lm_eval", "torch", "transformers", "triton", "vllm"):
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return Surroundings(
            code=source_hash(model_sources()),
            environment=environment_settings(),
            hardware=hardware(),
            versions=versions,
        )

    def parts(self) -> list[Any]:
        """What a folder is named by."""
        return [self.code, self.environment, self.hardware, self.versions]

    def unlike(self, other: "Surroundings") -> str:
        """What is different here from ``other``, in words."""
        found = [self.hardware] if self.hardware != other.hardware else []
        for ours, theirs in (
            (self.versions, other.versions),
            (self.environment, other.environment),
        ):
            names = sorted({*ours, *theirs})
            found += [
                f"{name} {ours.get(name, 'absent')}"
                for name in names
                if ours.get(name) != theirs.get(name)
            ]
        if self.code != other.code:
            found.append(f"another version of svsk-vllm's own code ({self.code[:8]})")
        return ", ".join(found)


class _MadeWith(BaseModel):
    """The file that says what the answers of a folder belong to; ``asked`` is a hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    asked: str
    surroundings: Surroundings


@dataclass(frozen=True)
class OtherAnswers:
    """Answers to the same requests that something else computed.

    Attributes:
        journal: holds them.
        origin: what is different about what computed them, in words.
        count: how many there are.
    """

    journal: Path
    origin: str
    count: int


def work_folder(
    work_dir: Path, label: str, kind: str, asked: Sequence[Any], more: Sequence[Any] = ()
) -> Path:
    """A folder for what depends on ``asked``, on ``more`` and on the surroundings.

    Args:
        work_dir: holds all of them.
        label: of the model, for the name of a new one.
        kind: ``answers`` or ``text``.
        asked: what is asked, of which model; JSON can write it.
        more: the same, behind the surroundings.

    Returns:
        The one that there is, made with any label, or a new one.
    """
    here = Surroundings.here()
    digest = _digest([*asked, *here.parts(), *more])
    folder = next(work_dir.glob(f"*-{kind}-{digest}"), None)
    if folder is None:
        folder = work_dir / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', label)[:60]}-{kind}-{digest}"
        folder.mkdir()
    made = _MadeWith(asked=_digest([kind, *asked, *more]), surroundings=here)
    write_text(folder / _MADE_WITH, made.model_dump_json(indent=1))
    return folder


def other_answers(folder: Path) -> list[OtherAnswers]:
    """Answers in the folders beside one that were given to the same, but computed otherwise.

    Args:
        folder: of :func:`work_folder`.

    Returns:
        Those that have some, the most first.
    """
    ours = _made_with(folder)
    found = []
    for other in sorted(folder.parent.glob("*-answers-*")):
        theirs = _made_with(other)
        if ours is None or theirs is None or other == folder or theirs.asked != ours.asked:
            continue
        journal = other / JOURNAL
        count = journal.read_bytes().count(b"\n") if journal.is_file() else 0
        if count:
            origin = theirs.surroundings.unlike(ours.surroundings)
            found.append(OtherAnswers(journal.absolute(), origin, count))
    return sorted(found, key=lambda answers: -answers.count)


def hardware() -> str:
    """The GPUs, or else the processor and how many of its cores may be used, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # it is only a name in the report
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unnamed CPU'}"


def _made_with(folder: Path) -> _MadeWith | None:
    """What a folder's answers belong to; None where it does not say, as older ones do not."""
    try:
        return _MadeWith.model_validate_json((folder / _MADE_WITH).read_bytes())
    except (OSError, ValidationError):
        return None


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:12]
