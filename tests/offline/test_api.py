# SPDX-License-Identifier: Apache-2.0
"""What Python programs use, and the programs of docs/examples, in this process: they are small."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import svsk_eval
import svsk_offline
from svsk_eval.api import Benchmark, benchmark
from svsk_eval.errors import EvalError
from svsk_offline.pipeline import quantize
from svsk_offline.printable import html_table
from svsk_offline.recipe import Recipe
from svsk_offline.storage.inspection import inspect_checkpoint

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_examples_run(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("It was a bright cold day in April, and the clocks were striking. " * 40)
    runs = {
        "quantize.py": ([tiny_llama, out], "bits per weight in out"),
        "inspect_checkpoint.py": ([out], "2 x q_proj (128, 128): rank 8"),
        "evaluate.py": ([out, tiny_llama, text], "KL 0."),
    }
    assert sorted(runs) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    for name, (arguments, said) in runs.items():
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert said in capsys.readouterr().out


def test_results_are_typed_and_shown_as_tables(
    tiny_llama: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    result = svsk_offline.quantize(tiny_llama, tmp_path / "out", tiny_recipe)
    assert svsk_offline.quantize is quantize
    assert "model.layers.1.mlp.down_proj" in result._repr_html_()
    found = svsk_offline.inspect(tmp_path / "out")
    raw = inspect_checkpoint(tmp_path / "out")
    assert found.bits_per_weight == raw["bits_per_weight"]
    assert sum(one.count for one in found.matrices) == raw["linears"]
    assert found.errors == {layer.name: layer.error for layer in result.layers}
    assert f"{found.bits_per_weight:.4f} bits per weight" in found._repr_html_()
    assert svsk_offline.load_recipe("best").name == "best"


def test_tasks_as_a_table() -> None:
    def mean(value: float) -> Any:
        return SimpleNamespace(value=value)

    score = SimpleNamespace(n=8, reference=mean(0.5), variant=mean(0.25), difference=-0.25, se=0.1)
    task = SimpleNamespace(task="<facts>", score=score)
    analysis: Any = SimpleNamespace(
        variants=(SimpleNamespace(label="svsk", tasks=(task,)),), notes=("a note",)
    )
    report: Any = None
    shown = Benchmark(report, analysis)._repr_html_()
    assert "<td>&lt;facts&gt;</td><td>8</td><td>0.5000</td><td>0.2500</td>" in shown
    assert "-0.2500 ± 0.1000" in shown
    assert svsk_eval.benchmark is benchmark
    with pytest.raises(EvalError, match="names no variant"):
        benchmark({}, "reference")


@pytest.mark.parametrize("package", [svsk_offline, svsk_eval])
def test_every_name_is_there(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_cells_are_text() -> None:
    table = html_table(("a",), [("<script>\x1b",)], "<b>")
    assert "<script>" not in table
    assert "<td>&lt;script&gt;\N{REPLACEMENT CHARACTER}</td>" in table
    assert table.endswith("<p>&lt;b&gt;</p>")
