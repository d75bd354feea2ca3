# SPDX-License-Identifier: Apache-2.0
"""``svsk compare``: paired differences by hand, and every file it must refuse."""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text.compare import Comparison, compare_files, paired

Write = Callable[..., Path]

NLL = [3.0, 2.0, 4.0, 3.0]
REF = [2.5, 1.75, 3.5, 2.75]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of four chunks as ``svsk eval --json`` does.

    Keywords replace keys, None removes one.
    """

    def file(name: str, *, kl: float = 0.5, **keys: Any) -> Path:
        per_chunk = {
            "nll": NLL,
            "ref_nll": REF,
            "kl": [kl, kl + 0.25, kl, kl],
            "top1": [0.5, 0.75, 0.5, 0.5],
        }
        scores = {
            "kl_mean": 0.0,
            "model": "a/model",
            "reference": "a/reference",
            "text_fingerprint": "00ff",
            "seq_len": 64,
            "dtype": "float32",
            "per_chunk": per_chunk,
            **keys,
        }
        path = tmp_path / name
        path.write_text(
            json.dumps({key: value for key, value in scores.items() if value is not None})
        )
        return path

    return file


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def compare(first: Path, second: Path) -> Comparison:
    (comparison,) = compare_files([first, second])
    return comparison


def test_a_pair_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, so t = 2 sqrt(3) with 2 degrees of freedom, for
    # which the t distribution has the closed form p = 1 - t / sqrt(2 + t^2).
    pair = paired(np.array([1.0, 1.0, 1.0]), np.array([2.0, 3.0, 4.0]))
    assert (pair.baseline, pair.value, pair.difference) == (1.0, 3.0, 2.0)
    assert pair.se == pytest.approx(1 / math.sqrt(3))
    assert pair.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_pairing_removes_the_spread_of_the_text() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(3, 1, 32)
    values = text + 0.01 + rng.normal(0, 0.005, 32)
    pair = paired(text, values)
    assert pair.p is not None
    assert pair.p < 1e-6 < 0.9 < stats.ttest_ind(text, values).pvalue


def test_every_figure_of_every_file(write: Write) -> None:
    better = {
        "nll": [2.75, 2.0, 3.75, 3.0],
        "ref_nll": REF,
        "kl": [0.25, 0.5, 0.5, 0.5],
        "top1": [0.75] * 4,
    }
    paths = [
        write("base.json"),
        write("better.json", per_chunk=better, model="b"),
        write("worse.json", kl=1.0),
    ]
    first, second = compare_files(paths)
    assert (first.file, first.model, first.reference_gap) == (str(paths[1]), "b", 0.0)
    expected = {"nll": -0.125, "delta_nll": -0.125, "kl": -0.125, "top1": 0.1875}
    assert {name: pair.difference for name, pair in first.metrics.items()} == expected
    assert first.metrics["delta_nll"].baseline == np.mean(NLL) - np.mean(REF)
    assert first.metrics["delta_nll"].value == 0.25
    # -0.25, 0, -0.25, 0: deviation 0.25 / sqrt(3)
    assert first.metrics["nll"].se == pytest.approx(0.25 / math.sqrt(3) / 2)
    assert (second.metrics["kl"].difference, second.metrics["kl"].se, second.metrics["kl"].p) == (
        0.5,
        0.0,
        0.0,
    )


def test_a_file_does_not_differ_from_itself(write: Write) -> None:
    path = write("a.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(path, path)
    for pair in comparison.metrics.values():
        assert (pair.difference, pair.se, pair.p) == (0.0, 0.0, None)
    json.dumps(asdict(comparison), allow_nan=False)
    result = svsk("compare", path, path)
    assert result.exit_code == 0
    assert "nan" not in result.output


def test_one_chunk_has_a_difference_and_no_error(write: Write) -> None:
    pair = compare(
        write("a.json", per_chunk={"nll": [3.0]}), write("b.json", per_chunk={"nll": [3.5]})
    ).metrics["nll"]
    assert (pair.difference, pair.se, pair.p) == (0.5, None, None)


def test_without_a_reference_only_nll_is_compared(write: Write) -> None:
    comparison = compare(write("a.json"), write("b.json", per_chunk={"nll": NLL}, reference=None))
    assert comparison.metrics.keys() == {"nll"}
    assert comparison.reference_gap is None
    result = svsk("compare", write("a.json"), write("b.json", per_chunk={"nll": NLL}))
    assert "NLL" in result.output
    assert "KL" not in result.output


def test_another_reference_is_told(write: Write) -> None:
    moved = {"nll": NLL, "ref_nll": [2.5, 1.75, 3.5, 2.5], "kl": [0.5] * 4, "top1": [0.5] * 4}
    paths = write("a.json"), write("b.json", per_chunk=moved)
    assert compare(*paths).reference_gap == 0.25
    assert "differ by up to 0.25 nats" in svsk("compare", *paths).output
    assert "differ by up to" not in svsk("compare", paths[0], write("c.json", kl=1.0)).output


def test_the_command_shows_and_writes_the_figures(write: Write, tmp_path: Path) -> None:
    paths, target = (
        [write("a.json"), write("b.json", kl=0.625), write("c.json", kl=2.0)],
        tmp_path / "out.json",
    )
    result = svsk("compare", *paths, "--json", target)
    assert result.exit_code == 0, result.output
    for shown in ("0.56250", "0.68750", "+0.12500 ± 0.00000", "+1.50000", "delta NLL", "top-1"):
        assert shown in result.output
    written = json.loads(target.read_text())
    assert written["baseline"] == str(paths[0])
    assert written["comparisons"] == [asdict(comparison) for comparison in compare_files(paths)]
    assert written["comparisons"][0]["metrics"]["kl"]["difference"] == 0.125


OTHER_TOKENS = "were scored on different tokens. Score both with the same --text"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_fingerprint": "ff00"}, OTHER_TOKENS),
        ({"per_chunk": None}, "per_chunk: is missing"),
        ({"text_fingerprint": None}, "text_fingerprint: is missing"),
        ({"seq_len": 128}, "in 4 chunks of 128 tokens"),
        ({"per_chunk": {"nll": [3.0] * 8}}, "in 8 chunks of 64 tokens"),
        ({"per_chunk": {"nll": [3.0, "x"]}}, "per_chunk.nll.1: expected a number"),
        (
            {"per_chunk": {"nll": [3.0] * 4, "kl": [3.0] * 3}},
            "per_chunk: expected nll, and as many",
        ),
        ({"per_chunk": {"nll": [math.nan] * 4}}, "per_chunk.nll.0: expected a finite"),
        ({"per_chunk": {"nll": []}}, "per_chunk: expected nll, and as many"),
        ({"per_chunk": {"nll": 3.0}}, "per_chunk.nll: expected a list"),
        ({"per_chunk": {"kl": [3.0] * 4}}, "per_chunk: expected nll, and as many"),
        ({"per_chunk": [3.0]}, "per_chunk: expected a mapping"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_files_that_do_not_fit_are_refused_by_name(
    write: Write, keys: dict[str, Any], message: str, first: bool
) -> None:
    good, bad = write("good.json"), write("bad.json", **keys)
    with pytest.raises(EvalError) as caught:
        compare_files([bad, good] if first else [good, bad])
    assert message in str(caught.value)
    assert "good.json" in str(caught.value)
    assert "bad.json" in str(caught.value)
    assert "Score " in str(caught.value)


def test_other_cuts_of_one_text_are_refused(write: Write) -> None:
    message = r"a\.json was scored in 4 chunks of 64 tokens, .*b\.json in 4 chunks of 128"
    with pytest.raises(EvalError, match=message):
        compare_files([write("a.json"), write("b.json", seq_len=128)])


def test_a_bad_file_behind_good_ones_is_found(write: Write) -> None:
    with pytest.raises(EvalError, match=r"a\.json and .*c\.json were scored on different tokens"):
        compare_files([write("a.json"), write("b.json"), write("c.json", text_fingerprint="11")])


def test_errors_of_the_command_are_one_line(write: Write, tmp_path: Path) -> None:
    good = write("a.json")
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1]")
    for arguments, message in (
        ([good], "Got 1 file(s) to compare"),
        (
            [good, tmp_path / "absent.json"],
            "absent.json: cannot read it (No such file or directory). Name a file of"
            " `svsk eval --json`.",
        ),
        ([good, tmp_path / "text.json"], "text.json: not a file of `svsk eval --json`"),
        ([tmp_path / "list.json", good], "list.json: not a file of `svsk eval --json`"),
        ([good, good, "--json", tmp_path / "no" / "x.json"], "its folder does not exist"),
        (
            [good, good, "--html", tmp_path / "x.html"],
            "--markdown and --html are for files of `svsk bench --json`.",
        ),
    ):
        result = svsk("compare", *arguments)
        assert result.exit_code == 1
        assert result.output.count("error:") == 1
        assert message in result.output
        assert "Traceback" not in result.output


def test_no_torch_is_imported() -> None:
    program = "import sys, svsk_eval.text.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
