# SPDX-License-Identifier: Apache-2.0
"""Reports of task scores: console, Markdown and the HTML page."""

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from svsk_eval.report.analysis import Analysis, analyze
from svsk_eval.report.cells import DASH, Strong
from svsk_eval.report.console import print_report
from svsk_eval.report.html import html_report
from svsk_eval.report.markdown import markdown_report
from svsk_eval.report.plots import all_plots, model_style
from svsk_eval.report.schema import Generation
from svsk_eval.report.tables import HOW_TO_READ, all_tables
from tests.eval.report.reports import LABELS, TASKS, model_run, realistic, report, task_run

RIGHT = (1, 1, 1, 1, 0, 0, 1, 1)
WORSE = (1, 0, 0, 1, 0, 1, 1, 0)
NASTY = '<b>w4</b> & "q" | $x$ `y` *z* [a](b) é模'
SVG_TEXT = "{http://www.w3.org/2000/svg}text"
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(realistic(), resamples=999)


@pytest.fixture(scope="module")
def source(analysis: Analysis) -> str:
    return html_report(analysis)


def shown(analysis: Analysis, width: int = 160, terminal: bool = False) -> str:
    stream = io.StringIO()
    print_report(
        Console(file=stream, width=width, force_terminal=terminal, color_system=None), analysis
    )
    return stream.getvalue()


def small(label: str = "w4", task: str = "a", **changes: Any) -> Analysis:
    runs = [model_run("dense", [task_run(RIGHT, task)]), model_run(label, [task_run(WORSE, task)])]
    return analyze(report(runs).model_copy(update=changes))


def figures(analysis: Analysis) -> list[str]:
    """Every cell of every table."""
    tables = all_tables(analysis)
    return [cell for table in tables for group in table.groups for row in group for cell in row]


def test_every_figure_is_in_the_page(analysis: Analysis, source: str) -> None:
    page = Page(source)
    for cell in figures(analysis):
        for part in cell.split(" · "):
            assert part in page.text or part.replace("-", "\N{MINUS SIGN}") in page.text
    for words in (
        *LABELS[:4],
        *(task[0] for task in TASKS),
        *HOW_TO_READ,
        "NVIDIA H100",
        "lm_eval 0.4.9",
    ):
        assert words in page.text
    assert "svsk bench Qwen3-4B svsk-best-4.62" in page.text
    assert "max_gen_toks = 1024" in page.text
    assert "smallest task has 120 items" in page.text


def test_tables_say_what_was_computed(analysis: Analysis) -> None:
    comparison = analysis.variants[0].tasks[0]
    low, high = (getattr(comparison.score.interval, name) for name in ("low", "high"))
    expected = (
        "gsm8k_cot · n = 250",
        "svsk-best-4.62",
        f"{comparison.score.variant.value:.4f} ± {comparison.score.variant.se:.4f}",
        f"{comparison.score.difference:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{comparison.score.detectable:.4f}",
        f"{100 * comparison.score.variant.value / comparison.score.reference.value:.1f}%",
        str(comparison.score.lost),
        str(comparison.score.gained),
        f"{comparison.score.p:.3f}",
        f"{comparison.p_holm:.3f}",
    )
    tables = {table.title: table for table in all_tables(analysis)}
    assert list(tables) == ["Summary", "Over all tasks", "Tasks", "Scores", "Answers", "Text"]
    assert tables["Scores"].groups[0][1] == expected
    assert [len(group) for group in tables["Scores"].groups] == [4] * 5
    assert [group[0][0] for group in tables["Answers"].groups] == [
        "gsm8k_cot",
        "ifeval",
        "mmlu_pro_law",
    ]
    assert len(tables["Text"].groups) == 2
    assert tables["Summary"].groups[0][0][:5] == (
        "Qwen3-4B (reference)",
        "none",
        "16.00",
        "7.50 GiB",
        "bfloat16",
    )


def test_differences_stand_out_by_their_adjusted_p(analysis: Analysis) -> None:
    (scores,) = (table for table in all_tables(analysis) if table.title == "Scores")
    strong = [isinstance(row[3], Strong) for group in scores.groups for row in group[1:]]
    assert strong == [
        analysis.variants[i].tasks[t].p_holm < 0.05 for t in range(5) for i in range(3)
    ]
    assert True in strong
    assert False in strong


