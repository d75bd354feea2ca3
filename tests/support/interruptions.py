# SPDX-License-Identifier: Apache-2.0
"""Runs of the quantiser that are stopped on the way."""

from pathlib import Path

import pytest

from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.layer_report import LayerReport

__all__ = ["stop_at_a_matrix", "stop_before_tables"]


class _StoppedError(Exception):
    pass


def stop_before_tables(model: Path, out: Path, recipe: Recipe) -> None:
    """Quantise the blocks of a model, and stop when embedding and head are next."""

    def stop(index: int, total: int) -> None:
        if index == total:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        quantize(model, out, recipe, progress=Progress(block=stop))


def stop_at_a_matrix(model: Path, out: Path, recipe: Recipe) -> None:
    """Quantise a model, and press Ctrl-C when the first matrix is reported."""

    def stop(report: LayerReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, recipe, progress=Progress(layer=stop))
