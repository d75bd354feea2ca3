# SPDX-License-Identifier: Apache-2.0
"""``--memory-budget`` and ``--disk-budget``: the same result, or refused before any work."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import svsk_offline.run as run_module
from svsk_eval.cli import app
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner
from svsk_offline.dry_run import dry_run
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from tests.offline.test_experts import write_with_an_idle_expert


@pytest.fixture
def small() -> Recipe:
    """A bit budget, so that gradients are measured, on a few short samples."""
    changes: dict[str, Any] = {
        "calibration": {"samples": 16, "seq_len": 64},
        "alternating": {"rounds": 1, "polish": 0},
        "allocation": {"ranks": (0, 2)},
    }
    return load_recipe("best").override(changes)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and torch alone take more than a tiny model: as if they took nothing."""
    monkeypatch.setattr(run_module, "peak_memory_gib", lambda: 0.0)


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, without what says when and how fast."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in {".safetensors", ".md"} or path.name == "config.json"
    }


def least(dense: Path, recipe: Recipe, out: Path) -> int:
    """Bytes of the smallest budget, as the refusal of a smaller one says in GiB."""
    with pytest.raises(SvskError, match=r"expected \d+\.\d+ GiB or more") as refused:
        dry_run(dense, out, recipe, device="cpu", memory_budget=1)
    match = re.search(r"\(a block, or embedding and head .*, the fit of", str(refused.value))
    assert match, refused.value
    low, high = 1, 1 << 40
    while low < high:
        middle = (low + high) // 2
        try:
            dry_run(dense, out, recipe, device="cpu", memory_budget=middle)
            high = middle
        except SvskError:
            low = middle + 1
    return low


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("aim", [0.0, 0.5])
def test_the_same_checkpoint_from_little_memory(
    kind: str,
    aim: float,
    small: Recipe,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states in a file, statistics in turns; an idle expert, and thin ones, too."""
    small = small.override({"alternating": {"aim": aim}})
    dense = tiny_llama if kind == "dense" else write_with_an_idle_expert(tmp_path / "moe")
    passes: list[int] = []
    collect = BlockRunner.collect

    def counted(self: BlockRunner, index: int, *arguments: Any, **options: Any) -> Any:
        passes.append(index)
        return collect(self, index, *arguments, **options)

    monkeypatch.setattr(BlockRunner, "collect", counted)
    quantize(dense, tmp_path / "whole", small, device="cpu")
    at_once = len(passes)
    if not aim:
        assert passes == [0, 1]
    passes.clear()
    budget = least(dense, small, tmp_path / "out")
    estimate = dry_run(dense, tmp_path / "out", small, device="cpu", memory_budget=budget)
    assert estimate.memory["hidden states"] == 0
    assert estimate.disk["hidden states"] > 0
    whole = dry_run(dense, tmp_path / "out", small, device="cpu")
    for kept in ("gradients' statistics", "hidden states"):
        assert estimate.memory[kept] < whole.memory[kept]
    assert estimate.memory_peak <= budget
    quantize(dense, tmp_path / "little", small, device="cpu", memory_budget=budget)
    if kind == "experts":  # of the small dense model all of a block is less than one output's
        assert len(passes) > at_once, "a block's statistics were gathered in turns"
    assert contents(tmp_path / "little") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("light")
def test_an_interrupted_run_goes_on_with_another_budget(
    small: Recipe, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_llama, tmp_path / "whole", small, device="cpu")
    monkeypatch.setattr(run_module.CheckpointWriter, "finish", _killed)
    budget = least(tiny_llama, small, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", small, device="cpu", memory_budget=budget)
    monkeypatch.undo()
    quantize(tiny_llama, tmp_path / "out", small, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_too_small_a_budget_is_refused_before_text_is_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.Run, "execute", _killed)
    result = svsk("quantize", tiny_llama, tmp_path / "out", "--memory-budget", 0.001)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert re.search(
        r"--memory-budget 0\.001: expected \d+\.\d\d GiB or more for this model and recipe"
        r" \(the program \d+\.\d\d",
        said,
    )
    assert "Raise it, or take a recipe that holds less: `svsk quantize --dry-run" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "unit"),
    [
        ("--memory-budget", "0", "GiB"),
        ("--memory-budget", "-2", "GiB"),
        ("--disk-budget", "nan", "GB"),
    ],
)
def test_a_budget_is_above_zero(
    tiny_llama: Path, tmp_path: Path, option: str, value: str, unit: str
) -> None:
    result = svsk("quantize", tiny_llama, tmp_path / "out", option, value)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert f"{option} {value}: expected a number of {unit} above 0." in said


def test_what_is_held_is_of_the_block_that_holds_most(tiny_llama: Path, tmp_path: Path) -> None:
    """Of the first block all is ignored, of the second all but one matrix."""
    only = load_recipe("fast").override({"calibration": {"samples": 24, "seq_len": 32}})
    some = only.override({"ignore": (r"re:model\.layers\.0\..*", r"re:.*(q|k|v|o|gate|up)_proj")})
    found = [dry_run(tiny_llama, tmp_path / "out", one, device="cpu") for one in (only, some)]
    assert 0 < found[1].memory["codes of a block"] < found[0].memory["codes of a block"]
    assert found[1].memory["statistics of a block"] < found[0].memory["statistics of a block"]


def test_a_disk_budget_that_the_output_exceeds(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_llama, tmp_path / "out", "--recipe", "fast")
    for more in ((), ("--dry-run",)):
        result = svsk(*arguments, "--disk-budget", 0.0001, *more)
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert re.search(
            r"--disk-budget 0\.0001: output and temporary files would take about \d\.\d\d GB,"
            r" the checkpoint \d\.\d\d GB\. Raise it, lower --samples",
            said,
        )
    assert svsk(*arguments, "--disk-budget", 1, "--dry-run").exit_code == 0
    assert not (tmp_path / "out").exists()
