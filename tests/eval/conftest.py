# SPDX-License-Identifier: Apache-2.0
"""How the tests of ``svsk bench`` start processes."""

from collections.abc import Iterator

import pytest

from tests.support.forked import forked_processes, stop_server


@pytest.fixture(scope="module")
def fork_server() -> Iterator[None]:
    """Ends the process that is forked, which starts when it is needed, with the module's tests."""
    yield
    stop_server()


@pytest.fixture
def forked(fork_server: None) -> Iterator[None]:
    """Workers are forks of a process that has imported torch, transformers and lm-eval."""
    with forked_processes():
        yield
