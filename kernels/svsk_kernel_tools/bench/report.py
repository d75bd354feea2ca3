# SPDX-License-Identifier: Apache-2.0
"""Results on disk, complete after every step, and as Markdown.

The file is one JSON object: ``schema_version``, ``machine`` (of the latest run), and ``records``.
Every record has a ``kind`` and a ``group``; the records of a group are written together. Kinds:

- ``check``: ``what``, ``error`` (relative), ``problems``;
- ``time``: ``shape n k m variant kernel dispatched choice bytes copies launches``, then ``us q1
  q3`` (microseconds), ``gbs`` (needed bytes over time, GB/s), ``of_copy`` (over the bandwidth of a
  copy), ``over_cublas``, ``over_split`` (how many times faster) and ``sidecar_overhead`` (1 = twice
  the time of the base alone), or ``error``;
- ``tune``: ``shape n k m max_m choice``, then ``us q1 q3`` or ``error``;
- ``note``: ``text``.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from svsk_kernel_tools.bench.errors import BenchError
from svsk_offline.storage.atomic import write_json

__all__ = ["Report", "markdown", "table"]

_SAME: Final = ("gpu", "torch", "triton", "source")
_HEADER: Final = (
    "shape",
    "M",
    "kernel",
    "µs (quartiles)",
    "GB/s",
    "of copy",
    "over cuBLAS",
    "over split",
    "sidecar",
)


class Report:
    """The records of a run, written out whenever some are added.

    Args:
        path: of the JSON file, None to write none.
        machine: see :func:`svsk_kernel_tools.bench.machine.describe`.
        resume: keep what the file has, except checks that failed.

    Raises:
        BenchError: the file to resume is no report, or one of another GPU or of other code.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any], resume: bool = False) -> None:
        self.path, self.machine = path, machine
        if path is not None:  # a folder that cannot be made is told before anything is measured
            path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        if resume and path is not None and path.exists():
            earlier = _read(path)
            for name in _SAME:
                if earlier.machine.get(name) != machine.get(name):
                    raise BenchError(
                        f"{path}: {name} was {earlier.machine.get(name)}, expected"
                        f" {machine.get(name)}. Give another --json, or leave --resume out to begin"
                        " anew."
                    )
            failed = {record["group"] for record in earlier.records if record.get("problems")}
            self.records = [rec for rec in earlier.records if rec["group"] not in failed]
        self._groups = {record["group"] for record in self.records}

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Add the records of one group, and write the file."""
        new = list(records)
        self.records += new
        self._groups |= {record["group"] for record in new}
        if self.path is not None:
            content = _Content(machine=self.machine, records=self.records)
            write_json(self.path, content.model_dump())

    def note(self, text: str) -> None:
        """Add a remark, once."""
        if not any(record.get("text") == text for record in self.records):
            self.add([{"kind": "note", "group": "note", "text": text}])

    def has(self, group: str) -> bool:
        """Whether a group is complete."""
        return group in self._groups

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]


class _Content(BaseModel):
    """What the file holds."""

    schema_version: Literal[1] = 1
    machine: dict[str, Any]
    records: list[dict[str, Any]]


def _read(path: Path) -> _Content:
    try:
        return _Content.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BenchError(
            f"{path}: expected a report of schema version 1 ({error.errors()[0]['msg']})."
            " Remove it, or leave --resume out."
        ) from error


def markdown(report: Report) -> str:
    """The report as Markdown.

    The machine, the checks in a line, notes, and a table per kind of weight.
    """
    checks = report.of_kind("check")
    failed = [record for record in checks if record["problems"]]
    lines = ["# Kernel benchmark", ""]
    lines += [f"- {name}: {value}" for name, value in report.machine.items()]
    passed = f"{len(checks) - len(failed)} of {len(checks)} passed" if checks else "none made"
    lines += [f"- checks: {passed}"]
    lines += [f"- failed: {record['what']}: {'; '.join(record['problems'])}" for record in failed]
    lines += [f"- {record['text']}" for record in report.of_kind("note")]
    times = report.of_kind("time")
    for variant in dict.fromkeys(record["variant"] for record in times):
        rows = [record for record in times if record["variant"] == variant]
        lines += ["", f"## {variant}", "", *table([_cells(record) for record in rows])]
    tuned = [record for record in report.of_kind("tune") if record.get("chosen")]
    if tuned:
        lines += ["", "## Chosen", "", *_tuned(tuned)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = _HEADER) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cells(record: dict[str, Any]) -> list[str]:
    """A row of the table; the dispatched kernel is bold."""
    kernel = f"**{record['kernel']}**" if record["dispatched"] else record["kernel"]
    first = [record["shape"], str(record["m"]), kernel]
    if "us" not in record:
        reason = record.get("error", "").replace("|", "/").split("\n")[0][:60]
        return [*first, f"failed: {reason}", *[""] * (len(_HEADER) - 4)]

    def ratio(name: str, form: str) -> str:
        return format(record[name], form) if name in record else ""

    return [
        *first,
        f"{record['us']:.2f} ({record['q1']:.2f}-{record['q3']:.2f})",
        f"{record['gbs']:.0f}",
        f"{record['of_copy']:.0%}",
        ratio("over_cublas", ".2f"),
        ratio("over_split", ".2f"),
        ratio("sidecar_overhead", "+.1%"),
    ]


def _tuned(records: Sequence[dict[str, Any]]) -> list[str]:
    names = ("block_m", "block_n", "step", "num_warps", "num_stages", "split_k", "pdl", "join")
    rows = [
        [
            record["shape"],
            "more" if record["max_m"] is None else str(record["max_m"]),
            record["choice"]["kernel"],
            f"{record['us']:.2f}",
            *(str(record["choice"][name]) for name in names),
        ]
        for record in records
    ]
    return table(rows, ("shape", "M up to", "kernel", "µs", *names))
