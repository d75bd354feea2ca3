# SPDX-License-Identifier: Apache-2.0
"""The choices for a matrix, measured and given in one step."""

import torch

from svsk_offline.planning.bit_budget import Choice
from svsk_offline.planning.error_curves import CurveSettings, measure_curve
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AllocationArgs, AlternatingArgs
from svsk_vllm.format import LinearSpec


def choices_of(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    row_energy: torch.Tensor,
    spec: LinearSpec,
    args: AlternatingArgs,
    allocation: AllocationArgs,
    measured: torch.Tensor | None = None,
) -> list[Choice]:
    """As :func:`measure_curve`, then :meth:`ErrorCurve.choices`."""
    metric = RowMetric.diagonal(row_energy)
    settings = CurveSettings.of(spec.scheme, args, allocation, spec.scale_dtype)
    curve = measure_curve(weight, hessian, row_energy, metric, settings, measured)
    return curve.choices(spec, args.rounds, allocation)
