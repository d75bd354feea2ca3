# SPDX-License-Identifier: Apache-2.0
"""Calibration: text, and what the model does with it."""

from svsk_offline.calibration.block_runner import BlockRunner
from svsk_offline.calibration.gradients import sweep_gradients
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.calibration.mixture import load_calibration
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.calibration.way_back import OutputGradients

__all__ = [
    "BlockRunner",
    "CalibrationSet",
    "InputStatistics",
    "OutputGradients",
    "load_calibration",
    "sweep_gradients",
]
