# SPDX-License-Identifier: Apache-2.0
"""Whether the keys of a model suit caches of few bits, and what smoothing makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration.limits import longest_sequence
from svsk_offline.calibration.sources import check_sources
from svsk_offline.calibration_entries import DEFAULT_SOURCE, calibration_entries
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.pipeline import check_takes, resolve_device
from svsk_offline.planning.key_channels import LOST_RATIO, KeyChannels
from svsk_offline.planning.smoothing import plan_smoothing
from svsk_offline.recipe_sections import SmoothingArgs
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.hub import resolve_model
from svsk_vllm.format import Checkpoint

__all__ = ["KeyInspection", "inspect_keys", "print_keys"]

_SAMPLES: Final = 16
_SEQ_LEN: Final = 512
"""Samples and their tokens: large channels are large on every text."""


@dataclass(frozen=True)
class KeyInspection:
    """What was found.

    Attributes:
        folder: of the model.
        text: that it was run on.
        tokens: how many.
        layers: those with keys that were understood.
        left: how many other layers, by ``name below the block: reason``.
    """

    folder: Path
    text: str
    tokens: int
    layers: tuple[KeyChannels, ...]
    left: dict[str, int]

    @property
    def lost(self) -> list[KeyChannels]:
        """Layers of which a 4-bit cache rounds half the channels of a head to zero."""
        return [layer for layer in self.layers if layer.ratio > LOST_RATIO]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "folder": str(self.folder),
            "text": self.text,
            "tokens": self.tokens,
            "layers": [layer.to_json() for layer in self.layers],
            "blocks_that_lose_channels": [layer.block for layer in self.lost],
            "left_alone": self.left,
        }


def inspect_keys(
    model: str,
    calibration: str | Sequence[str] = DEFAULT_SOURCE,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> KeyInspection:
    """Run a model on a text and look at its keys.

    Args:
        model: folder or hub name of a dense model, or folder of an SVSK checkpoint, which is run
            as the dense model that it stands for.
        calibration: text sources, see :func:`svsk_offline.calibration.load_calibration`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        trust_remote_code: run Python files that come with the model.

    Raises:
        SvskError: there is no such model or text, it cannot be run block by block, or no layer has
            keys under a name that is known.
        SvskFormatError: the folder is damaged.
    """
    where = resolve_device(device)
    check_sources(calibration_entries(calibration), False)
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    restored = Checkpoint.is_svsk(folder)
    source = ModelSource(folder, trust_remote_code=trust_remote_code, restored=restored)
    source.check()
    skeleton: Any = source.model
    seq_len = min(_SEQ_LEN, longest_sequence(skeleton.config) or _SEQ_LEN)
    texts = load_calibration(calibration, source.tokenizer, _SAMPLES, seq_len, 0, fewer=True)
    check_takes(source, texts)
    found = plan_smoothing(source, texts, SmoothingArgs(keys=True), where)
    if not found.keys:
        why = "; ".join(found.left) or "no linear is called k_proj"
        raise SvskError(f"{folder}: the keys of its layers are not understood ({why}).")
    return KeyInspection(folder, texts.source, texts.tokens.numel(), found.keys, dict(found.left))


def print_keys(console: Console, found: KeyInspection) -> None:
    """Show the result of :func:`inspect_keys` as a table."""
    headings = ("block", "largest", "median", "largest / median", "with --smooth-keys")
    table = new_table(*headings, numbers=range(5))
    for layer in found.layers:
        table.add_row(
            str(layer.block),
            f"{layer.largest:.1f}",
            f"{layer.median:.1f}",
            f"{layer.ratio:.1f}",
            "cannot be" if layer.folded_ratio is None else f"{layer.folded_ratio:.1f}",
        )
    show_table(console, table)
    lines = [
        f"largest magnitudes of key channels on {found.tokens:,} tokens of {found.text}; the ratio"
        " is that of the head where it is largest",
        *(f"{count} x {reason}" for reason, count in found.left.items()),
    ]
    if found.lost:
        lines.append(
            f"{len(found.lost)} of {len(found.layers)} layers have a head with a ratio over"
            f" {LOST_RATIO:.0f}: a 4-bit key cache with a scale per token rounds more than half of"
            " its channels to zero."
        )
    else:
        lines.append(f"No layer has a ratio over {LOST_RATIO:.0f}: its keys suit 4-bit caches.")
    for line in lines:
        console.print(escape(line))
