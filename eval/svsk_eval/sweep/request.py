# SPDX-License-Identifier: Apache-2.0
"""What ``svsk sweep`` is asked for: which models to make, and what they have in common."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from svsk_eval.errors import EvalError
from svsk_eval.report.schema import BenchSettings
from svsk_offline.recipe import Recipe, load_recipe

__all__ = [
    "OwnVariant",
    "PeerVariant",
    "SweepRequest",
    "TaskOptions",
    "Variant",
    "distinct",
    "own_variants",
    "peer_variants",
]

_PEER: Final = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]*)(:(?P<size>[0-9]+))?$")
_DENSE: Final = {"head": "dense", "embedding": "dense"}


@dataclass(frozen=True)
class OwnVariant:
    """An SVSK checkpoint by a recipe."""

    kind: ClassVar[Literal["svsk"]] = "svsk"
    label: str
    title: str
    recipe: Recipe


@dataclass(frozen=True)
class PeerVariant:
    """A model of another quantiser of eval/peers, with its own group size or a given one."""

    kind: ClassVar[Literal["peer"]] = "peer"
    label: str
    title: str
    peer: str
    group_size: int | None


Variant = OwnVariant | PeerVariant


@dataclass(frozen=True)
class TaskOptions:
    """Tasks to run, as ``svsk bench`` takes them; ``dtype`` is of the arithmetic."""

    settings: BenchSettings
    dtype: str
    include_path: Path | None
    batch_size: int
    consent: bool


@dataclass(frozen=True)
class SweepRequest:
    """A sweep.

    Attributes:
        model: folder or hub name of the dense model.
        out: folder for everything.
        variants: what to make of it.
        recipe: that budgets are given to; says how much calibration text is drawn.
        calibration: text sources.
        tables: ``own``: embedding and head as every tool stores them; ``reference``: dense.
        text: plain text to score.
        chunks: of it.
        seq_len: tokens of a calibration sample, and of a chunk.
        tasks: None for none.
        device: ``auto``, ``cpu``, ``cuda`` ...
        measurements: folder that keeps what budgets and importance matrices measure; None for one
            in ``out``.
        env_dir: where the peers' environments are.
        trust_remote_code: run Python files that come with the model.
        command: for the report.
    """

    model: str
    out: Path
    variants: tuple[Variant, ...]
    recipe: Recipe
    calibration: tuple[str, ...]
    tables: str
    text: Path
    chunks: int
    seq_len: int
    tasks: TaskOptions | None
    device: str
    measurements: Path | None
    env_dir: Path
    trust_remote_code: bool
    command: str

    @property
    def peers(self) -> tuple[PeerVariant, ...]:
        """Those of other quantisers."""
        return tuple(one for one in self.variants if isinstance(one, PeerVariant))


def own_variants(
    bpw: str, also: str, recipe: Recipe, tables: str, seq_len: int
) -> tuple[OwnVariant, ...]:
    """SVSK checkpoints to make.

    Args:
        bpw: bit budgets, numbers separated by commas, or nothing.
        also: names or files of further recipes, each at the size it gives.
        recipe: that budgets are given to.
        tables: see :class:`SweepRequest`.
        seq_len: tokens of a calibration sample.

    Raises:
        EvalError: a budget is no number above 0.
        SvskError: there is no such recipe, or the recipe takes no budget.
    """
    common: dict[str, dict[str, Any]] = {"calibration": {"seq_len": seq_len}}
    if tables == "reference":
        common["tables"] = _DENSE
    made = []
    for word in _words(bpw):
        try:
            target = float(word)
        except ValueError:
            target = 0.0
        if not 0 < target < 16:
            raise EvalError(
                f"--bpw {word}: expected bits per weight separated by commas, such as 4.25,4.62."
            )
        changed = recipe.override({**common, "allocation": {"target_bpw": target}})
        title = f"SVSK {recipe.name}, {target:g} bits"
        made.append(OwnVariant(f"svsk-{target:g}", title, changed))
    for word in _words(also):
        other = load_recipe(word)
        made.append(OwnVariant(other.name, f"SVSK {other.name}", other.override(common)))
    return tuple(made)


def peer_variants(peers: str) -> tuple[PeerVariant, ...]:
    """Other quantisers to run.

    Args:
        peers: names of eval/peers separated by commas, each perhaps with a colon and a group size.

    Raises:
        EvalError: one has another form.
    """
    made = []
    for word in _words(peers):
        match = _PEER.match(word)
        if match is None:
            raise EvalError(
                f"--peer {word}: expected names separated by commas, such as gptq,awq, each perhaps"
                " with a group size, as gptq:64."
            )
        name, size = match["name"], match["size"]
        label = name if size is None else f"{name}-g{size}"
        made.append(PeerVariant(label, name, name, None if size is None else int(size)))
    return tuple(made)


def distinct(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants, after a check that each has a label of its own.

    Raises:
        EvalError: there is none, or two have one label.
    """
    if not variants:
        raise EvalError("Nothing to make: give --bpw, --peer or --also.")
    labels = [one.label for one in variants]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise EvalError(f"{', '.join(twice)}: asked for twice.")
    return tuple(variants)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
