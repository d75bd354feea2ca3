# SPDX-License-Identifier: Apache-2.0
"""The offline tool.

From dense Hugging Face folders to SVSK checkpoints. ``svsk_offline.quantize`` is its function.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svsk_offline.pipeline import quantize

__all__ = ["quantize"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and with it torch, when it is first asked for."""
    if name == "quantize":
        from svsk_offline.pipeline import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
