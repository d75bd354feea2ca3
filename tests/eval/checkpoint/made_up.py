# SPDX-License-Identifier: Apache-2.0
"""Contents of checkpoints that are nowhere on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svsk_eval.checkpoint.contents import CheckpointContents, Matrix


def matrix(name: str, **changes: Any) -> Matrix:
    """A matrix of 64 x 128 in 4.5 bits, half a bit of it a sidecar's, that is nothing special."""
    plain = Matrix(
        name=name,
        block=int(name.split(".")[1]),
        kind="down",
        shape=(64, 128),
        code_bits=4 * 64 * 128,
        scale_bits=0,
        sidecar_bits=64 * 64,
        codebook="int4",
        group_size=64,
        rank=8,
        base_error=2e-3,
        error=1e-3,
        held_out_tokens=4096,
    )
    return replace(plain, **changes)


def made_up(matrices: Sequence[Matrix], **changes: Any) -> CheckpointContents:
    recipe = {"method": "alternating", "allocation": {"target_bpw": 4.5}}
    calibration = {"samples": 128, "seq_len": 128, "held_out": 16}
    producer = {"recipe_values": recipe, "calibration": calibration}
    plain = CheckpointContents(
        folder=Path("made-up"),
        inspection={"producer": producer},
        hf_config={},
        matrices=tuple(matrices),
        dense_tables=(),
        dense_bytes=0,
        other_files=0,
        measured=True,
    )
    return replace(plain, **changes)
