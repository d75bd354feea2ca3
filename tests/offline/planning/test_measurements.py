# SPDX-License-Identifier: Apache-2.0
"""What runs measure once, when it is kept, and what makes them measure anew."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

import svsk_offline.planning.measurements as module
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.cli import app
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.planning.measured import Measurements
from svsk_offline.planning.measurements import Measuring
from svsk_offline.recipe import AlternatingRecipe, Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_vllm.format import ConfigGroup
from tests.offline.folders import folder_bytes
from tests.support.tiny_models import write_dense

BUDGET = {"target_bpw": 4.8, "ranks": (0, 2, 4, 8), "group_sizes": (64, 32), "scale_bits": (6,)}
QUANTISING: dict[str, dict[str, Any]] = {
    "weights": {},
    "sink": {"weight": 2.0},
    "alternating": {"rounds": 2, "polish": 1, "ridge": 1e-3},
    "gradients": {"row_power": 0.5},
    "calibration": {"sequential": True},
    "allocation": {"target_bpw": 4.6, "ranks": (0, 8), "factor_bits": (8, 4)},
}
"""All that changes a checkpoint and nothing that is measured before."""


def recipe(**sections: dict[str, Any] | tuple[str, ...]) -> Recipe:
    base = load_recipe("fast").override(
        {
            "calibration": {"samples": 24, "seq_len": 32},
            "sidecar": {"tile_m": 0, "tile_n": 0},
            "gradients": {"row_power": 1.0},
            "allocation": BUDGET,
        }
    )
    return base.override(sections)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per sweep of gradients."""
    calls: list[int] = []
    sweep = module.sweep_gradients

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        sweep(*arguments, **options)

    monkeypatch.setattr(module, "sweep_gradients", counted)
    return calls


def test_runs_that_quantise_in_another_way_measure_once(
    tmp_path: Path, tiny_qwen2: Path, sweeps: list[int]
) -> None:
    """And they give the bytes that they give on their own."""
    kept, other = tmp_path / "kept", recipe(**QUANTISING)
    quantize(tiny_qwen2, tmp_path / "first", recipe(), measurements=kept)
    said: list[str] = []
    quantize(
        tiny_qwen2,
        tmp_path / "second",
        other,
        measurements=kept,
        progress=Progress(message=said.append),
    )
    assert len(sweeps) == 1
    (file,) = kept.iterdir()
    assert any("was measured before" in text and str(file) in text for text in said)
    assert not any(text.startswith("Measuring") for text in said)
    quantize(tiny_qwen2, tmp_path / "alone", other)
    assert len(sweeps) == 2
    second = folder_bytes(tmp_path / "second")
    assert second == folder_bytes(tmp_path / "alone")
    first = folder_bytes(tmp_path / "first")
    assert all(second[name] != first[name] for name in second if name.endswith(".safetensors"))


def test_gradients_of_tokens_are_added_where_they_are_asked_for(
    tmp_path: Path, tiny_llama: Path, sweeps: list[int]
) -> None:
    """A file without them is replaced, and the new one serves runs without them."""
    kept = tmp_path / "kept"
    rows = load_recipe("fast").override(
        {
            "calibration": {"samples": 24, "seq_len": 32},
            "sidecar": {"rank": 4, "tile_m": 0, "tile_n": 0},
            "gradients": {"row_power": 0.5},
        }
    )
    tokens = rows.override({"gradients": {"token_power": 0.5}})
    other = tokens.override({"gradients": {"token_power": 1.0, "shared": True}})
    for number, (chosen, expected) in enumerate(((rows, 1), (tokens, 2), (other, 2), (rows, 2))):
        out = tmp_path / str(number)
        quantize(tiny_llama, out, chosen, measurements=kept)
        assert len(sweeps) == expected
        assert len(list(kept.iterdir())) == 1
    quantize(tiny_llama, tmp_path / "alone", other)
    assert folder_bytes(tmp_path / "alone") == folder_bytes(tmp_path / "2")
    assert folder_bytes(tmp_path / "0") == folder_bytes(tmp_path / "3")


# What the key holds


def measuring(
    folder: Path,
    chosen: Recipe | None = None,
    *,
    device: str = "cpu",
    scale_dtype: torch.dtype = torch.bfloat16,
    first: int = 0,
) -> Measuring:
    source = ModelSource(folder)
    chosen = chosen or recipe()
    assert isinstance(chosen, AlternatingRecipe)
    group = ConfigGroup(targets=("Linear",), weights=chosen.weights, sidecar=chosen.sidecar)
    schemes = {name: group for name in source.block_linears() if name not in chosen.ignore}
    texts = load_calibration("python", source.tokenizer, chosen.calibration.samples, 32, 0)
    texts.tokens[0, 0] += first
    where = torch.device(device)
    return Measuring.of(source, schemes, chosen, texts, where, scale_dtype)


def key(*arguments: Any, **options: Any) -> str:
    return measuring(*arguments, **options).key()


def test_what_quantises_is_no_part_of_the_key(tiny_llama: Path) -> None:
    assert key(tiny_llama) == key(tiny_llama, recipe(**QUANTISING))


@pytest.mark.parametrize(
    "changes",
    [
        {"alternating": {"damping": 0.02}},
        {"alternating": {"scales": "absmax"}},
        {"weights": {"codebook": "int4"}},
        {"weights": {"group_size": 64}},
        {"weights": {"scale_bits": 8}},
        {"sidecar": {"tile_m": 32}},
        {"sidecar": {"tile_n": 64}},
        {"allocation": {"ranks": (0, 4)}},
        {"allocation": {"group_sizes": (32,)}},
        {"allocation": {"scale_bits": (6, 8)}},
        {"gradients": {"directions": 8}},
        {"calibration": {"seed": 1}},
        {"calibration": {"samples": 23}},
        {"ignore": ("model.layers.0.mlp.up_proj",)},
    ],
    ids=str,
)
def test_what_is_measured_is_part_of_the_key(
    tiny_llama: Path, changes: dict[str, dict[str, Any]]
) -> None:
    assert key(tiny_llama) != key(tiny_llama, recipe(**changes))


