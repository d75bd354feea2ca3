# SPDX-License-Identifier: Apache-2.0
"""Sweeps of a model's gradients, as tests run them."""

from typing import Any

import torch

from svsk_offline.calibration import CalibrationSet, sweep_gradients
from svsk_offline.calibration.gradients import Visit
from svsk_offline.storage.dense_model import ModelSource

__all__ = ["sweep"]


def sweep(source: ModelSource, texts: CalibrationSet, visit: Visit, **options: Any) -> None:
    """On the CPU in float32, with all moments, unless ``options`` say ``moments=False``."""
    cpu, chosen = torch.device("cpu"), {"full": True, "moments": True, **options}
    sweep_gradients(source, texts, cpu, torch.float32, visit, **chosen)
