# SPDX-License-Identifier: Apache-2.0
"""Base quantisers and sidecar fits: plain functions of tensors."""

from svsk_offline.quantizers.activation_aware import channel_importance, quantize_aa
from svsk_offline.quantizers.diagonal_sidecar import Sidecar, fit_diagonal_sidecar
from svsk_offline.quantizers.rounding import nearest_codes

__all__ = [
    "Sidecar",
    "channel_importance",
    "fit_diagonal_sidecar",
    "nearest_codes",
    "quantize_aa",
]
