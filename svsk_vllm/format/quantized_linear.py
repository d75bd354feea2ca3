# SPDX-License-Identifier: Apache-2.0
"""A quantised linear in memory, its stored form, and the weight it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from svsk_kernels.codebook import code_values
from svsk_kernels.naive import PlainLinear
from svsk_vllm.format import suffixes as names
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.group_scales import (
    ONE_LEVEL,
    join_scales,
    pack_scale_codes,
    row_scale_problem,
    split_scales,
    unpack_scale_codes,
)
from svsk_vllm.format.hot_rows import hot_rows_problem, join_rows, split_rows
from svsk_vllm.format.packing import pack_codes, pack_factors, unpack_codes, unpack_factors
from svsk_vllm.format.spec import LinearSpec, TensorSpec

__all__ = ["QuantizedLinear", "dequantize", "restored_weight"]


@dataclass(frozen=True)
class QuantizedLinear:
    """Unpacked tensors of a quantised linear.

    A, B: tile rows and columns of the grid, r: rank, g: group size.

    ``u``, ``v`` and ``gain`` are None when the rank is 0, ``hot`` where no row is hot.
    """

    spec: LinearSpec
    codes: torch.Tensor  # int8 [N, K], values in [-8, 7], or of 8 bits
    scale: torch.Tensor  # scale dtype [N, K / g], multiplied out where it is stored in two levels
    u: torch.Tensor | None = None  # int8 [N, B, r]
    v: torch.Tensor | None = None  # int8 [A, r, K]
    gain: torch.Tensor | None = None  # float32 [A, B, r]
    hot: torch.Tensor | None = None  # int32 [h], ascending: the rows that have codes of 8 bits

    @property
    def plain(self) -> PlainLinear:
        """The same tensors without the checkpoint's names, as the kernels' reference takes them."""
        spec = self.spec
        codebook, bits = spec.scheme.weights.joined_codebook, spec.scheme.sidecar.num_bits
        return PlainLinear(
            self.codes, self.scale, codebook, spec.grid, self.u, self.v, self.gain, bits
        )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Stored tensors by full name, checked against the specification.

        Raises:
            SvskFormatError: a tensor's dtype, shape or range is not what the scheme asks for.
        """
        try:
            stored = self._stored_base()
            if self.u is not None and self.v is not None and self.gain is not None:
                bits = self.spec.factor_bits
                stored[names.SIDECAR_U] = pack_factors(self.u, bits)
                stored[names.SIDECAR_V] = pack_factors(self.v, bits)
                stored[names.SIDECAR_GAIN] = self.gain
        except SvskFormatError as error:
            raise SvskFormatError(f"{self.spec.name}: {error}") from error
        problems = tensor_problems(self.spec, stored)
        if problems:
            raise SvskFormatError("; ".join(problems))
        return {
            f"{self.spec.name}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()
        }

    def _stored_base(self) -> dict[str, torch.Tensor]:
        bits, num_bits = self.spec.scheme.weights.scale_bits, self.spec.scheme.weights.num_bits
        if self.hot is not None:
            codes, hot_codes = split_rows(self.codes, self.hot)
            scale, hot_scale = split_rows(self.scale, self.hot)
            return {
                names.WEIGHT_PACKED: pack_codes(codes, num_bits),
                names.WEIGHT_SCALE: scale,
                names.WEIGHT_HOT_ROWS: self.hot,
                names.WEIGHT_HOT_PACKED: pack_codes(hot_codes, 8),
                names.WEIGHT_HOT_SCALE: hot_scale,
            }
        packed = {names.WEIGHT_PACKED: pack_codes(self.codes, num_bits)}
        if bits == ONE_LEVEL:
            return {**packed, names.WEIGHT_SCALE: self.scale}
        codes, row_scale = split_scales(self.scale, bits)
        return {
            **packed,
            names.WEIGHT_SCALE: pack_scale_codes(codes, bits),
            names.WEIGHT_ROW_SCALE: row_scale,
        }

    @classmethod
    def from_tensors(
        cls, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]
    ) -> "QuantizedLinear":
        """Unpack stored tensors, given by full name.

        Raises:
            SvskFormatError: a tensor is missing, has the wrong dtype or shape, or row scales or hot
                rows are not what the format allows.
        """
        prefix = f"{spec.name}."
        stored = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        problems = tensor_problems(spec, stored)
        if problems:
            raise SvskFormatError("; ".join(problems))
        codes = unpack_codes(stored[names.WEIGHT_PACKED], spec.k, spec.scheme.weights.num_bits)
        scale = read_scales(spec, stored)
        if spec.scheme.weights.hot_rows:
            hot = stored[names.WEIGHT_HOT_ROWS]
            hot_codes = unpack_codes(stored[names.WEIGHT_HOT_PACKED], spec.k, 8)
            return cls(spec, join_rows(codes, hot_codes, hot), scale, hot=hot)
        if not spec.rank:
            return cls(spec, codes, scale)
        return cls(
            spec,
            codes,
            scale,
            unpack_factors(stored[names.SIDECAR_U], spec.factor_bits),
            unpack_factors(stored[names.SIDECAR_V], spec.factor_bits),
            stored[names.SIDECAR_GAIN],
        )


