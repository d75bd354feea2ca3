# SPDX-License-Identifier: Apache-2.0
"""Values of the evaluation's options that are one of a few.

Names that packages of their own, or torch, stand behind are listed once more here, so that a
command and a shell know them at once; a test compares.
"""

from typing import Final

__all__ = ["ACTIVATIONS", "DTYPES", "ENGINES", "KV_KINDS", "PEERS", "TABLES", "task_names"]

DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
ENGINES: Final = ("vllm", "hf")
TABLES: Final = ("own", "reference")

ACTIVATIONS: Final = ("int8", "int8-g64", "fp8", "nvfp4")
"""Keys of ``svsk_eval.text.activations.ACTIVATIONS``."""

KV_KINDS: Final = (
    "kpc32",
    *("raw", "q8_0", "q4_0", "q4_1", "int4"),
    *("q8_0-rot", "q4_0-rot", "q4_1-rot"),
)
"""Keys of ``svsk_vllm.kv_cache.KEY_KINDS``."""

PEERS: Final = (
    *("gptq", "awq", "auto-round", "auto-round-light", "nf4"),
    *("gguf", "gguf-imatrix", "gguf-iq4-nl", "gguf-iq4-xs", "gguf-f32"),
)
"""Keys of ``PEERS`` in eval/peers/listed.py."""


def task_names() -> list[str]:
    """Names of the tasks and groups that come with the package, those of their files."""
    from svsk_eval.task_data.folder import tasks_folder

    return sorted(path.stem for path in tasks_folder().glob("*.yaml"))
