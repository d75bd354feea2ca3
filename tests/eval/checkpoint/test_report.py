# SPDX-License-Identifier: Apache-2.0
"""``svsk report``: the page's figures are those of the checkpoint, and nothing of it is obeyed."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from svsk_eval.checkpoint.contents import read_checkpoint
from svsk_eval.checkpoint.page import checkpoint_page
from svsk_eval.checkpoint.recipe import recipe_yaml
from svsk_eval.checkpoint.suggestions import suggestions
from svsk_eval.checkpoint.tables import kind_summaries
from svsk_eval.cli import app
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe, parse_recipe
from svsk_offline.storage.layer_report import REPORT_NAME, stored_errors
from svsk_vllm.format.contents import Contents
from tests.eval.checkpoint.made_up import matrix
from tests.support.format_builders import edit_json
from tests.support.light_commands import run_without_heavy_imports
from tests.support.tiny_models import write_dense, write_random_svsk

WORDS = "Stones in a tin: 12 of them, not 7.\nThe rate is (about) 0.5; here\n\n"


CELLS = ("td", "th", "dt", "dd")


class Page(HTMLParser):
    """A page's words, rows of its tables and facts, elements, and what it loads."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag in ("tr", "dt"):
            self.rows.append([])
        if tag in CELLS:
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in CELLS

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.inside:
            self.rows[-1][-1] += data.strip()

    def row(self, first: str) -> list[str]:
        """The only row that begins so."""
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def report(folder: Path, out: Path, *more: object) -> tuple[Page, dict[str, Any], Result]:
    """The page, the figures and what was shown."""
    html, figures = out / "page.html", out / "figures.json"
    result = svsk("report", folder, "--html", html, "--json", figures, "--overwrite", *more)
    assert result.exit_code == 0, result.output
    source = html.read_text(encoding="utf-8")
    assert len(source) < 1_000_000
    return Page(source), json.loads(figures.read_text()), result


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("published").override(
        {
            "calibration": {"samples": 16, "seq_len": 32},
            "sidecar": {"rank": 4, "tile_m": 48, "tile_n": 96},
        }
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, dense: Path, recipe: Recipe) -> Path:
    return quantize(dense, tmp_path_factory.mktemp("quantized") / "published", recipe).folder


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").rstrip("%"))


def test_figures_are_those_of_the_checkpoint(published: Path, tmp_path: Path) -> None:
    page, figures, result = report(published, tmp_path)
    stored, contents = stored_errors(published), Contents(published)
    rows = {row["name"]: row for row in figures["matrices"]}
    assert set(rows) == set(stored) == set(contents.linears)
    for name, row in rows.items():
        linear = contents.linears[name]
        assert row["bits_per_weight"] == linear.stored_bits / linear.num_weights
        assert (row["error"], row["base_error"]) == (
            stored[name]["error"],
            stored[name]["base_error"],
        )
        bits = [row[key] for key in ("code_bits", "scale_bits", "sidecar_bits")]
        assert sum(bits) == linear.stored_bits
        assert bits[0] == 4 * linear.num_weights
    worst = max(stored, key=lambda name: stored[name]["error"])
    shown = page.row(worst)
    assert shown[1] == " x ".join(map(str, rows[worst]["shape"]))
    assert number(shown[2]) == pytest.approx(rows[worst]["bits_per_weight"], abs=1e-4)
    assert shown[3:5] == ["64", "4"]
    assert number(shown[5]) == pytest.approx(stored[worst]["base_error"], rel=0.01)
    assert number(shown[6]) == pytest.approx(stored[worst]["error"], rel=0.01)
    removed = 1 - stored[worst]["error"] / stored[worst]["base_error"]
    assert number(shown[7]) == pytest.approx(100 * removed, abs=0.06)
    per_input = stored[worst]["held_out_tokens"] / rows[worst]["shape"][1]
    assert number(shown[8]) == pytest.approx(per_input, abs=0.06)
    assert f"{figures['bits_per_weight']:.4f}" in page.text
    assert f"{figures['bits_per_weight_of_all']:.4f}" in page.text
    assert worst in result.output
    kinds = {row["kind"] for row in rows.values()}
    below_blocks = [row for row in page.rows if len(row) in (6, 7) and kinds & {*row[:2]}]
    assert len(below_blocks) == 14


