# SPDX-License-Identifier: Apache-2.0
"""How good a model is: ``evaluate`` scores a text, ``benchmark`` runs lm-eval's tasks.

``svsk_eval.bench`` is the folder behind the latter, so the function has another name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svsk_eval.api import Benchmark, benchmark
    from svsk_eval.text.metrics import EvalResult
    from svsk_eval.text.scoring import evaluate

__all__ = ["Benchmark", "EvalResult", "benchmark", "evaluate"]

_FILE_OF = {
    "Benchmark": "api",
    "EvalResult": "text.metrics",
    "benchmark": "api",
    "evaluate": "text.scoring",
}


def __getattr__(name: str) -> Any:
    """Import a name's file, and torch with it, when it is first asked for."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"svsk_eval.{_FILE_OF[name]}"), name)