def test_the_page_needs_nothing_else(source: str) -> None:
    page = Page(source)
    assert page.open == []
    assert not page.tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
        "foreignObject",
    }
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    for _, name, value in page.attributes:
        if name == "src":
            assert value is not None
            assert value.startswith("data:image/svg+xml;base64,")
            ElementTree.fromstring(base64.b64decode(value.partition(",")[2]))
        assert name not in {"href", "xlink:href", "srcset", "action", "data", "poster"}
        assert not name.startswith("on")
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in source
    assert len(source.encode()) < 1_000_000


def test_the_page_is_the_same_again(analysis: Analysis, source: str) -> None:
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "axes.grid": True}
    ):  # of whoever calls it
        assert html_report(analysis) == source
    assert html_report(analyze(realistic(), resamples=999)) == source


def test_settings_of_matplotlib_are_kept(analysis: Analysis) -> None:
    with matplotlib.rc_context({"font.size": 30}):
        all_plots(analysis)
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_keep_their_text(analysis: Analysis) -> None:
    plots = {plot.name: plot for plot in all_plots(analysis)}
    assert list(plots) == ["scores", "differences", "flips", "quality", "answers"]
    texts = {
        name: ["".join(text.itertext()) for text in ElementTree.fromstring(plot.svg).iter(SVG_TEXT)]
        for name, plot in plots.items()
    }
    assert {task[0] for task in TASKS} <= set(texts["scores"])
    assert "mean of all tasks" in texts["differences"]
    assert "truthfulqa_mc2" not in texts["flips"]  # its scores are neither right nor wrong
    lost = [str(variant.tasks[0].score.lost) for variant in analysis.variants]
    assert set(lost) <= set(texts["flips"])
    assert {"mean recovery", "KL, nats per token", "bits per weight"} <= set(texts["quality"])
    # the legends
    assert [text for text in texts["scores"] if text in LABELS] == list(LABELS[:4])
    assert [text for text in texts["differences"] if text in LABELS] == list(LABELS[1:4])


@pytest.mark.parametrize("label", [NASTY[-30:], "_hidden", "x" * 80])
def test_legends_show_every_label(label: str) -> None:
    for plot in all_plots(small(label)):
        texts = ["".join(t.itertext()) for t in ElementTree.fromstring(plot.svg).iter(SVG_TEXT)]
        shown = label if len(label) < 80 else f"{'x' * 16}…{'x' * 17}"
        assert any(text.endswith(shown) for text in texts), plot.name


def test_models_can_be_told_apart_without_colours() -> None:
    analysis = analyze(realistic(6, 1))
    styles = [model_style(analysis, label) for label in LABELS]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 6


def test_size_and_quality_need_two_variants_with_bits(analysis: Analysis) -> None:
    runs = analysis.report.models
    changed = [
        runs[0],
        runs[1],
        runs[2].model_copy(update={"bpw": None}),
        runs[3].model_copy(update={"bpw": None}),
    ]
    fewer = analyze(analysis.report.model_copy(update={"models": tuple(changed)}), resamples=99)
    assert "quality" not in [plot.name for plot in all_plots(fewer)]


