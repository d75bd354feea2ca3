# SPDX-License-Identifier: Apache-2.0
"""The folder of the task files."""

from importlib import metadata
from pathlib import Path
from typing import Any, Final

from svsk_eval.errors import EvalError

__all__ = ["task_manager", "tasks_folder"]

_MARKER: Final = "svsk_smoke.yaml"
_SHARED: Final = "share/svsk_vllm/tasks"
_DISTRIBUTION: Final = "svsk-vllm"


def tasks_folder() -> Path:
    """The folder for lm-eval's ``--include_path``.

    In a checkout, editable installations included, it lies beside this package's source; a wheel
    installs it under ``share/svsk_vllm/tasks`` of the environment.

    Raises:
        EvalError: it is in neither place.
    """
    # eval/ of a checkout, else site-packages or pip's --target
    source = Path(__file__).resolve().parents[2]
    places = [source / "tasks", source / _SHARED, *_recorded()]
    for place in places:
        if (place / _MARKER).is_file():
            return place
    raise EvalError(
        f"The task files are in none of {', '.join(map(str, places))}. Install {_DISTRIBUTION}"
        " again, or run from a checkout."
    )


def _recorded() -> list[Path]:
    """Where the installer says it put the task files; it depends on the kind of environment."""
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    markers = [file for file in files if file.as_posix().endswith(f"{_SHARED}/{_MARKER}")]
    return [Path(str(file.locate())).resolve().parent for file in markers]


def task_manager(*, include_defaults: bool = True) -> Any:
    """An ``lm_eval.tasks.TaskManager`` that knows our tasks.

    Args:
        include_defaults: index lm-eval's own tasks as well, which takes seconds.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_folder()), include_defaults=include_defaults)
