# SPDX-License-Identifier: Apache-2.0
"""SVSK checkpoints in transformers: importing this package registers the method with it."""

from svsk_vllm.hf.quantizer import SvskHfConfig, SvskHfQuantizer, register_with_transformers

__all__ = ["SvskHfConfig", "SvskHfQuantizer", "register_with_transformers"]
