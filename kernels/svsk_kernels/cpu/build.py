# SPDX-License-Identifier: Apache-2.0
"""Builds this folder's C++ files once per compiler, processor and PyTorch, and loads them."""

import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

__all__ = ["cpu_ops_obstacle", "round_block_obstacle"]

_COMPILE: Final = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-w")
_BUILD_SECONDS: Final = 600


@dataclass(frozen=True)
class _Object:
    """A file of this folder, compiled once with flags of its own."""

    source: str
    flags: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.source)


@dataclass(frozen=True)
class _Library:
    """Files that become a library of one op.

    Attributes:
        name: of the library.
        objects: what is linked. Of a function that several objects have, such as one of a C++
            header, the linker keeps the first: so those for fewer instructions come first, or code
            for all processors would use instructions that one lacks.
        headers: of this folder that they include.
        fake: the op's name, and what gives the shape of its result while a graph is compiled.
    """

    name: str
    objects: tuple[_Object, ...]
    headers: tuple[str, ...] = ()
    fake: tuple[str, Callable[..., torch.Tensor]] | None = None

    @property
    def text(self) -> str:
        """All of its source."""
        files = [made.path for made in self.objects]
        files += [Path(__file__).with_name(header) for header in self.headers]
        return "\n".join(path.read_text(encoding="utf-8") for path in files)


def cpu_ops_obstacle() -> str | None:
    """Make ``torch.ops.svsk.cpu_linear`` available.

    The first call on a machine compiles for about half a minute.

    Returns:
        None when the op can be called, or why it cannot.
    """
    if not torch.cpu._is_avx2_supported():
        return "the processor has no AVX2"
    return _load_obstacle(_LINEAR)


def round_block_obstacle() -> str | None:
    """Make ``torch.ops.svsk.round_block`` available; as :func:`cpu_ops_obstacle`.

    It runs on every processor, so ``SVSK_CPU_FEATURES`` does not switch it off.
    """
    return _load_obstacle(_ERROR_FEEDBACK)


@lru_cache
def _load_obstacle(library: _Library) -> str | None:
    """Load a folder's library, or build it in the first where it can be written and loaded."""
    compiler = os.environ.get("CXX") or "g++"
    version = _version(compiler)
    reasons: list[str] = []
    folders = list(_folders(reasons))
    name = f"{library.name}-{_key(library)}"
    for folder in folders:
        # Without a compiler what another one has built is as good.
        pattern = f"{name}-{_hash(version) if version else '*'}.so"
        if any(_loads(path, reasons, library) for path in sorted(folder.glob(pattern))):
            return None
    if version is None:
        return f"there is no C++ compiler {compiler!r}; install g++ or set CXX"
    for folder in folders:
        path = folder / f"{name}-{_hash(version)}.so"
        try:
            _build(path, compiler, library)
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None)
            reasons.append(
                f"building {path} failed: {error}" + (f"\n{output[-2000:]}" if output else "")
            )
            continue
        if _loads(path, reasons, library):
            return None
    return "; ".join(dict.fromkeys(reasons)) + ". XDG_CACHE_HOME names another folder to build in"


def _loads(path: Path, reasons: list[str], library: _Library) -> bool:
    """Load a built library and describe its op, or say why not.

    It may be damaged, or lie where nothing may be run.
    """
    try:
        _check_whole(path)
        torch.ops.load_library(str(path))
        if library.fake is not None:
            torch.library.register_fake(*library.fake)
    except (OSError, RuntimeError) as error:
        reasons.append(f"loading {path} failed: {error}")
        return False
    return True


def _check_whole(library: Path) -> None:
    """Raise OSError if the file is cut short: loading such a one ends the process."""
    with library.open("rb") as file:
        header = file.read(64)
    # The table of sections, which ends an ELF file: where it begins, size and number of its
    # entries.
    start, size, count = (
        int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62))
    )
    if (
        len(header) < 64
        or header[:4] != b"\x7fELF"
        or library.stat().st_size < start + size * count
    ):
        raise OSError("it is no whole ELF file; delete it")


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    gain: torch.Tensor | None,
    index: torch.Tensor | None,
    n: int,
    group_size: int,
    code_bits: int,
    quad8: bool,
    instructions: str,
    int8: bool,
    invariant: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512: Final = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_LINEAR: Final = _Library(
    "linear",
    (
        _Object("linear.cpp"),
        _Object("linear_float.cpp", _AVX2),
        _Object("linear_float.cpp", _AVX512),
        _Object("linear_bf16.cpp", (*_AVX512, "-mavx512bf16", "-mavx512vnni")),
    ),
    ("linear.h", "int8_rows.h"),
    ("svsk::cpu_linear", _fake),
)

# Without fused products every processor gives the same bits. Neither errno nor floating-point traps
# are looked at, which would keep roots and choices from being done for several rows at once.
_ERROR_FEEDBACK: Final = _Library(
    "error_feedback",
    (
        _Object(
            "error_feedback.cpp", ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
        ),
    ),
)


def _folders(reasons: list[str]) -> Iterator[Path]:
    """Where a library may lie.

    The user's cache, and for homes that cannot be written a folder of the user's own.
    """
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svsk"
    except RuntimeError as error:  # nobody knows the user's home
        reasons.append(str(error))
    folder = Path(tempfile.gettempdir()) / f"svsk-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        reasons.append(str(error))
        return
    if status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0:
        yield folder
    else:
        reasons.append(f"{folder} can be written by others")


@lru_cache
def _key(library: _Library) -> str:
    """Hash of what decides whether a library runs here, the compiler apart."""
    try:
        processor = re.findall(
            r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE
        )[:1]
    except OSError:
        processor = [platform.processor()]
    flags = (*_COMPILE, *(flag for made in library.objects for flag in ("", *made.flags)))
    return _hash(
        "\n".join((library.text, torch.__version__, *flags, *platform.libc_ver(), *processor))
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(compiler: str) -> str | None:
    """What the compiler says of itself; None if there is none."""
    try:
        return _command([compiler, "--version"])
    except (OSError, subprocess.SubprocessError):
        return None


def _build(path: Path, compiler: str, library: _Library) -> None:
    """Build a library.

    Processes that do so at the same time each write their own and rename it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        linked = Path(name, "cpu.so")
        compiled = [Path(name, f"{number}.o") for number in range(len(library.objects))]
        commands = [
            [compiler, *_COMPILE, *made.flags, *includes, "-c", str(made.path), "-o", str(path)]
            for made, path in zip(library.objects, compiled, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
            list(pool.map(_command, commands))
        # Linked without -fopenmp: the OpenMP library must be the one PyTorch brings.
        torch_libraries = [
            f"-L{root / 'lib'}",
            f"-Wl,-rpath,{root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
        ]
        objects = [str(path) for path in compiled]
        _command([compiler, "-shared", *objects, *torch_libraries, "-o", str(linked)])
        linked.replace(path)


def _command(words: list[str]) -> str:
    return subprocess.run(
        words, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS
    ).stdout
