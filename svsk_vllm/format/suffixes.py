# SPDX-License-Identifier: Apache-2.0
"""Names of the tensors that a quantised linear stores."""

from typing import Final

__all__ = [
    "SCALE_SUFFIXES",
    "SIDECAR_GAIN",
    "SIDECAR_U",
    "SIDECAR_V",
    "SUFFIXES",
    "WEIGHT_HOT_PACKED",
    "WEIGHT_HOT_ROWS",
    "WEIGHT_HOT_SCALE",
    "WEIGHT_PACKED",
    "WEIGHT_ROW_SCALE",
    "WEIGHT_SCALE",
    "split_suffix",
]

WEIGHT_PACKED: Final = "weight_packed"
WEIGHT_SCALE: Final = "weight_scale"
WEIGHT_ROW_SCALE: Final = "weight_row_scale"
WEIGHT_HOT_ROWS: Final = "weight_hot_rows"
WEIGHT_HOT_PACKED: Final = "weight_hot_packed"
WEIGHT_HOT_SCALE: Final = "weight_hot_scale"
SIDECAR_U: Final = "sidecar_u"
SIDECAR_V: Final = "sidecar_v"
SIDECAR_GAIN: Final = "sidecar_gain"
SUFFIXES: Final = (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_ROW_SCALE,
    WEIGHT_HOT_ROWS,
    WEIGHT_HOT_PACKED,
    WEIGHT_HOT_SCALE,
    SIDECAR_U,
    SIDECAR_V,
    SIDECAR_GAIN,
)
SCALE_SUFFIXES: Final = (WEIGHT_SCALE, WEIGHT_ROW_SCALE, WEIGHT_HOT_ROWS, WEIGHT_HOT_SCALE)
"""What the scales of all groups are made from."""


def split_suffix(name: str) -> tuple[str, str] | None:
    """``(module, suffix)`` of a quantised linear's tensor name, None for any other."""
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if module and suffix in SUFFIXES else None
