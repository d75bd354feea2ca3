# SPDX-License-Identifier: Apache-2.0
"""Made-up reports of ``svsk sweep``."""

from typing import Any

from svsk_eval.sweep.schema import Recovery, Size, SweepReport, SweepRow, TaskScore, TextFigures

SETTINGS: dict[str, Any] = {
    "calibration": {"source": "c.txt", "samples": 24, "seq_len": 64},
    "text": {"name": "t.txt", "sha256": "ab"},
    "chunks": 3,
    "seq_len": 64,
    "tables": "own",
}


def row(
    label: str, kind: Any = "svsk", *, bits: float = 4.5, kl: float = 0.01, **fields: Any
) -> SweepRow:
    """A row that was scored; keywords replace fields."""
    size = Size(
        bits_per_weight=bits, bits_per_weight_of_all=bits + 1, size_bytes=3 << 20, seconds=61.4
    )
    text = TextFigures(
        nll=2.0,
        nll_se=0.1,
        delta_nll=0.012,
        delta_nll_se=0.003,
        kl_mean=kl,
        kl_mean_se=kl / 20,
        top1=0.91,
        top1_se=0.01,
        per_chunk={"kl": (kl, kl, kl)},
    )
    stored: dict[str, Any] = {"title": f"the {label}", "size": size, "text": text}
    return SweepRow(**{"label": label, "kind": kind, **stored, **fields})


def report(*rows: SweepRow, model: str = "tiny", **settings: Any) -> SweepReport:
    """A report of a reference and these rows."""
    reference = row("reference", "reference", bits=16.0, text=None)
    return SweepReport(
        created="2026-11-29T19:00:00Z",
        command="svsk sweep tiny out",
        hardware="2 cores of a test",
        model=model,
        settings=SETTINGS | {"model": f"digest of {model}"} | settings,
        rows=(reference, *rows),
    )


def with_tasks(one: SweepRow, score: float) -> SweepRow:
    """A row with a score on a task, whose reference scores 0.5."""
    tasks = {"gsm8k": TaskScore(metric="exact_match", items=4, score=score, score_se=0.02)}
    recovery = Recovery(mean=score / 0.5, low=score / 0.5 - 0.1, high=score / 0.5 + 0.1)
    return one.model_copy(update={"tasks": tasks, "recovery": recovery})
