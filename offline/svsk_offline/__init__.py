# SPDX-License-Identifier: Apache-2.0
"""The offline tool.

From dense Hugging Face folders to SVSK checkpoints: ``quantize`` makes one, ``inspect`` says what
one holds, ``load_recipe`` gives a ``Recipe`` by name or file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svsk_offline.api import Inspection, inspect
    from svsk_offline.pipeline import Progress, QuantizationResult, quantize
    from svsk_offline.recipe import Recipe, load_recipe

__all__ = [
    "Inspection",
    "Progress",
    "QuantizationResult",
    "Recipe",
    "inspect",
    "load_recipe",
    "quantize",
]

_FILES = {
    "api": ("Inspection", "inspect"),
    "pipeline": ("Progress", "QuantizationResult", "quantize"),
    "recipe": ("Recipe", "load_recipe"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name's file, and with ``quantize`` torch, when it is first asked for."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"svsk_offline.{_FILE_OF[name]}"), name)