def test_names_are_escaped_in_the_page() -> None:
    command = "svsk bench '<script>alert(1)</script>'"
    source = html_report(small(NASTY, "<i>task</i>&|", command=command))
    page = Page(source)
    assert not page.tags & {"b", "i", "script"}
    assert NASTY in page.text
    assert "<i>task</i>&|" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_names_are_escaped_in_markdown() -> None:
    text = markdown_report(small(NASTY, "a_b|c"))
    row = next(line for line in text.splitlines() if "w4" in line and "a_b" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 11
    assert r"&lt;b&gt;w4&lt;/b&gt; &amp; " in row
    assert r"\| $x$ \`y\` \*z\* \[a](b) é模" in row
    assert r"a_b\|c · n = 8" in row


def test_a_command_cannot_end_its_block() -> None:
    text = markdown_report(small(command="svsk bench a\n```\n# b"))
    assert "````\nsvsk bench a\n```\n# b\n````" in text


def test_names_are_escaped_in_the_console() -> None:
    assert "[red]w4[/red] [/]" in shown(small("[red]w4[/red] [/]"))


def test_markdown(analysis: Analysis) -> None:
    text = markdown_report(analysis)
    lines = text.splitlines()
    for line in (
        "# Task scores",
        "- Hardware: NVIDIA H100 80GB HBM3",
        "- Generation settings: max_gen_toks = 1024, temperature = 0.0",
        "| task | model | score ± se | difference [95%] | detectable | recovery | lost | gained | p"
        " | Holm p |",
        f"| --- | --- {'| ---: ' * 8}|",
        "| gsm8k_cot | exact_match,strict-match | generate_until | 3.0 | 8 | 250 |",
        f"| gsm8k_cot · n = 250 | Qwen3-4B | 0.7320 ± 0.0281 {f'| {DASH} ' * 7}|",
        "## How to read this",
    ):
        assert line in lines
    for label in LABELS[:4]:
        assert sum(f"| {label} |" in line for line in lines) >= 8
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
    assert markdown_report(analysis) == text


def test_markdown_by_hand() -> None:
    text = markdown_report(small())
    # n = 8, 3 lost, 1 gained: q = 0.4 and 0.2, half width 1.96 sqrt((0.6 - 0.04) / 10); p = 2 (1 +
    # 4) / 16 - 4 / 16
    difference = "-0.2500 [-0.6638, +0.2638] | 0.6968"
    assert f"| a · n = 8 | dense | 0.7500 ± 0.1637 | {DASH} |" in text
    assert (
        f"| a · n = 8 | w4 | 0.5000 ± 0.1890 | {difference} | 66.7% | 3 | 1 | 0.375 | 0.375 |"
        in text
    )


def test_the_console_cuts_no_figure_off(analysis: Analysis) -> None:
    log = shown(analysis, width=80)
    for cell in figures(analysis):
        assert cell in log
    folded = re.sub(r"\s", "", shown(analysis, width=80, terminal=True))
    assert "…" not in folded
    assert "Holmp" in folded


def test_a_large_report() -> None:
    large = analyze(realistic(6, 12), resamples=99)
    source = html_report(large)
    assert len(source.encode()) < 1_000_000
    text = Page(source).text
    assert all(name in text for name in (*LABELS, *large.tasks))
    assert len(large.tasks) == 12
    assert markdown_report(large).count("| Q4_K_M |") == 1 + 1 + 12 + 8 + 2
    shown(large)


def test_the_reference_alone() -> None:
    alone = analyze(report([model_run("dense", [task_run(RIGHT, "a")])]))
    assert "dense, 1 task." in Page(html_report(alone)).text
    assert [table.title for table in all_tables(alone)] == ["Summary", "Tasks", "Scores"]
    assert [plot.name for plot in all_plots(alone)] == ["scores"]
    for text in (markdown_report(alone), shown(alone)):
        assert "0.7500 ± 0.1637" in text


def test_several_answers_to_an_item() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for label, rate in (("dense", 0.7), ("w4", 0.5)):
        drawn = (rng.random((50, 4)) < rate).astype(float)
        task = task_run(
            drawn.mean(axis=1).tolist(), "a", repeat_scores=tuple(map(tuple, drawn.tolist()))
        )
        runs.append(model_run(label, [task, task_run((1, 0, 1), "b")]))
    several = analyze(report(runs, repeats=4))
    (table,) = (table for table in all_tables(several) if table.title == "Several answers")
    score, both = several.variants[0].tasks[0].score, several.variants[0].tasks[0].by_repeats
    assert score.detectable is not None
    assert both is not None
    assert both[1] < score.detectable < both[0]
    assert table.groups == (
        (("a", "w4", "4", *(f"{v:.4f}" for v in (both[0], score.detectable, both[1]))),),
    )
    for text in (Page(html_report(several)).text, markdown_report(several), shown(several)):
        assert "with any number" in text
    assert several.to_json()["comparisons"][0]["tasks"][0]["by_repeats"] == both


def test_one_item() -> None:
    runs = [
        model_run(label, [task_run((score,), "a")])
        for label, score in (("dense", 0.5), ("w4", 0.25))
    ]
    single = analyze(report(runs))
    for text in (Page(html_report(single)).text, markdown_report(single), shown(single)):
        assert f"[{DASH}]" in text
        assert "There is one item" in text
        assert "50.0%" in text


def test_figures_that_are_not_known() -> None:
    idle = model_run("w4", [task_run((0, 0), "a")], generation=Generation(tokens=0, seconds=0.0))
    unknown = analyze(report([model_run("dense", [task_run((0, 0), "a")]), idle]))
    (summary, *_) = all_tables(unknown)
    assert summary.groups[1][0] == (
        "w4",
        "none",
        DASH,
        "0.0 MiB",
        "bfloat16",
        "0.0000",
        DASH,
        DASH,
        DASH,
        DASH,
    )
    text = Page(html_report(unknown)).text
    assert "no recovery" in text
    assert "None" not in text
    assert "nan" not in text.lower()
