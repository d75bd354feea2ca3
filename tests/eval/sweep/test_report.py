# SPDX-License-Identifier: Apache-2.0
"""Table, figure and pages of sweeps: what stands in them, and what files are refused."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svsk_eval.errors import EvalError
from svsk_eval.report.cells import DASH
from svsk_eval.sweep.figure import sweep_figure
from svsk_eval.sweep.page import app as page_app
from svsk_eval.sweep.page import filled
from svsk_eval.sweep.schema import SweepReport, SweepRow, load_sweep
from svsk_eval.sweep.tables import failures, sweep_table
from tests.eval.support import ROOT
from tests.eval.sweep.sweeps import report, row, with_tasks

FAILED = SweepRow(label="awq", title="awq", kind="peer", error="awq: no memory")
MARKERS = "<!-- sweep a.json b.json, figure f.svg -->\nold\n<!-- end of sweep -->"
PAGES = [
    page
    for page in sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
    if "\n<!-- sweep " in page.read_text(encoding="utf-8")
]


def cells(*reports: SweepReport) -> list[list[str]]:
    return [list(line) for group in sweep_table(reports, "t").groups for line in group]


class TestTable:
    def test_one_sweep(self) -> None:
        table = sweep_table([report(row("a"), FAILED)], "t")
        assert [column.heading for column in table.columns] == [
            "model",
            "bits, linears",
            "bits, all",
            "size",
            "KL",
            "delta NLL",
            "top-1",
            "quantised in",
        ]
        reference, only = cells(report(row("a"), FAILED))
        assert reference[:5] == ["the reference (reference)", "16.0000", "17.0000", "3.0 MiB", DASH]
        assert only == [
            "the a",
            "4.5000",
            "5.5000",
            "3.0 MiB",
            "0.0100 ± 0.0005",
            "+0.0120 ± 0.0030",
            "0.9100 ± 0.0100",
            "61 s",
        ]
        assert "Recovery" not in table.note

    def test_tasks_have_columns(self) -> None:
        table = sweep_table([report(with_tasks(row("a"), 0.45), row("b"))], "t")
        assert [column.heading for column in table.columns][-3:-1] == ["gsm8k", "recovery"]
        lines = [list(line) for group in table.groups for line in group]
        assert lines[1][-3:-1] == ["0.4500 ± 0.0200", "90.0%"]
        assert lines[2][-3:-1] == [DASH, DASH]
        assert "Recovery" in table.note

    def test_several_sweeps_are_groups(self) -> None:
        table = sweep_table([report(row("a")), report(row("a"), model="dithered")], "t")
        assert table.columns[0].heading == "reference"
        assert [[line[0] for line in group] for group in table.groups] == [
            ["tiny"] * 2,
            ["dithered"] * 2,
        ]

    def test_what_failed_is_named(self) -> None:
        assert failures(report(row("a"), FAILED)) == ["awq: awq: no memory"]


class TestFigure:
    def texts(self, *rows: SweepRow) -> list[str]:
        plot = sweep_figure([report(*rows)])
        assert plot is not None
        root = ElementTree.fromstring(plot.svg)
        return [text for node in root.iter() if (text := (node.text or "").strip())]

    def test_budgets_are_one_line_and_peers_have_names(self) -> None:
        texts = self.texts(
            row("svsk-4.25", bits=4.25, kl=0.02),
            row("svsk-4.62", bits=4.62),
            row("gptq", "peer", kl=0.1),
        )
        assert texts.count("SVSK") == 1
        assert "the gptq" in texts
        assert not any("the svsk" in text for text in texts)
        assert "mean recovery" not in texts

    def test_recovery_is_drawn_where_there_are_tasks(self) -> None:
        assert "mean recovery" in self.texts(with_tasks(row("svsk-4.25"), 0.4), row("b"))

    def test_the_same_report_gives_the_same_file(self) -> None:
        plots = [sweep_figure([report(row("a"))]) for _ in range(2)]
        assert plots[0] == plots[1]

    @pytest.mark.filterwarnings("error")
    def test_a_model_that_is_its_reference_is_drawn_too(self) -> None:
        assert "0.000" in self.texts(row("a", kl=0.0), row("b", kl=0.02))

    def test_nothing_scored_is_no_figure(self) -> None:
        assert sweep_figure([report(FAILED)]) is None


class TestPage:
    @pytest.fixture
    def page(self, tmp_path: Path) -> Path:
        (tmp_path / "a.json").write_text(report(row("a"), FAILED).model_dump_json())
        (tmp_path / "b.json").write_text(report(row("b"), model="other").model_dump_json())
        (tmp_path / "p.md").write_text(f"# Title\n\n{MARKERS}\n\nAfter.\n")
        return tmp_path / "p.md"

    def test_is_filled_and_stays_the_same(self, page: Path) -> None:
        result = CliRunner().invoke(page_app, [str(page)])
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert text.startswith("# Title\n\n<!-- sweep a.json b.json, figure f.svg -->\n\n| ref")
        assert text.endswith("<!-- end of sweep -->\n\nAfter.\n")
        assert "old" not in text
        assert "| other | the b | 4.5000 |" in text
        assert "![Quality against size](f.svg)" in text
        assert "Could not be done: awq: awq: no memory" in text
        assert "calibrated on 24 x 64 tokens of c.txt, scored on 3 x 64 of t.txt" in text
        assert "the b" in (page.parent / "f.svg").read_text()
        assert filled(page)[0] == text

    @pytest.mark.parametrize("changed", [{"chunks": 4}, {"tables": "reference"}])
    def test_other_text_needs_another_table(self, page: Path, changed: dict[str, Any]) -> None:
        (page.parent / "b.json").write_text(report(row("b"), **changed).model_dump_json())
        with pytest.raises(EvalError, match=r"b.json cannot share a table with a.json"):
            filled(page)

    def test_files_of_one_reference_share_its_rows(self, page: Path) -> None:
        (page.parent / "b.json").write_text(report(row("b"), row("a")).model_dump_json())
        text = filled(page)[0]
        assert text.count("(reference)") == 1
        assert [line.split("|")[1] for line in text.splitlines() if line.startswith("| the")] == [
            " the reference (reference) ",
            " the a ",
            " the b ",
        ]
        (page.parent / "b.json").write_text(report(row("a", kl=0.3)).model_dump_json())
        with pytest.raises(EvalError, match="a: is in two files of tiny"):
            filled(page)

    def test_a_page_without_a_part(self, page: Path) -> None:
        page.write_text("# Title\n")
        with pytest.raises(EvalError, match="has no part to fill"):
            filled(page)
        with pytest.raises(
            EvalError, match=r"no\.md: cannot read it \(No .*\)\. Name a page with a part to fill"
        ):
            filled(page.parent / "no.md")
        result = CliRunner().invoke(page_app, [str(page)])
        assert result.exit_code == 1
        assert "error:" in result.output

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_committed_pages_say_what_their_files_say(self, page: Path) -> None:
        text, figures = filled(page)
        assert page.read_text(encoding="utf-8") == text
        # versions of matplotlib draw differently
        assert all((page.parent / name).is_file() for name in figures)


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        written = report(with_tasks(row("a"), 0.4), FAILED)
        (tmp_path / "s.json").write_text(written.model_dump_json())
        assert load_sweep(tmp_path / "s.json") == written

    def test_refuses_others(self, tmp_path: Path) -> None:
        with pytest.raises(
            EvalError,
            match=r"s\.json: cannot read it \(No .*\)\. Name the one that `svsk sweep`",
        ):
            load_sweep(tmp_path / "s.json")
        (tmp_path / "s.json").write_text('{"kind": "svsk-bench"}')
        with pytest.raises(EvalError, match=r"not a sweep.json of this version"):
            load_sweep(tmp_path / "s.json")

    def test_the_reference_comes_first_and_labels_are_unique(self) -> None:
        with pytest.raises(ValueError, match="labels are not unique: reference, a, a"):
            report(row("a"), row("a"))
        raw = report(row("a")).model_dump()
        raw["rows"] = raw["rows"][::-1]
        with pytest.raises(ValueError, match="first row"):
            SweepReport.model_validate(raw)
