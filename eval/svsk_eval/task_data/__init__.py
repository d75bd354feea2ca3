# SPDX-License-Identifier: Apache-2.0
"""Documents, filters and metrics of the lm-eval tasks in ``eval/tasks``.

lm-eval imports ``eval/tasks/utils.py`` by its path; that file re-exports what is here. Nothing slow
is imported before a function is called.
"""

from svsk_eval.task_data.code_tasks import (
    estimate_pass_at_k,
    first_code_block,
    humaneval_instruct_programs,
    humaneval_programs,
    mbpp_instruct_programs,
    mbpp_programs,
    pass_at_k,
    require_sandbox,
)
from svsk_eval.task_data.folder import load_task, task_manager, tasks_folder
from svsk_eval.task_data.loaders import (
    arc_challenge,
    gsm8k,
    hellaswag,
    humaneval,
    mbpp,
    smoke_arithmetic,
    smoke_copy,
    smoke_facts,
    smoke_python,
)
from svsk_eval.task_data.sources import (
    BENCHMARKS,
    DATA_VARIABLE,
    Benchmark,
    Split,
    load_documents,
    local_folder,
    read_rows,
)

__all__ = [
    "BENCHMARKS",
    "DATA_VARIABLE",
    "Benchmark",
    "Split",
    "arc_challenge",
    "estimate_pass_at_k",
    "first_code_block",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "humaneval_instruct_programs",
    "humaneval_programs",
    "load_documents",
    "load_task",
    "local_folder",
    "mbpp",
    "mbpp_instruct_programs",
    "mbpp_programs",
    "pass_at_k",
    "read_rows",
    "require_sandbox",
    "smoke_arithmetic",
    "smoke_copy",
    "smoke_facts",
    "smoke_python",
    "task_manager",
    "tasks_folder",
]
