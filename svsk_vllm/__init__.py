# SPDX-License-Identifier: Apache-2.0
"""SVSK (Structured Vector Sidecar).

4-bit weights with a tile-local low-rank sidecar, served by vLLM.

Importing this package is cheap: vllm, triton, transformers and torch are only imported by the parts
that need them.
"""

from svsk_vllm.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Register the quantisation method ``svsk`` with vLLM.

    This is the entry point of the group ``vllm.general_plugins``.

    vLLM calls it in every process it starts (API server, engine core, workers); calling it again
    does nothing.
    """
    from svsk_vllm.plugin import register_with_vllm

    register_with_vllm()