def read_scales(spec: LinearSpec, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scales of all groups, [N, K / g] of the scale dtype, from stored tensors by suffix.

    Raises:
        SvskFormatError: row scales or hot rows are not what the format allows.
    """
    bits = spec.scheme.weights.scale_bits
    if spec.scheme.weights.hot_rows:
        hot = stored[names.WEIGHT_HOT_ROWS]
        if problem := hot_rows_problem(hot, spec.n):
            raise _damaged(spec, names.WEIGHT_HOT_ROWS, problem)
        return join_rows(stored[names.WEIGHT_SCALE], stored[names.WEIGHT_HOT_SCALE], hot)
    if bits == ONE_LEVEL:
        return stored[names.WEIGHT_SCALE]
    row_scale = stored[names.WEIGHT_ROW_SCALE]
    if problem := row_scale_problem(row_scale, bits):
        raise _damaged(spec, names.WEIGHT_ROW_SCALE, problem)
    codes = unpack_scale_codes(stored[names.WEIGHT_SCALE], bits, spec.k // spec.group_size)
    return join_scales(codes, row_scale)


def _damaged(spec: LinearSpec, suffix: str, problem: str) -> SvskFormatError:
    return SvskFormatError(
        f"{spec.name}.{suffix}: {problem}. The file is damaged: copy or download it again."
    )


def tensor_problems(spec: LinearSpec, stored: Mapping[str, torch.Tensor | TensorSpec]) -> list[str]:
    """What is wrong with the tensors of one linear, or their specifications, by suffix."""
    problems = []
    expected = spec.tensors()
    for suffix, want in expected.items():
        tensor = stored.get(suffix)
        if tensor is None:
            problems.append(
                f"{spec.name}.{suffix}: missing, expected {want.dtype} {list(want.shape)}"
            )
        elif tensor.dtype != want.dtype or tuple(tensor.shape) != want.shape:
            problems.append(
                f"{spec.name}.{suffix}: {tensor.dtype} {list(tensor.shape)}, expected {want.dtype}"
                f" {list(want.shape)}"
            )
    problems += [
        f"{spec.name}.{suffix}: unexpected, the scheme has rank {spec.rank}, scales of"
        f" {spec.scheme.weights.scale_bits} bits and {spec.scheme.weights.hot_rows} hot rows"
        for suffix in names.SUFFIXES
        if suffix in stored and suffix not in expected
    ]
    return problems


def dequantize(
    linear: QuantizedLinear, *, with_sidecar: bool = True, rows: range | None = None
) -> torch.Tensor:
    """The weight a quantised linear stands for.

    ``W_hat`` of docs/format.md, the definition everything is tested on.

    ``W_hat[n, k] = scale[n, k // g] * c(q[n, k]) + sum_i gain[a, b, i] * u[n, b, i] * v[a, i, k]``
    with ``a = n // tile_m`` and ``b = k // tile_n``, in float32.

    Args:
        linear: the quantised linear.
        with_sidecar: False leaves the second term out.
        rows: these in turn; None for all N. Tables are too large for float32 as a whole.

    Returns:
        float32 [N, K], or [rows, K].
    """
    spec = linear.spec
    first, last = (0, spec.n) if rows is None else (rows.start, rows.stop)
    values = code_values(linear.codes[first:last], spec.scheme.weights.joined_codebook)
    groups = values.view(last - first, -1, spec.group_size)
    weight = (groups * linear.scale[first:last].float().unsqueeze(-1)).view(-1, spec.k)
    if not with_sidecar or linear.u is None or linear.v is None or linear.gain is None:
        return weight
    for a in range(spec.grid.num_row_tiles):
        tile = spec.grid.row_slice(a)
        start, stop = max(first, tile.start), min(last, tile.stop)
        if start >= stop:
            continue
        for b in range(spec.grid.num_col_tiles):
            cols = spec.grid.col_slice(b)
            u = linear.u[start:stop, b].float() * linear.gain[a, b]
            weight[start - first : stop - first, cols] += u @ linear.v[a, :, cols].float()
    return weight


def restored_weight(linear: QuantizedLinear) -> torch.Tensor:
    """The weight a dense copy of the model stores: ``W_hat`` rounded once to the model's dtype.

    ``svsk restore`` writes it and the transformers loader loads it, so that both give the same
    logits bit for bit. A loader that is asked for another dtype casts this tensor, not the float32
    ``W_hat``, as it would cast what the restored folder stores.

    Args:
        linear: the quantised linear; its scales have the model's dtype.

    Returns:
        [N, K] in the dtype of the scales.
    """
    return dequantize(linear).to(linear.spec.scale_dtype)
