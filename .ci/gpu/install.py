# SPDX-License-Identifier: Apache-2.0
"""Install what ``bundle.py`` packed, on a machine without a network.

    python3 .ci/gpu/install.py --store ~/svsk-parts --target ~/svsk-site --project . .gpu/part-*

checks the parts that are there and keeps them in the store; a part may come with each call, or all
with one. Once the store has all parts, the wheels are put together, checked, and installed into the
target folder, and what vLLM imports on a GPU is imported. Exit status 2 says that parts are
missing. Needs the standard library and pip only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from setup_env import SetupError, check, pip_command, run_captured

__all__ = ["InstallError", "collect", "install", "main", "reassemble"]

MANIFEST = "manifest.json"
DATA = "data"
STAMP = "svsk-gpu-stamp"
MISSING = 2
CHECK = Path(__file__).resolve().with_name("check.py")

OPTIONS = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--no-warn-script-location")

PYTHON = (3, 12)

SETTINGS = {
    # on by default, and vLLM 0.26 imports flashinfer without a question
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",  # else vLLM asks the network for an address
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of vLLM on such a machine."""


class InstallError(Exception):
    """What is wrong with the parts or the machine, and what to do about it."""


def collect(folders: Sequence[Path], store: Path) -> tuple[dict[str, Any], list[str]]:
    """Keep the parts that are in ``folders``, and say what is missing.

    Args:
        folders: of parts, each with the manifest of its bundle.
        store: keeps parts between calls; parts of another bundle there are thrown away.

    Returns:
        The manifest, and the names of the parts that the store lacks.

    Raises:
        InstallError: a folder is no part, its data are not those of the manifest, or parts are of
            different bundles.
    """
    store.mkdir(parents=True, exist_ok=True)
    kept = store / MANIFEST
    texts = {folder: _read(folder / MANIFEST) for folder in folders}
    if len(set(texts.values())) > 1:
        raise InstallError(
            f"{', '.join(map(str, folders))}: the manifests differ. Bring parts of one bundle."
        )
    text = next(iter(texts.values())) if texts else _read(kept)
    if not kept.is_file() and any(store.iterdir()):
        raise InstallError(
            f"{store} is not empty and was not made by this script. Name another --store."
        )
    if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
        for part in json.loads(_read(kept))["parts"] if kept.is_file() else ():
            (store / part["name"]).unlink(missing_ok=True)
        _write(kept, text.encode())
    manifest: dict[str, Any] = json.loads(text)
    expected = {part["name"]: part for part in manifest["parts"]}
    for folder in folders:
        if folder.name not in expected:
            raise InstallError(
                f"{folder}: the manifest has no part of this name, but {', '.join(expected)}."
            )
        data = (folder / DATA).read_bytes()
        _require(f"{folder / DATA}", data, expected[folder.name])
        _write(store / folder.name, data)
    return manifest, [name for name in expected if not (store / name).is_file()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InstallError(
            f"{path} does not exist. Name the folders of parts that bundle.py wrote."
        ) from None


def _write(path: Path, data: bytes) -> None:
    """Atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _require(what: str, data: bytes, described: dict[str, Any]) -> None:
    """Raise InstallError unless size and hash are as described."""
    digest = hashlib.sha256(data).hexdigest()
    if (len(data), digest) != (described["size"], described["sha256"]):
        raise InstallError(
            f"{what}: {len(data)} bytes with sha256 {digest}, expected {described['size']} with"
            f" {described['sha256']}. Bring it again."
        )


def reassemble(manifest: dict[str, Any], store: Path, out: Path) -> list[Path]:
    """Write the wheels that the parts in the store hold.

    Args:
        manifest: of the bundle.
        store: with all parts.
        out: folder for the wheels.

    Raises:
        InstallError: a part or a wheel is not as the manifest says.
    """
    out.mkdir(parents=True, exist_ok=True)
    source, pending, wheels = _parts(manifest, store), bytearray(), []
    for described in manifest["wheels"]:
        while len(pending) < described["size"] and (data := next(source, None)) is not None:
            pending += data
        data = bytes(pending[: described["size"]])
        del pending[: described["size"]]
        _require(described["name"], data, described)
        wheels.append(out / described["name"])
        _write(wheels[-1], data)
    return wheels


def _parts(manifest: dict[str, Any], store: Path) -> Iterator[bytes]:
    for part in manifest["parts"]:
        data = (store / part["name"]).read_bytes()
        _require(str(store / part["name"]), data, part)
        yield data


def install(wheels: Sequence[Path], target: Path, project: Path | None, stamp: str) -> list[Path]:
    """Let pip install wheels into a folder, and the project, if it is given, into one beside it.

    Args:
        wheels: with all they need among themselves and on the machine.
        target: folder for PYTHONPATH; replaced unless its stamp says that it holds these wheels
            already.
        project: source tree of svsk-vllm, installed in any case.
        stamp: what the target's stamp says when the wheels are installed.

    Returns:
        The folders for PYTHONPATH. The project's comes last: it is there for its metadata and
        commands.

    Raises:
        InstallError: the target is a folder that was not made by this function.
        SetupError: pip fails.
    """
    mark = target / STAMP
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == stamp):
        if target.exists() and any(target.iterdir()) and not mark.is_file():
            raise InstallError(
                f"{target} is not empty and was not made by this script. Name another --target."
            )
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        mark.write_text("unfinished\n", encoding="utf-8")
        _pip([*map(str, wheels)], target, f"{len(wheels)} wheels")
        mark.write_text(stamp, encoding="utf-8")
    if project is None:
        return [target]
    # Its metadata carry the entry point by which vLLM finds the plugin. In one folder its commands
    # replace vLLM's.
    beside = target.with_name(f"{target.name}.project")
    _pip(["--no-build-isolation", str(project)], beside, str(project))
    return [target, beside]


def _pip(arguments: Sequence[str], target: Path, what: str) -> None:
    start = time.monotonic()
    options = [*OPTIONS, "--upgrade", "--target", str(target), *arguments]
    hint = "Bring the parts of a bundle for this machine's Python and PyTorch."
    check(run_captured(pip_command(Path(sys.executable), options)), f"pip install {what}", hint)
    print(f"installed {what} in {time.monotonic() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", type=Path, nargs="*", help="folders of parts that came with this call"
    )
    parser.add_argument(
        "--store", type=Path, required=True, help="folder that keeps parts between calls"
    )
    parser.add_argument(
        "--target", type=Path, required=True, help="folder to install into, for PYTHONPATH"
    )
    parser.add_argument(
        "--project", type=Path, help="source tree of svsk-vllm, to be installed as well"
    )
    parser.add_argument("--no-check", action="store_true", help="do not import anything afterwards")
    given = parser.parse_args(arguments)
    try:
        if sys.version_info[:2] != PYTHON:
            raise InstallError(
                f"The wheels are for Python {PYTHON[0]}.{PYTHON[1]}, and this is {sys.version}."
            )
        manifest, missing = collect(given.parts, given.store)
        if missing:
            print(
                f"{given.store} lacks {', '.join(missing)} of {len(manifest['parts'])} parts. Bring"
                " them as well."
            )
            return MISSING
        wheels = reassemble(
            manifest, given.store, given.target.resolve().with_name(f"{given.target.name}.wheels")
        )
        folders = install(
            wheels,
            given.target.resolve(),
            given.project and given.project.resolve(),
            json.dumps(manifest, sort_keys=True) + "\n",
        )
    except (InstallError, SetupError) as error:
        print(f"\nNot installed. {error}", file=sys.stderr)
        return 1
    # What the caller has comes first: a source tree there is the one that runs.
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *map(str, folders)])
    commands = os.pathsep.join(str(folder / "bin") for folder in folders)
    print(f"export {' '.join(f'{name}={value}' for name, value in SETTINGS.items())}")
    print(f"export PYTHONPATH={path} PATH={commands}:$PATH", flush=True)
    if given.no_check:
        return 0
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
    return subprocess.run([sys.executable, str(CHECK)], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
