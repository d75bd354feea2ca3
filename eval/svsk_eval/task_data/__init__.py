# SPDX-License-Identifier: Apache-2.0
"""What the task files in ``eval/tasks`` name: documents, filters and metrics.

Nothing slow is imported before a function is called.
"""

from svsk_eval.task_data.documents import DATA_VARIABLE, benchmark_documents, shipped_documents
from svsk_eval.task_data.folder import task_manager, tasks_folder

__all__ = [
    "DATA_VARIABLE",
    "benchmark_documents",
    "shipped_documents",
    "task_manager",
    "tasks_folder",
]
