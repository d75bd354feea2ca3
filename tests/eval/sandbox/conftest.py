# SPDX-License-Identifier: Apache-2.0
"""What holds after every test of the sandbox."""

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert psutil.Process().children(recursive=True) == []
