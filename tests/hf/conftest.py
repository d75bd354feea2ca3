# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the tiny models, each made once."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.hf.loading import Folders, MakeFolders
from tests.support.tiny_models import write_dense, write_random_svsk, write_restored


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> MakeFolders:
    made: dict[tuple[str, torch.dtype], Folders] = {}

    def make(family: str, dtype: torch.dtype) -> Folders:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp(family)
            dense = write_dense(root / "dense", family, dtype=dtype)
            svsk = write_random_svsk(dense, root / "svsk")
            made[family, dtype] = Folders(dense, svsk, write_restored(svsk, root / "restored"))
        return made[family, dtype]

    return make


@pytest.fixture(scope="session")
def qwen2(folders: MakeFolders) -> Folders:
    return folders("qwen2", torch.bfloat16)


@pytest.fixture
def broken(qwen2: Folders, tmp_path: Path) -> Path:
    """A checkpoint of its own for tests that damage it."""
    return Path(shutil.copytree(qwen2.svsk, tmp_path / "broken"))
