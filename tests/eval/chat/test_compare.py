# SPDX-License-Identifier: Apache-2.0
"""``svsk compare`` of files with scores of answers: by prompt, and what it must refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svsk_eval.chat.compare import compare_chat_files
from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_offline.terminal import console

Write = Callable[..., Path]

TEXT = {
    "text_fingerprint": "00ff",
    "seq_len": 64,
    "per_chunk": {"nll": [1.0, 2.0], "ref_nll": [1.0, 1.0], "kl": [0.5, 0.5], "top1": [1.0, 1.0]},
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded, however long the folders are and whatever COLUMNS was at import."""
    monkeypatch.setattr(console, "width", 400)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of four prompts as ``svsk eval --chat --json`` does.

    Keywords replace series; ``text`` adds a text, ``chat`` replaces keys of the chat, None removes
    one.
    """

    def file(
        name: str, *, text: bool = False, chat: dict[str, Any] | None = None, **series: Any
    ) -> Path:
        per_prompt = {
            "nll": [1.0, 2.0, None, 3.0],
            "ref_nll": [0.5, 1.5, None, 2.0],
            "kl": [0.5, 0.25, None, 0.75],
            "top1": [1.0, 0.5, None, 0.75],
            "early_end": [0.5, 0.25, None, 0.125],
            "ref_early_end": [0.25, 0.25, None, 0.125],
            "end_kl": [None, 0.5, 0.25, 0.0],
            "end_probability": [None, 0.5, 0.75, 1.0],
            "ref_end_probability": [None, 0.75, 0.75, 1.0],
        }
        scores = {
            "answers_fingerprint": "abcd",
            "prompts": 4,
            "finished": 3,
            "answer_tokens": 16,
            "tokens": 20,
            "per_prompt": per_prompt | series,
            **(chat or {}),
        }
        whole = {
            "model": name,
            "engine": "hf",
            "chat": {key: value for key, value in scores.items() if value is not None},
        }
        path = tmp_path / name
        path.write_text(json.dumps({**whole, **(TEXT if text else {})}))
        return path

    return file


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_differences_by_prompt(write: Write) -> None:
    better = write("better", kl=[0.25, 0.25, None, 0.25], end_probability=[None, 1.0, 1.0, 1.0])
    (comparison,) = compare_chat_files([write("base"), better])
    assert (comparison.model, comparison.reference_gap) == ("better", 0.0)
    # -1/4, 0, -1/2: mean -1/4, deviation 1/4
    kl = comparison.metrics["kl"]
    assert (kl.baseline, kl.value, kl.difference) == (0.5, 0.25, -0.25)
    assert kl.se == pytest.approx(0.25 / math.sqrt(3))
    # 1/2, 1/4, 0, of the answers that have an end
    end = comparison.metrics["end_probability"]
    assert (end.baseline, end.value, end.difference) == (0.75, 1.0, 0.25)
    assert comparison.metrics["delta_nll"].baseline == pytest.approx(2 / 3)
    assert comparison.metrics["end_kl"].difference == 0.0


def test_the_command_shows_and_writes_what_all_files_hold(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    both = [write("a", text=True), write("b", text=True, end_kl=[None, 1.0, 1.0, 1.0])]
    result = compare(*both, "--json", out)
    assert result.exit_code == 0, result.output
    assert "KL at the end" in result.output
    assert "+0.75000" in result.output
    written = json.loads(out.read_text())
    assert set(written) == {"baseline", "comparisons", "chat"}
    assert written["chat"][0]["metrics"]["end_kl"]["difference"] == 0.75
    assert written["comparisons"][0]["metrics"]["kl"]["difference"] == 0.0
    assert compare(both[0], write("c"), "--json", out).exit_code == 0
    assert set(json.loads(out.read_text())) == {"baseline", "chat"}


def test_references_that_differ_are_told(write: Write) -> None:
    result = compare(write("a"), write("b", ref_nll=[0.5, 1.5, None, 2.5]))
    assert result.exit_code == 0
    assert "differ by up to 0.5 nats" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat": {"answers_fingerprint": "ffff"}}, "base and .*other were scored on different an"),
        ({"kl": [0.5, None, None, 0.75]}, "have kl of different prompts"),
        ({"kl": [0.5]}, "other: not a file of .*per_prompt: .*as many values in every one"),
        ({"chat": {"per_prompt": {}}}, "other: not a file of .*per_prompt: .*expected nll"),
        ({"kl": [0.5, 0.25, None, "x"]}, "other: not a file of .*kl.*expected a number"),
        (
            {"chat": {"prompts": None}},
            "other: not a file of `svsk eval --chat --json`: chat.prompts: is missing. Score it",
        ),
    ],
)
def test_files_that_cannot_be_compared(write: Write, changes: Any, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        compare_chat_files([write("base"), write("other", **changes)])


def test_files_without_scores_of_answers(write: Write, tmp_path: Path) -> None:
    with pytest.raises(
        EvalError, match=r"absent: cannot read it \(.*\)\. Name a file of `svsk eval --chat --json`"
    ):
        compare_chat_files([write("base"), tmp_path / "absent"])
    with pytest.raises(EvalError, match="expected a baseline and at least one other"):
        compare_chat_files([write("base")])
    # what the first holds is of no use where the second has a text only
    text = write("text", text=True)
    content = json.loads(text.read_text())
    del content["chat"]
    text.write_text(json.dumps(content))
    result = compare(write("base"), text)
    assert result.exit_code == 1
    assert "text_fingerprint: is missing" in " ".join(result.output.split())
