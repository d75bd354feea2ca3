# SPDX-License-Identifier: Apache-2.0
"""One quantised layer on a GPU: whether the kernels take it, its run-time tensors, and the product.

The product is one custom op, ``torch.ops.svsk.matmul``, so that a compiled graph does not depend on
the number of tokens: the op chooses the kernel by it. Triton is imported where it is first used;
importing this module is cheap.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from svsk_kernels.gpu.choice import GROUP_SIZES, Choice, Gpu
from svsk_kernels.gpu.repack_base import (
    Base,
    pack_base,
    pack_row_scale,
    pack_scale,
    pack_scale_codes,
    plane_length,
)
from svsk_kernels.gpu.repack_sidecar import (
    MAX_U_BYTES,
    PlanarSidecar,
    Tiles,
    pack_sidecar,
    u_bytes,
)
from svsk_kernels.gpu.rule import invariant_choices
from svsk_kernels.gpu.tuning import choices_for
from svsk_kernels.layer_kernel import LayerSpec

__all__ = ["SIDECAR_NAMES", "SvskMatmul", "device_obstacle", "gpu_of"]

_DTYPES: Final = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY: Final = 80
_OLDEST_TRITON: Final = (3, 4)
SIDECAR_NAMES: Final = tuple(f"sidecar_{name}" for name in PlanarSidecar.names())
"""Run-time tensors of a sidecar, as layers name them."""


def _encode(spec: LayerSpec) -> list[int]:
    """The numbers the op needs."""
    bits, tiles = 0 if spec.plan is None else spec.factor_bits, Tiles.of(spec.plan)
    flags = (tiles.long, tiles.aligned, spec.batch_invariant)
    quad8 = spec.codebook == "quad8"
    return [spec.n, spec.k, spec.group_size, int(quad8), bits, *map(int, flags)]


@lru_cache(maxsize=32)
def gpu_of(device: torch.device) -> Gpu:
    """What the kernels need to know of a device.

    The CPU stands for a small GPU in Triton's interpreter.
    """
    if device.type != "cuda":
        return Gpu(name="interpreter", capability=0, processors=4)
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
    return Gpu(
        name=properties.name, capability=capability, processors=properties.multi_processor_count
    )


def device_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels for activations of a dtype do not run on a device; None when they do."""
    if dtype not in _DTYPES:
        return f"activations are {dtype}, the kernels take bfloat16 and float16"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    if device.type == "cuda":
        if torch.version.hip is None and gpu_of(device).capability < _LEAST_CAPABILITY:
            name, least = gpu_of(device).name, _LEAST_CAPABILITY / 10
            return f"{name} is older than compute capability {least}"
        return None
    return None if triton.knobs.runtime.interpret else f"Triton has no backend for {device.type}"


