# SPDX-License-Identifier: Apache-2.0
"""The config.json of a checkpoint, and of the dense model that it was made of."""

from collections.abc import Mapping
from typing import Any, Final

from svsk_vllm.format.config import SvskCheckpointConfig

__all__ = ["STOCK_LOADER_KEY", "STOCK_LOADER_NOTE", "declared", "undeclared"]

STOCK_LOADER_KEY: Final = "transformers_weights"
STOCK_LOADER_NOTE: Final = (
    "SVSK checkpoint. Run `import svsk_vllm.hf` before from_pretrained() (pip install svsk-vllm),"
    " serve it with vLLM and svsk-vllm installed, or write a dense folder with `svsk restore`."
)
"""What config.json says under the key where transformers looks for the name of the weights' file.

transformers without ``svsk_vllm.hf`` skips a quantisation method that it does not know, with a
warning, and leaves every quantised linear at random values. A name that is no safetensors file
makes it stop and show the name instead.
"""


def declared(hf_config: Mapping[str, Any], quantization: SvskCheckpointConfig) -> dict[str, Any]:
    """The config.json of a checkpoint, from that of the dense model."""
    dense = undeclared(hf_config)
    return {
        **dense,
        STOCK_LOADER_KEY: STOCK_LOADER_NOTE,
        "quantization_config": quantization.to_dict(),
    }


def undeclared(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the dense model, from that of a checkpoint."""
    return {
        key: value
        for key, value in hf_config.items()
        if key not in (STOCK_LOADER_KEY, "quantization_config")
    }