def test_so_are_text_and_device_and_scales_and_versions(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [
        key(tiny_llama),
        key(tiny_llama, first=1),
        key(tiny_llama, device="meta"),
        key(tiny_llama, scale_dtype=torch.float16),
        key(tiny_llama, recipe().without_budget()),
    ]
    monkeypatch.setattr(module.transformers, "__version__", "0.0")
    keys.append(key(tiny_llama))
    monkeypatch.setattr(module, "__version__", "0.0")
    keys.append(key(tiny_llama))
    monkeypatch.setattr(module, "block_dtype", lambda device: torch.float64)
    keys.append(key(tiny_llama))
    assert len(set(keys)) == len(keys)


def test_so_is_the_model(tmp_path: Path) -> None:
    """One weight of it, wherever it stands, and with the times of the file as they were too."""
    dense = write_dense(tmp_path / "dense", "llama")
    path, name = dense / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    before, stat = key(dense), path.stat()
    tensors = load_file(path)

    def changed(place: int, kept_time: bool) -> str:
        flat = tensors[name].flatten().clone()
        flat[place] += 1
        save_file(tensors | {name: flat.view_as(tensors[name])}, path, {"format": "pt"})
        if kept_time:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return key(dense)

    assert changed(0, False) != before
    assert changed(tensors[name].numel() // 2, True) != before
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key(dense) == before


# What can be wrong with the folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def renamed(path: Path) -> None:
    found = Measurements({"a": torch.ones(2)})
    found.save(path, "another key")


@pytest.mark.parametrize(
    ("damage", "words"), [(cut, "cannot be used"), (renamed, "not that of what it holds")]
)
def test_a_file_that_is_damaged_or_another_is_replaced(
    tmp_path: Path,
    tiny_llama: Path,
    sweeps: list[int],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    kept, said = tmp_path / "kept", list[str]()
    quantize(tiny_llama, tmp_path / "first", recipe(), measurements=kept)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    damage(file)
    quantize(
        tiny_llama,
        tmp_path / "again",
        recipe(),
        measurements=kept,
        progress=Progress(message=said.append),
    )
    assert any(str(file) in text and words in text for text in said), said
    assert len(sweeps) == 2
    assert file.read_bytes() == whole
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "first")


def test_one_run_measures_at_a_time(tmp_path: Path, tiny_llama: Path, sweeps: list[int]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    with (
        locked(kept / LOCK_NAME, kept),
        pytest.raises(SvskError, match="another run is under way"),
    ):
        quantize(tiny_llama, tmp_path / "out", recipe(), measurements=kept)
    assert sweeps == []


def test_folders_that_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from typer.testing import CliRunner

    (tmp_path / "file").write_text("")
    for folder, words in (
        (tmp_path / "file", "file: is a file, expected a folder"),
        (tiny_llama, "overlaps"),
        (tmp_path / "out" / "kept", "overlaps"),
        (tmp_path / "out.partial", "overlaps"),
        (tmp_path, "overlaps"),
    ):
        with pytest.raises(SvskError, match=f"--measurements .*{words}"):
            quantize(tiny_llama, tmp_path / "out", recipe(), measurements=folder)
    arguments = ["quantize", tiny_llama, tmp_path / "out", "--recipe", "fast"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--measurements", str(tmp_path / "m")])
    assert result.exit_code == 1
    assert "--measurements: no effect with recipe fast as given" in result.output
    assert not (tmp_path / "m").exists()


def test_measurements_survive_their_file(tmp_path: Path) -> None:
    curve = module.ErrorCurve(0.1 + 0.2, {(64, 6): 1.0, (32, 16): 1 / 3}, torch.rand(8))
    empty = module.ErrorCurve(0.0, {}, torch.zeros(0))
    found = Measurements(
        {"a.b": torch.rand(5), "a.c": torch.rand(3)},
        {"a.b": torch.rand(2, 3)},
        {"a.b": curve, "a.c": empty},
    )
    found.save(tmp_path / "kept.safetensors", "key")
    read = Measurements.load(tmp_path / "kept.safetensors", "key")
    for name in ("rows", "tokens"):
        ours, theirs = getattr(found, name), getattr(read, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name, ours in found.curves.items():
        theirs = read.curves[name]
        assert (ours.loss, ours.ratios) == (theirs.loss, theirs.ratios)
        assert torch.equal(ours.shares, theirs.shares)


@pytest.mark.parametrize(
    ("forward", "budget", "message"),
    [
        (
            lambda self, x: self.down_proj(self.up_proj(x)) + 0 * self.gate_proj(x).detach().mean(),
            True,
            "mlp.gate_proj: the model's output does not depend on it. Add it to --ignore",
        ),
        (
            lambda self, x: self.down_proj(self.up_proj(x)),
            False,
            "mlp.gate_proj: saw no calibration token, so it cannot be quantised. Add it to --ignor",
        ),
    ],
)
def test_linears_that_a_model_has_and_does_not_use(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forward: Callable[[Any, torch.Tensor], torch.Tensor],
    budget: bool,
    message: str,
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    without = load_recipe("fast").override({"calibration": {"samples": 24, "seq_len": 32}})
    with pytest.raises(SvskError, match=rf"model\.layers\.\d\.{message}"):
        quantize(tiny_llama, tmp_path / "out", recipe() if budget else without)
