# SPDX-License-Identifier: Apache-2.0
"""The journal of answers: nothing is lost, nothing is asked twice, damage is named."""

import json
from pathlib import Path

import pytest

from svsk_eval.bench.journal import Generated, Journal, Likelihood, request_keys
from svsk_eval.errors import EvalError

ANSWERS = {
    "a": Generated(text='é\n\u2028 "x"', tokens=3, stopped=True),
    "b": Likelihood(logprob=-1.2345678901234567, greedy=False),
    "c": Likelihood(logprob=-7.5, greedy=None),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path) as journal:
        for key, answer in ANSWERS.items():
            journal.add(key, answer)
    return path


def test_answers_are_there_after_reopening(path: Path) -> None:
    with Journal(path) as journal:
        assert len(journal) == 3
        assert "a" in journal
        assert "d" not in journal
        assert journal.generated("a") == ANSWERS["a"]
        assert [journal.likelihood(key) for key in "bc"] == [ANSWERS["b"], ANSWERS["c"]]
        with pytest.raises(KeyError):
            journal.generated("d")


def test_every_prefix_of_a_killed_write_can_be_continued(path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = sum(
            1 for end in (len(lines[0]), len(lines[0]) + len(lines[1]), len(whole)) if end <= length
        )
        with Journal(path) as journal:
            assert len(journal) == kept
            journal.add("z", Likelihood(logprob=-1.0, greedy=True))
        with Journal(path) as journal:
            assert len(journal) == kept + 1
            assert journal.likelihood("z").logprob == -1.0
        assert all(json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        '{"key": "a"}',
        '{"key": "", "answer": {"kind": "likelihood", "logprob": -1, "greedy": true}}',
        '{"key": "k", "answer": {"kind": "likelihood", "logprob": NaN, "greedy": true}}',
        '{"key": "k", "answer": {"kind": "generated", "logprob": -1, "greedy": true}}',
    ],
)
def test_damage_is_named(path: Path, line: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([lines[0], line, *lines[1:]]), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(EvalError, match=r"journal\.jsonl, line 2: is damaged .* Delete that line"):
        Journal(path)
    assert path.read_bytes() == before


def test_two_runs_cannot_share_a_journal(path: Path) -> None:
    with Journal(path), pytest.raises(EvalError, match="another run is writing to it"):
        Journal(path)
    Journal(path).close()


def test_keys() -> None:
    one, two, again = request_keys(
        "generate_until", [("p", {"a": 1, "b": 2}), ("q", {}), ("p", {"b": 2, "a": 1})]
    )
    assert one == again != two
    assert request_keys("loglikelihood", [("p", {"a": 1, "b": 2})]) != [one]
    numbered = request_keys("generate_until", [("p", {}), ("q", {}), ("p", {})], numbered=True)
    assert len(set(numbered)) == 3
    # An answer's number depends on equal requests before it only.
    assert request_keys("generate_until", [("p", {}), ("p", {})], numbered=True) == [
        numbered[0],
        numbered[2],
    ]
    assert request_keys("x", [("ab", "c")]) != request_keys("x", [("a", "bc")])


def test_answers_of_another_journal_fill_what_is_missing(path: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "mine.jsonl") as mine:
        mine.add("a", Generated(text="mine", tokens=1, stopped=True))
        assert mine.adopt(path, "1 x H100") == 2
        assert mine.generated("a").text == "mine"
        assert mine.likelihood("b") == ANSWERS["b"]
    before = path.read_bytes()
    with Journal(tmp_path / "mine.jsonl") as mine:
        assert [mine.origin(key) for key in "abcd"] == [None, "1 x H100", "1 x H100", None]
    with Journal(tmp_path / "third.jsonl") as third:
        assert third.adopt(tmp_path / "mine.jsonl", "2 cores") == 3
        assert [third.origin(key) for key in "abc"] == ["2 cores", "1 x H100", "1 x H100"]
    assert path.read_bytes() == before
    path.write_bytes(b"nonsense\n" + before)
    with (
        Journal(tmp_path / "fourth.jsonl") as fourth,
        pytest.raises(EvalError, match=r"new/journal\.jsonl, line 1: is damaged"),
    ):
        fourth.adopt(path, "x")
