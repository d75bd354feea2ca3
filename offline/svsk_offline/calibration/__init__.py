# SPDX-License-Identifier: Apache-2.0
"""Calibration: text, and what the model does with it."""

from svsk_offline.calibration.capture import BlockRunner, InputStatistics
from svsk_offline.calibration.text import CalibrationSet, load_calibration

__all__ = ["BlockRunner", "CalibrationSet", "InputStatistics", "load_calibration"]