class SvskMatmul:
    """The kernels of one layer.

    Args:
        spec: the layer. With ``factor_bits`` 4 its factors stay packed.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.code = spec, _encode(spec)

    @staticmethod
    def can_implement(spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Whether the kernels take such a layer, and if not, why not."""
        if spec.codebook == "int8":
            return False, "codes have 8 bits, the kernels take 4"
        if spec.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return False, f"groups of {spec.group_size}, the kernels take sizes of {sizes}"
        if spec.k % spec.group_size:
            return False, f"{spec.k} columns per rank, no whole groups of {spec.group_size}"
        size = 0 if spec.plan is None else u_bytes(spec.plan, spec.factor_bits)
        if size > MAX_U_BYTES:
            return False, (
                f"the sidecar's U takes {size} bytes, the kernels address {MAX_U_BYTES}: quantise"
                " with a smaller rank or wider tiles"
            )
        obstacle = device_obstacle(spec.dtype, device)
        return obstacle is None, obstacle or ""

    def prepare(
        self,
        packed: torch.Tensor,
        scale: torch.Tensor,
        u: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run-time tensors of a layer, by name; the op reads nothing else.

        Args:
            packed: int32 [N, K / 8] as in the checkpoint.
            scale: [N, K / g], int8 where the layer is row-scaled.
            u: int8, flat, in the plan's order; None without a sidecar.
            v: int8, flat, likewise.
            gain: float32, flat, likewise.
            row_scale: [N, 1] where the layer is row-scaled, else None.
        """
        spec = self.spec
        plane = plane_length(spec.k)
        tensors = {"words": pack_base(packed, spec.k, plane)}
        if spec.row_scaled:
            assert row_scale is not None
            tensors["scale"] = pack_scale_codes(scale, plane, spec.group_size)
            tensors["row_scale"] = pack_row_scale(row_scale.to(spec.dtype))
        else:
            tensors["scale"] = pack_scale(scale.to(spec.dtype), plane, spec.group_size)
        if spec.plan is not None:
            assert u is not None
            assert v is not None
            assert gain is not None
            side = pack_sidecar(spec.plan, spec.k, u, v, gain, spec.factor_bits)
            tensors |= {
                name: getattr(side, name.removeprefix("sidecar_")) for name in SIDECAR_NAMES
            }
        return tensors

    def __call__(
        self, x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x W_hat^T + bias``.

        Args:
            x: [M, K] of the layer's dtype.
            tensors: of :meth:`prepare`.
            bias: [N] or None.

        Returns:
            Contiguous [M, N].
        """
        side = [tensors[name] for name in SIDECAR_NAMES] if self.spec.plan is not None else []
        product: torch.Tensor = torch.ops.svsk.matmul(
            x,
            tensors["words"],
            tensors["scale"],
            tensors.get("row_scale"),
            bias,
            side,
            self.code,
        )
        return product

    @torch.no_grad()
    def warm_up(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None = None) -> None:
        """Compile and run every kernel that any number of tokens may need, once.

        Nothing is compiled afterwards.

        Layers that Triton cannot tell apart are run once per process. Also zeroes the device's
        counters, whose memory an engine may have put to sleep and taken back.
        """
        from svsk_kernels.gpu.launch import counters

        device = tensors["words"].device
        counters.reset(device)
        # Triton compiles anew for other dtypes, constants, and sizes or addresses that are no
        # multiples of 16.
        stored = tuple(
            (name, tuple(part.shape), part.data_ptr() % 16)
            for name, part in sorted(tensors.items())
        )
        signature = (device, self.spec.dtype, tuple(self.code), stored, bias is None)
        if signature in _warmed:
            return
        limits = [
            choice.max_m
            for choice in _choices(self.code, device, self.spec.row_scaled)
            if choice.max_m is not None
        ]
        sizes = {
            1,
            16,
            17,
            *limits,
            *(limit + 1 for limit in limits),
        }  # shrink's own blocks change at 16
        for some in (
            (None,) if bias is None else (bias, None)
        ):  # row-parallel layers add the bias on one rank only
            for m in sorted(sizes):
                self(
                    torch.zeros(m, self.spec.k, dtype=self.spec.dtype, device=device), tensors, some
                )
        _warmed.add(signature)


_warmed: set[tuple[object, ...]] = set()


def _matmul(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sidecar: Sequence[torch.Tensor],
    shape: Sequence[int],
) -> torch.Tensor:
    n, k, group_size, quad8, bits, _, _, _ = shape
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, n)
    if x.stride(-1) != 1 or (m > 1 and x.stride(0) % 16) or x.data_ptr() % 16:
        x = x.clone(
            memory_format=torch.contiguous_format
        )  # rows that begin off 16 would be copied piece by piece
    side: PlanarSidecar | None = None
    sizes: tuple[int, ...] = ()
    if bits:
        side = PlanarSidecar._make(sidecar)
        sizes = (side.gain.shape[0], side.v_table.shape[1], side.jobs.shape[0])
    of_bias = None if bias is None else bias.dtype
    key = (x.device, x.dtype, scale.dtype, of_bias, *sizes, *shape)
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = _prepare(x, words, scale, row_scale, bias, side, shape)
    base = Base(words, scale, n, k, prepared.plane, group_size, bool(quad8), row_scale)
    product = next(product for limit, product in prepared.products if m <= limit)
    return product(x, base, side, bias)


Product = Callable[[torch.Tensor, Base, PlanarSidecar | None, torch.Tensor | None], torch.Tensor]
"""``x W_hat^T + bias`` from x, base, sidecar and bias."""


class _Prepared(NamedTuple):
    """What layers that Triton cannot tell apart have in common."""

    plane: int
    products: tuple[tuple[float, Product], ...]
    """Products by rising limits of tokens, the last of which is infinite."""


_prepared: Final[dict[tuple[object, ...], _Prepared]] = {}
"""By all that a product is chosen and compiled for."""


def _prepare(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sidecar: PlanarSidecar | None,
    shape: Sequence[int],
) -> _Prepared:
    from svsk_kernels.gpu.folded_product import FoldedProduct
    from svsk_kernels.gpu.invariant_product import InvariantProduct
    from svsk_kernels.gpu.launch import PackedProduct

    n, k, group_size, quad8, bits, long, aligned, invariant = shape
    base = Base(words, scale, n, k, plane_length(k), group_size, bool(quad8), row_scale)
    tiles = Tiles(bool(long), bool(aligned))

    def product(choice: Choice) -> Product:
        if choice.kernel == "fold":
            return FoldedProduct(base, sidecar, bits, x.dtype)
        kind = InvariantProduct if invariant else PackedProduct
        return kind(base, sidecar, bits, choice, tiles, dtype=x.dtype, has_bias=bias is not None)

    choices = _choices(shape, x.device, row_scale is not None)
    limited = (math.inf if choice.max_m is None else choice.max_m for choice in choices)
    return _Prepared(base.plane, tuple(zip(limited, map(product, choices), strict=True)))


def _choices(shape: Sequence[int], device: torch.device, row_scaled: bool) -> tuple[Choice, ...]:
    """Choices for a layer, by the numbers of the op."""
    n, k, group_size, *_, invariant = shape
    choose = invariant_choices if invariant else choices_for
    return choose(gpu_of(device), n, k, group_size, row_scaled)


def _matmul_fake(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sidecar: Sequence[torch.Tensor],
    shape: Sequence[int],
) -> torch.Tensor:
    return x.new_empty(x.shape[0], shape[0])


_library = torch.library.Library("svsk", "FRAGMENT")
_library.define(
    "matmul(Tensor x, Tensor words, Tensor scale, Tensor? row_scale, Tensor? bias,"
    " Tensor[] sidecar, int[] shape) -> Tensor"
)
_library.impl("matmul", _matmul, "CompositeExplicitAutograd")
torch.library.register_fake("svsk::matmul", _matmul_fake, lib=_library)
