# SPDX-License-Identifier: Apache-2.0
"""The modules of the peers, and the tensors of a model of one block."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

EVAL = Path(__file__).resolve().parents[3] / "eval"
if str(EVAL) not in sys.path:
    sys.path.append(str(EVAL))  # `peers` is not part of the installed package

common: Any = importlib.import_module("peers.common")
environment: Any = importlib.import_module("peers.environment")
run: Any = importlib.import_module("peers.run")

LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
]


def block(number: int) -> list[str]:
    return [f"model.layers.{number}.{linear}.weight" for linear in LINEARS]


def reference() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(8, 64, dtype=torch.bfloat16) for name in block(0)}
    tensors["model.embed_tokens.weight"] = torch.randn(16, 64, dtype=torch.bfloat16)
    tensors["model.layers.0.input_layernorm.weight"] = torch.randn(64, dtype=torch.bfloat16)
    return tensors
