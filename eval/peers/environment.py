# SPDX-License-Identifier: Apache-2.0
"""Virtual environments of the peers, made from their pinned requirements when needed."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peers.common import PeerError

__all__ = ["check_pinned", "environment_python", "run_shown"]

STAMP = "svsk-peer-environment"
_PIN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+$")


def environment_python(source: Path, env_dir: Path) -> Path:
    """Python of a peer's environment, which is made or remade to fit the requirements.

    Args:
        source: the peer's folder, with ``requirements.txt`` and, for packages of npm,
            ``package.json``.
        env_dir: folder for all environments.

    Returns:
        The environment's python.

    Raises:
        PeerError: a requirement is not pinned, or pip or npm failed.
    """
    requirements, packages = source / "requirements.txt", source / "package.json"
    check_pinned(requirements)
    inputs = hashlib.sha256(requirements.read_bytes())
    if packages.exists():
        inputs.update(packages.read_bytes())
    folder = env_dir / source.name
    python, stamp = folder / "bin" / "python", folder / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8").strip() == inputs.hexdigest():
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise PeerError(
            f"{folder}: exists and is not a virtual environment. Give another --env-dir."
        )
    shutil.rmtree(folder, ignore_errors=True)
    run_shown([sys.executable, "-m", "venv", str(folder)], f"Making {folder}")
    run_shown(
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
        f"Installing {requirements}",
    )
    if packages.exists():
        if shutil.which("npm") is None:
            raise PeerError(
                f"{packages}: npm is needed to install it and is not on the PATH. Install Node.js."
            )
        shutil.copy(packages, folder / packages.name)
        # The packages hold their shared libraries as they are: no script of theirs has to run.
        command = [
            "npm",
            "install",
            "--prefix",
            str(folder),
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
        ]
        run_shown(command, f"Installing {packages}")
    stamp.write_text(inputs.hexdigest() + "\n", encoding="utf-8")
    return python


def check_pinned(requirements: Path) -> None:
    """Check that every requirement names one version.

    Raises:
        PeerError: one does not, or there is no such file.
    """
    try:
        lines = requirements.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PeerError(
            f"{requirements}: cannot read the peer's requirements ({error.strerror})."
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#") and not _PIN.match(line.strip()):
            raise PeerError(
                f"{requirements}, line {number}: {line!r} is not pinned. Write name==version."
            )


def run_shown(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run a command with its output shown.

    Raises:
        PeerError: it failed.
    """
    print(f"{what} ...", flush=True)
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise PeerError(
            f"{what} failed with exit status {done.returncode}; its own message is above."
        )