def test_bytes_add_up_to_the_folder(published: Path, tmp_path: Path) -> None:
    page, figures, _ = report(published, tmp_path)
    parts = [
        row for row in page.rows if row and re.match(r"blocks: |embedding|other|token", row[0])
    ]
    shares = [number(row[2]) for row in parts]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in published.glob("*.safetensors")
    )
    contents = read_checkpoint(published)
    kept = sum(one.stored_bits for one in contents.matrices) // 8 + contents.dense_bytes
    assert kept + contents.other_files + headers == figures["bytes_on_disk"]


def test_the_means_of_a_kind_by_hand(published: Path) -> None:
    stored = stored_errors(published)
    errors = [row["error"] for name, row in stored.items() if name.endswith("v_proj")]
    assert len(errors) == 2
    whole = kind_summaries(read_checkpoint(published))["self_attn.v_proj"][1]
    assert whole == pytest.approx((errors[0] * errors[1]) ** 0.5)


def test_the_recipe_of_the_page_is_taken_again(published: Path, recipe: Recipe) -> None:
    text = recipe_yaml(read_checkpoint(published))
    assert text is not None
    assert parse_recipe(yaml.safe_load(text), "page").values() == recipe.values()


def test_without_a_text_no_heavy_package_is_imported(published: Path, tmp_path: Path) -> None:
    lines = [f"report {published} --html page.html --json figures.json", f"report {published} -q"]
    run_without_heavy_imports(lines, tmp_path, 0)
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!DOCTYPE html>")
    refused = [
        f"report {published} --html page.html",
        f"report {published} --text page.html",
        f"report {published} --reference {published}",
        f"report {tmp_path}",
        f"report {published} --html page.txt",
        "report nowhere",
    ]
    run_without_heavy_imports(refused, tmp_path, 1)


def test_the_page_needs_nothing_else_and_is_dark_at_night(published: Path, tmp_path: Path) -> None:
    page, _, _ = report(published, tmp_path)
    assert page.loads
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.loads)
    assert "script" not in page.tags
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in source
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", source)
    report(published, tmp_path)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == source


def test_kl_of_a_text(published: Path, dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 30)
    scoring = ["--reference", dense, "--text", text, "--chunks", 4, "--seq-len", 48]
    page, figures, _ = report(published, tmp_path, *scoring)
    scores = tmp_path / "scores.json"
    assert svsk("eval", published, *scoring, "--json", scores).exit_code == 0
    evaluated = json.loads(scores.read_text())
    found = figures["text"]
    assert found["scores"]["kl_mean"] == evaluated["kl_mean"] > 0
    assert found["scores"]["text_fingerprint"] == evaluated["text_fingerprint"]
    for groups in (found["kinds"], found["positions"]):
        assert sum(group["tokens"] for group in groups) == 4 * 47
        mean = sum(group["tokens"] * group["kl"] for group in groups) / (4 * 47)
        assert mean == pytest.approx(evaluated["kl_mean"])
        assert sum(group["share"] for group in groups) == pytest.approx(1)
    kinds = {group["name"] for group in found["kinds"]}
    assert {"whitespace", "digits", "punctuation", "word start", "word continuation"} <= kinds
    assert "special" not in kinds
    digits = next(group for group in found["kinds"] if group["name"] == "digits")
    row = page.row("digits")
    assert row[1] == str(digits["tokens"])
    assert number(row[2].partition(" ")[0]) == pytest.approx(digits["kl"], abs=1e-5)
    assert page.row("33-47")
    assert "give --reference and --text" not in page.text
    assert len(page.loads) == 5


