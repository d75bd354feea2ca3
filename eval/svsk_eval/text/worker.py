# SPDX-License-Identifier: Apache-2.0
"""One model's figures on a text, in a process of its own: ``python -m svsk_eval.text.worker``.

The request's folder gets ``scores.json``, what ``svsk eval --json`` writes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from svsk_eval.processes import answer_request
from svsk_eval.text.models import silence_progress_bars
from svsk_eval.text.request import TextRequest, score
from svsk_offline.storage.atomic import write_json

__all__ = ["main"]


def main(request_file: Path, report: Callable[..., None]) -> None:
    """Score the text; ``report`` gets the chunks ``done`` and the ``total``."""
    request = TextRequest.model_validate_json(request_file.read_bytes())
    silence_progress_bars()
    result: Any = score(request, lambda done, total: report(done=done, total=total))
    write_json(request_file.with_name("scores.json"), result.to_json())


if __name__ == "__main__":
    answer_request(main)
