# SPDX-License-Identifier: Apache-2.0
"""What the task files here name with ``!function utils.NAME``.

lm-eval imports this file by its path.
"""

from svsk_eval.task_data import (
    arc_challenge,
    gsm8k,
    hellaswag,
    humaneval,
    humaneval_instruct_programs,
    humaneval_programs,
    mbpp,
    mbpp_instruct_programs,
    mbpp_programs,
    pass_at_k,
    smoke_arithmetic,
    smoke_copy,
    smoke_facts,
    smoke_python,
)

__all__ = [
    "arc_challenge",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "humaneval_instruct_programs",
    "humaneval_programs",
    "mbpp",
    "mbpp_instruct_programs",
    "mbpp_programs",
    "pass_at_k",
    "smoke_arithmetic",
    "smoke_copy",
    "smoke_facts",
    "smoke_python",
]
