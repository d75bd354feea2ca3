# SPDX-License-Identifier: Apache-2.0
"""The module is skipped where vLLM is not installed; the set-up of the project installs it."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")
