# SPDX-License-Identifier: Apache-2.0
"""Builds ``cpu.cpp`` once per machine and PyTorch, and loads it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

__all__ = ["cpu_ops_obstacle"]

_SOURCE: Final = Path(__file__).with_name("cpu.cpp")
_FEATURES: Final = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
_COMPILE: Final = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-w", *(f"-m{name}" for name in _FEATURES))
_BUILD_SECONDS: Final = 600


@lru_cache(maxsize=1)
def cpu_ops_obstacle() -> str | None:
    """Make ``torch.ops.svsk.cpu_linear`` available; the first call on a machine compiles for about 15 seconds.

    Returns:
        None when the op can be called, or why it cannot.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX512-BF16"
    try:
        library = _built()
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        return f"building {_SOURCE.name} failed: {error}" + (f"\n{output[-2000:]}" if output else "")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"loading {library} failed: {error}. Delete it, or set XDG_CACHE_HOME to another folder"
    torch.library.register_fake("svsk::cpu_linear", _fake)
    return None


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    gain: torch.Tensor | None,
    index: torch.Tensor | None,
    n: int,
    group_size: int,
    quad8: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


def _built() -> Path:
    """Path of the shared library. Processes that build at the same time each write their own and rename it."""
    text = "\n".join((_SOURCE.read_text(encoding="utf-8"), torch.__version__, *_COMPILE))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svsk"
    library = cache / f"cpu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"there is no C++ compiler {compiler!r}; install g++ or set CXX")
    cache.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled, linked = Path(folder, "cpu.o"), Path(folder, "cpu.so")
        _command([compiler, *_COMPILE, *includes, "-c", str(_SOURCE), "-o", str(compiled)])
        # Linked without -fopenmp: the OpenMP library must be the one PyTorch brings.
        torch_libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _command([compiler, "-shared", str(compiled), *torch_libraries, "-o", str(linked)])
        linked.replace(library)
    return library


def _command(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
