# SPDX-License-Identifier: Apache-2.0
"""Base quantisers and sidecar fits: plain functions of tensors."""
