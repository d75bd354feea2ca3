# SPDX-License-Identifier: Apache-2.0
"""What several tests of the evaluation share."""

import os
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.sandbox import CodeLimits, Verdict, run_programs
from svsk_eval.task_data import DATA_VARIABLE, task_manager

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "eval"
LIMITS = CodeLimits()


def published_file(name: str) -> Path:
    """A public benchmark's file in the folder that ``SVSK_DATA`` names; skips the test without it.

    They are no part of the project.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"no {name}: set {DATA_VARIABLE} to its folder")
    return Path(folder) / name


def load_task(name: str) -> Any:
    """One of our tasks with its documents, an ``lm_eval.api.task.ConfigurableTask``."""
    return task_manager(include_defaults=False).load(name)["tasks"][name]


def run(program: str, limits: CodeLimits = LIMITS, *, consent: bool = True) -> Verdict:
    """Run one program in the sandbox."""
    return run_programs([program], consent=consent, limits=limits, workers=1)[0]


def assert_refused(program: str) -> None:
    """Run a program that the sandbox must refuse a call."""
    verdict = run(program)
    assert verdict.outcome == "failed"
    assert verdict.detail.startswith("PermissionError: "), verdict
