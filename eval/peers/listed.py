# SPDX-License-Identifier: Apache-2.0
"""The quantisers of other projects that can be compared, and how each is run."""

from dataclasses import dataclass
from typing import Any

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True)
class Peer:
    """A quantiser that can be compared."""

    folder: str  # beside this file, with requirements.txt and quantize.py
    title: str
    settings: dict[str, Any]
    grouped: bool = True  # whether it takes a group size


PEERS = {
    "gptq": Peer("llm_compressor", "llm-compressor GPTQ", {"scheme": "W4A16", "dtype": "bfloat16"}),
    "awq": Peer(
        "llm_compressor",
        "llm-compressor AWQ",
        {"scheme": "W4A16_ASYM", "dtype": "bfloat16", "duo_scaling": "both"},
    ),
    "auto-round": Peer(
        "auto_round", "auto-round", {"scheme": "W4A16", "iters": 200, "lr": None, "batch_size": 8}
    ),
    "auto-round-light": Peer(
        "auto_round",
        "auto-round, its light recipe",
        {"scheme": "W4A16", "iters": 50, "lr": 5e-3, "batch_size": 8},
    ),
    "gguf": Peer(
        "gguf", "llama.cpp Q4_K_M", {"file_type": "Q4_K_M", "imatrix": False}, grouped=False
    ),
    "gguf-imatrix": Peer(
        "gguf",
        "llama.cpp Q4_K_M, importance matrix",
        {"file_type": "Q4_K_M", "imatrix": True},
        grouped=False,
    ),
    "gguf-iq4-nl": Peer(
        "gguf",
        "llama.cpp IQ4_NL, importance matrix",
        {"file_type": "IQ4_NL", "imatrix": True},
        grouped=False,
    ),
    "gguf-iq4-xs": Peer(
        "gguf",
        "llama.cpp IQ4_XS, importance matrix",
        {"file_type": "IQ4_XS", "imatrix": True},
        grouped=False,
    ),
    "nf4": Peer(
        "bitsandbytes",
        "bitsandbytes nf4, double quantisation",
        {"quant_type": "nf4", "double_quantization": True},
        grouped=False,
    ),
    "gguf-f32": Peer(
        "gguf", "GGUF in float32, a check of the conversion", {"file_type": "F32"}, grouped=False
    ),
}
