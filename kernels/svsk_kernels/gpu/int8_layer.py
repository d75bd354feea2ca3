# SPDX-License-Identifier: Apache-2.0
"""Whole layers of 8-bit codes on a GPU, by the op ``torch.ops.svsk.int8_matmul``."""

from collections.abc import Callable
from typing import Any, Final

import torch

from svsk_kernels.codebook import unpack_bytes
from svsk_kernels.gpu.matmul_op import device_obstacle
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.table_rows import TableRows
from svsk_kernels.tile_grid import ceil_div

__all__ = ["Int8Kernel"]

_BLOCK_N: Final = 64
_BLOCKS_M: Final = (16, 64)
"""Tokens per program: the fewest a matrix product takes, and more where there are more."""


class Int8Kernel:
    """Runs a layer of codebook ``int8``; a :class:`svsk_kernels.layer_kernel.LayerKernel`.

    Args:
        spec: the layer.
        device: where it runs.

    Raises:
        ValueError: the kernel does not take such a layer there.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        obstacle = self.obstacle(spec, device)
        if obstacle:
            raise ValueError(obstacle)
        self.spec = spec
        self.table = TableRows(spec)

    @staticmethod
    def obstacle(spec: LayerSpec, device: torch.device) -> str | None:
        """Why the kernel does not take a layer; None when it does."""
        if spec.codebook != "int8":
            return "codes have 4 bits, the kernel takes 8"
        if spec.k % spec.group_size:
            return f"{spec.k} columns per rank, no whole groups of {spec.group_size}"
        return device_obstacle(spec.dtype, device)

    def prepare(self, layer: Any) -> None:
        """Replace the parameters by int8 codes [N, K] and scales [K / g, N]; compile."""
        tensors = {
            "weight_packed": unpack_bytes(layer.weight_packed.data),
            "weight_scale": layer.weight_scale.data.T.contiguous(),
        }
        replace_parameters(layer, tensors)
        bias = getattr(layer, "bias", None)
        for some in (None,) if bias is None else (bias, None):
            for m in (1, _BLOCKS_M[0] + 1):
                x = torch.zeros(m, self.spec.k, dtype=self.spec.dtype)
                self(layer, x.to(layer.weight_packed.device), some)

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        y: torch.Tensor = torch.ops.svsk.int8_matmul(
            x, layer.weight_packed, layer.weight_scale, bias, self.spec.batch_invariant
        )
        return y

    def rows(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [M, K] of the weight, of the layer's dtype."""
        return self.table(layer, ids, layer.weight_packed[ids], layer.weight_scale[:, ids].T)


def _int8_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    invariant: bool,
) -> torch.Tensor:
    from svsk_kernels.gpu.prepared_launch import current

    (m, k), n = x.shape, codes.shape[0]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    stride = x.stride(0) if m > 1 else k
    # What Triton compiles for: m alone may be any number.
    key = (x.dtype, None if bias is None else bias.dtype, n, k, stride, scale.shape[0])
    launches = _prepared.get(key)
    if launches is None:
        launches = _prepared[key] = _prepare(x.dtype, k // scale.shape[0])
    few = m <= _BLOCKS_M[0] and not invariant
    block_m, launch = _BLOCKS_M[not few], launches[not few]
    addresses = x.data_ptr() | codes.data_ptr() | scale.data_ptr()
    addresses |= 0 if bias is None else bias.data_ptr()
    grid = (ceil_div(m, block_m), ceil_div(n, _BLOCK_N), 1)
    launch(current(), grid, (x, codes, scale, bias, y, m, n, k, stride), not addresses % 16)
    return y


_Launch = Callable[..., None]

_prepared: Final[dict[tuple[object, ...], tuple[_Launch, ...]]] = {}
"""Launches of either number of tokens per program."""


def _prepare(dtype: torch.dtype, group_size: int) -> tuple[_Launch, ...]:
    from svsk_kernels.gpu.int8_product import int8_kernel
    from svsk_kernels.gpu.launch import product_type
    from svsk_kernels.gpu.prepared_launch import PreparedLaunch

    constants = {
        "BLOCK_N": _BLOCK_N,
        "GROUP": group_size,
        "DTYPE": product_type(dtype),
        "STAGES": 3,
    }
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return tuple(
        PreparedLaunch(int8_kernel, {"BLOCK_M": block_m} | constants, options)
        for block_m in _BLOCKS_M
    )


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    invariant: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


_library = torch.library.Library("svsk", "FRAGMENT")
_library.define(
    "int8_matmul(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool invariant) -> Tensor"
)
_library.impl("int8_matmul", _int8_matmul, "CompositeExplicitAutograd")
torch.library.register_fake("svsk::int8_matmul", _fake, lib=_library)
