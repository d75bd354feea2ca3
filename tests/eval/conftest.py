# SPDX-License-Identifier: Apache-2.0
"""How the tests of ``svsk bench`` start processes."""

from collections.abc import Iterator

import pytest

from tests.support.forked import forked_processes


@pytest.fixture
def forked() -> Iterator[None]:
    """Workers and ``svsk eval`` are forks of a process that has imported torch, transformers and lm-eval."""
    with forked_processes():
        yield
