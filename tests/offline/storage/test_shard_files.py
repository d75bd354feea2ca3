# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint: put together from parts, with the permissions that the umask gives."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.inspection import validate_against_architecture
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.storage.shard_files import group_files, merge_files, shard_names
from svsk_vllm.format import SvskFormatError
from tests.offline.folders import folder_bytes


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([3, 3, 3, 3], [[0, 1, 2], [3]]),
        ([20, 3, 3], [[0], [1, 2]]),
        ([4, 20, 3], [[0], [1], [2]]),
        ([10], [[0]]),
    ],
)
def test_neighbours_share_a_file_as_far_as_they_fit(
    sizes: list[int], groups: list[list[int]]
) -> None:
    assert group_files(sizes, 10) == groups
    assert len(set(shard_names(len(groups)))) == len(groups)


def test_merged_files_hold_the_same_tensors_each_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, tensors = [], {}
    for number in range(3):
        held = {
            f"{number}.bytes": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),
            f"{number}.halves": torch.randn(3, 5, generator=generator).bfloat16(),
            f"{number}.floats": torch.randn(9, generator=generator),
            f"{number}.none": torch.empty(0, 4, dtype=torch.float16),
        }
        tensors |= held
        parts.append(tmp_path / f"{number}.safetensors")
        save_file(held, parts[-1], {"format": "pt", f"key {number}": "v", "shared": "s"})
    merge_files(parts, tmp_path / "all.safetensors")
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "all.safetensors", "pt") as handle:
        assert handle.metadata() == {
            "format": "pt",
            "shared": "s",
            **{f"key {number}": "v" for number in range(3)},
        }
        names = list(handle.keys())
        sizes = [handle.get_tensor(name).element_size() for name in handle.offset_keys()]
        assert sizes == sorted(sizes, reverse=True)
    assert len(names) == len(tensors)
    merge_files(parts, tmp_path / "again.safetensors")
    assert (tmp_path / "all.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()


def test_parts_that_cannot_be_put_together_leave_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        save_file({"x": torch.ones(8)}, path)
    with pytest.raises(SvskFormatError, match=r"b\.safetensors: has x, and so has .*a\.safe"):
        merge_files([first, second], tmp_path / "out.safetensors")
    second.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(SvskFormatError, match="ends before its last tensor"):
        merge_files([second], tmp_path / "out.safetensors")
    second.write_bytes(b"\3\0\0\0\0\0\0\0no!")
    with pytest.raises(SvskFormatError, match="is no safetensors file"):
        merge_files([second], tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def other_run(path: Path) -> None:
    """Make a file one of a run with other inputs: other values, another fingerprint."""
    tensors = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt", "svsk_fingerprint": "other"})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("most", "damaged", "damage", "again"),
    [
        (1, None, other_run, False),
        (300_000, None, other_run, False),
        # Its part is still there.
        (1, "model-00002-of*", other_run, False),
        (1, "model-00002-of*", cut_short, False),
        # Those of this one are gone.
        (300_000, "model-00001-of*", other_run, True),
    ],
)
def test_a_run_stopped_while_files_are_put_together_goes_on(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    damaged: str | None,
    damage: Callable[[Path], None],
    again: bool,
) -> None:
    """Blocks that are in a finished file already are not quantised again.

    Those of a file of another run, or of a damaged one, are, unless their parts are still there.
    """
    writer = "svsk_offline.storage.checkpoint_writer"
    monkeypatch.setattr(f"{writer}.SHARD_BYTES", most)
    recipe = tiny_recipe.override({"calibration": {"sequential": True}})
    whole = quantize(tiny_llama, tmp_path / "whole", recipe).folder
    assert len(list(whole.glob("*.safetensors"))) == (3 if most == 1 else 2)
    assert validate_against_architecture(whole) == []

    def stop(parts: list[Path], target: Path) -> None:
        merge_files(parts, target)
        if "-00002-of" in target.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"{writer}.merge_files", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llama, tmp_path / "out", recipe)
    if damaged is not None:
        (held,) = (tmp_path / "out.partial").rglob(damaged)
        damage(held)
    redone: list[LayerReport] = []
    quantize(tiny_llama, tmp_path / "out", recipe, progress=Progress(layer=redone.append))
    blocks = {report.name.split(".")[2] for report in redone if ".layers." in report.name}
    assert bool(blocks) == again
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)


def test_files_have_the_permissions_that_the_umask_gives(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    before = os.umask(0o027)
    try:
        folder = quantize(tiny_llama, tmp_path / "out", tiny_recipe).folder
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o640}, modes
