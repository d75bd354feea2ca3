# SPDX-License-Identifier: Apache-2.0
"""A driver for Triton that executes kernels with the emulator.

They are compiled as for a GPU, and take CPU tensors.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget

from svsk_kernel_tools.emulator.code import code_of
from svsk_kernel_tools.emulator.cta import Work
from svsk_kernel_tools.emulator.errors import EmulateError, UnsupportedError
from svsk_kernel_tools.emulator.machine import ORDERS, Gpu, Order
from svsk_kernels.gpu.choice import Gpu as GpuModel

__all__ = ["CAPABILITIES", "emulated"]

CAPABILITIES: Final = (80, 86, 89, 90, 120)
"""The targets that can be emulated."""

_INTEGERS: Final = {f"{sign}{bits}": bits for sign in "iu" for bits in (8, 16, 32, 64)}
_INTEGERS.update(i1=8, u1=8)
_FLOATS: Final = {"fp32": "<f", "f32": "<f", "fp64": "<d", "fp16": "<e"}


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.launcher_cls = _Launcher
        self.ptx = ""
        shared = GpuModel(name="", capability=gpu.capability, processors=1).shared_memory
        properties = {"max_shared_mem": shared, "multiprocessor_count": 4, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_current_device(self) -> str:
        return f"emulated sm_{self.gpu.capability}"  # Triton keeps compiled kernels per device

    def set_current_device(self, device: object) -> None:
        return

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def take(
        self, module: Any, function: Any, name: str, group: dict[str, str], digest: str
    ) -> None:
        """Called by Triton before it loads a binary, with the files of all stages."""
        self.ptx = next(
            Path(path).read_text(encoding="utf-8")
            for path in group.values()
            if path.endswith(".ptx")
        )

    def _load(self, name: str, binary: bytes, shared: int, device: object) -> tuple[Any, ...]:
        """Module (none: there is nothing to unload), function, registers, spills, most threads."""
        return None, self.ptx, 0, 0, 1024


class _Launcher:
    """Launches one compiled kernel on whatever GPU is emulated at the time."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature: dict[str, Any] = dict(source.signature)
        self.metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: str,
        packed: Any,
        extra: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        active = triton.runtime.driver.active
        if not isinstance(active, _Driver):
            raise EmulateError(
                f"{self.metadata.name}: launched outside of emulated(...), for which it was"
                " compiled."
            )
        if getattr(self.metadata, "num_ctas", 1) != 1 or self.metadata.global_scratch_size:
            raise UnsupportedError(
                f"{self.metadata.name}: clusters and scratch memory are not emulated."
            )
        if min(x, y, z) < 1:
            return
        code = code_of(function)
        given = list(zip(self.signature.items(), arguments, strict=True))
        named = [(name, value) for (name, kind), value in given if kind != "constexpr"]
        params = [_bits(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
        # scratch memory of which nothing was asked
        params += [0] * (len(code.program.params) - len(params))
        if len(code.program.params) - len(named) != 2:
            count = len(code.program.params)
            raise UnsupportedError(
                f"{self.metadata.name}: {count} parameters for {len(named)} arguments."
            )
        work = Work(code, (x, y, z), params, named, self.metadata.shared)
        active.gpu.submit(work, bool(self.metadata.launch_pdl))


def _bits(name: str, kind: Any, value: Any) -> int:
    """A parameter's bits."""
    if isinstance(kind, str) and kind.startswith("*"):
        if value is None or isinstance(value, int):
            return int(value or 0)
        return int(value.data_ptr())
    if kind in _INTEGERS:
        return int(value) & ((1 << _INTEGERS[kind]) - 1)
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    raise UnsupportedError(
        f"argument {name}: type {kind} is not emulated; tensors, integers and floats are."
    )


@contextmanager
def emulated(
    capability: int = 90, *, order: Order = "forward", seed: int = 0, late: bool = False
) -> Iterator[Gpu]:
    """Have Triton compile for a GPU and execute what it compiled on the CPU, on CPU tensors.

    Args:
        capability: 80, 86, 89, 90 or 120, as in sm_90.
        order: of the blocks of a grid.
        seed: of ``shuffled`` and ``interleaved``.
        late: asynchronous copies and matrix products happen only when they are waited for, instead
            of at once.

    Yields:
        The GPU; its ``launches`` say what each kernel did. With dependent launch a kernel may be
        held back until the next launch; ``flush()`` runs it, and so does leaving the context.

    Raises:
        EmulateError: Triton interprets kernels in this process, or an argument is not known.
    """
    if triton.knobs.runtime.interpret:
        raise EmulateError(
            "TRITON_INTERPRET is set: interpreted kernels cannot be compiled. Unset it."
        )
    if capability not in CAPABILITIES:
        supported = ", ".join(map(str, CAPABILITIES))
        raise UnsupportedError(
            f"capability {capability} is not emulated (sm_100's tcgen05 is not): expected"
            f" {supported}."
        )
    if order not in ORDERS:
        raise EmulateError(f"order {order!r}: expected one of {', '.join(ORDERS)}.")
    gpu = Gpu(capability, order, seed, late)
    driver, config = _Driver(gpu), triton.runtime.driver
    before, hooks = config._active, triton.knobs.runtime.kernel_load_start_hook
    hooks.add(driver.take)
    config.set_active(driver)
    try:
        yield gpu
        gpu.flush()
    finally:
        gpu.drop()
        config.set_active(before)
        hooks.remove(driver.take)
