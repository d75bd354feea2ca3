# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models for the offline tool."""

from pathlib import Path

import pytest

from svsk_offline.recipe import Recipe, load_recipe
from tests.support.tiny_models import write_dense


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied head, no biases. Read only."""
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied head, biases on q, k and v. Read only."""
    return write_dense(tmp_path_factory.mktemp("dense") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The published recipe on a handful of short samples, with tiles that fit nothing."""
    return load_recipe("published").override(
        {
            "calibration": {"samples": 4, "seq_len": 32},
            "sidecar": {"rank": 4, "tile_m": 48, "tile_n": 96},
        }
    )