def test_an_older_checkpoint_says_what_is_missing(published: Path, tmp_path: Path) -> None:
    older = shutil.copytree(published, tmp_path / "older")
    (older / REPORT_NAME).unlink()
    page, figures, result = report(older, tmp_path)
    for words in (page.text, result.output):
        assert f"the folder has no {REPORT_NAME}" in words
    assert not figures["measured"]
    assert all(row["error"] is None for row in figures["matrices"])
    assert len(page.loads) == 1  # bits are known
    (kind,) = [row for row in page.rows if row[0] == "self_attn.q_proj" and len(row) == 8]
    assert kind[5:] == ["\N{EN DASH}"] * 3
    # another program's: neither measurements nor a recipe
    foreign = write_random_svsk(write_dense(tmp_path / "dense"), tmp_path / "foreign")
    page, figures, _ = report(foreign, tmp_path)
    assert "config.json records none" in page.text
    assert page.row("recipe") == ["recipe", "unknown"]
    (older / REPORT_NAME).write_text("{}")
    broken = svsk("report", older)
    assert broken.exit_code == 1
    assert f"{REPORT_NAME}: has no matrices" in broken.stderr


def test_nothing_of_a_checkpoint_is_obeyed(published: Path, tmp_path: Path) -> None:
    nasty = "</pre><script>alert(1)</script>\x1b]0;owned\x07{{ 7*7 }}[bold]"
    hostile = shutil.copytree(published, tmp_path / "<b>&amp;\x1b[31m")
    producer = {
        "recipe": nasty,
        "recipe_hash": nasty,
        "recipe_values": {nasty: nasty, "allocation": {"target_bpw": "much"}},
        "svsk": {"a": nasty},
        "calibration": {"source": nasty, "samples": nasty, "parts": [nasty, {"source": nasty}]},
        "smoothing": {"folded": {nasty: nasty}, "left_alone": {nasty: 1}},
    }
    edit_json(hostile / "config.json", lambda config: config.update(architectures=[nasty]))
    edit_json(
        hostile / "config.json",
        lambda config: config["quantization_config"].update(producer=producer),
    )
    page, _, result = report(hostile, tmp_path)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>" in page.text
    assert "{{ 7*7 }}" in page.text
    for shown in (source, result.stdout, result.stderr):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert "[bold]" in result.stdout


def test_the_page_of_a_large_model_stays_small(published: Path) -> None:
    kinds = [f"mlp.experts.*.projection_{number}" for number in range(12)]
    rng = np.random.default_rng(0)
    matrices = [
        replace(
            matrix(f"model.{block}.{kind}"),
            block=block,
            kind=kind,
            error=float(rng.uniform(1e-4, 1e-3)),
        )
        for block in range(94)
        for kind in kinds
    ]
    contents = replace(read_checkpoint(published), matrices=tuple(matrices))
    source = checkpoint_page(contents, [], suggestions(contents))
    assert len(source.encode()) < 1_000_000
    page = Page(source)
    assert sum(kind in row for row in page.rows for kind in kinds) == (94 + 1) * 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["DENSE"], "not a quantised checkpoint"),
        (["CHECKPOINT", "--html", "there.html"], "there.html exists. Choose another file"),
        (["CHECKPOINT", "--html", "no/page.html"], "its folder does not exist"),
        (["CHECKPOINT", "--html", "page.pdf"], "expected a name ending in .html"),
        (
            ["CHECKPOINT", "--html", "notes.html", "--overwrite"],
            "does not begin as a page, so --overwrite does not replace it",
        ),
        (["CHECKPOINT", "--text", "there.html"], "Give it with --reference"),
        (["CHECKPOINT", "--reference", "DENSE"], "Give one with --text"),
        (["CHECKPOINT", "--reference", "DENSE", "--text", "none.txt"], "no such file"),
        (["CHECKPOINT", "--reference", "./none", "--text", "there.html"], "no such folder"),
        (["CHECKPOINT", "--device", "nonsense"], "--device nonsense"),
        (["CHECKPOINT", "--dtype", "nonsense"], "--dtype nonsense"),
        (["CHECKPOINT", "--json", "no/figures.json"], "its folder does not exist"),
    ],
)
def test_refusals(
    arguments: list[str],
    said: str,
    published: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("<!DOCTYPE html>")
    (tmp_path / "notes.html").write_text("my notes")
    places = {"CHECKPOINT": str(published), "DENSE": str(dense)}
    result = svsk("report", *(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert (tmp_path / "notes.html").read_text() == "my notes"
