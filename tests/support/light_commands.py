# SPDX-License-Identifier: Apache-2.0
"""Commands that must not wait for torch, in a process of their own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_without_heavy_imports"]

_PROGRAM = """
import sys
from svsk_eval.cli import app
for line in sys.stdin.read().splitlines():
    try:
        app(line.split())
    except SystemExit as ended:
        assert (ended.code or 0) == int(sys.argv[1]), line
heavy = {"torch", "transformers", "vllm", "compressed_tensors", *sys.argv[2:]} & set(sys.modules)
assert not heavy, heavy
"""


def run_without_heavy_imports(
    lines: Sequence[str], folder: Path, code: int, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run ``svsk`` once per line in one process, which imports no heavy package.

    Args:
        lines: arguments, separated by spaces.
        folder: where to run.
        code: that each ends with.
        more: further packages that none may import.
    """
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(code), *more],
        input="\n".join(lines),
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run
