# SPDX-License-Identifier: Apache-2.0
"""A sweep that was interrupted goes on with what it has measured."""

from pathlib import Path
from typing import Any

import pytest

import svsk_offline.planning.measurements as module
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from tests.offline.folders import folder_bytes
from tests.offline.planning.test_measurements import measuring, recipe


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The linears whose curves are measured, one after another."""
    measured: list[str] = []
    measure = module._curve

    def noted(name: str, *arguments: Any) -> Any:
        measured.append(name)
        return measure(name, *arguments)

    monkeypatch.setattr(module, "_curve", noted)
    return measured


def interrupted(model: Path, out: Path, chosen: Recipe, step: int) -> None:
    """Start a run that ends after a step of its sweep: two forward, then two back."""

    def stop(done: int, total: int) -> None:
        if (done, total) == (step, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, chosen, progress=Progress(block=stop))


@pytest.mark.parametrize("changes", [{}, {"gradients": {"row_power": 1.0, "token_power": 0.5}}])
def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, tiny_qwen2: Path, curves: list[str], changes: dict[str, Any]
) -> None:
    """It measures what is left, and ends with the same bytes and nothing beside them."""
    chosen = recipe(**changes)
    quantize(tiny_qwen2, tmp_path / "whole", chosen)
    whole = list(curves)
    told: list[tuple[int, int]] = []
    for step, left in ((2, whole), (3, whole[len(whole) // 2 :])):
        out = tmp_path / str(step)
        interrupted(tiny_qwen2, out, chosen, step)
        curves.clear()
        said: list[str] = []
        told.clear()
        progress = Progress(message=said.append, block=lambda *counts: told.append(counts))
        quantize(tiny_qwen2, out, chosen, progress=progress)
        assert curves == left
        steps = 2 * (1 if step == 3 else 2)  # there and back, of the blocks that are left
        assert told == [*((done + 1, steps) for done in range(steps)), (1, 2), (2, 2)]
        assert any("Blocks 1 to 1 were measured before" in text for text in said) == (step == 3)
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("damaged", ["gradient", "1"])
def test_a_damaged_file_of_a_sweep_is_measured_anew(
    tmp_path: Path, tiny_qwen2: Path, curves: list[str], damaged: str
) -> None:
    interrupted(tiny_qwen2, tmp_path / "out", recipe(), 3)
    path = tmp_path / "out.partial" / f"svsk-sweep-{damaged}.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    curves.clear()
    said: list[str] = []
    quantize(tiny_qwen2, tmp_path / "out", recipe(), progress=Progress(message=said.append))
    assert len(curves) == 14
    assert any("cannot be used, so the measuring begins anew" in text for text in said)


def test_a_sweep_of_another_text_is_not_gone_on_with(
    tmp_path: Path, tiny_qwen2: Path, curves: list[str]
) -> None:
    interrupted(tiny_qwen2, tmp_path / "out", recipe(), 3)
    other = tmp_path / "other.partial"
    other.mkdir()
    for path in (tmp_path / "out.partial").glob("svsk-sweep-*"):
        path.rename(other / path.name)
    curves.clear()
    measuring(tiny_qwen2, first=1).run(other, lambda done, total: None)
    assert len(curves) == 14
    assert not list(other.iterdir())
