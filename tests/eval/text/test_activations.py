# SPDX-License-Identifier: Apache-2.0
"""Activations of few bits: each kind against its levels, written out, and `svsk eval`."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text.activations import ACTIVATIONS, rounded_inputs
from svsk_eval.text.models import load_model
from svsk_kernels.naive import round_activations
from tests.support.tiny_models import write_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "dense", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The rate of stones in a tin is not here. " * 40)
    return path


def some(*shape: int) -> torch.Tensor:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs[0] = 0
    inputs[1, 0] = 40
    return inputs


def e4m3() -> torch.Tensor:
    """All finite values of E4M3: bias 7, subnormals in steps of 2^-9, no infinity."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive = torch.tensor([*subnormal, *normal[:-1]])  # the last is NaN
    return torch.cat([-positive.flip(0), positive])


def e2m1() -> torch.Tensor:
    """All values of E2M1: bias 1."""
    normal = [(1 + m / 2) * 2.0 ** (e - 1) for e in (1, 2, 3) for m in (0, 1)]
    positive = torch.tensor([0.0, 0.5, *normal])
    return torch.cat([-positive.flip(0), positive])


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[(values.unsqueeze(-1) - levels).abs().argmin(-1)]


@pytest.mark.parametrize(("kind", "width"), [("int8", 128), ("int8-g64", 64)])
def test_int8_is_the_nearest_of_255_levels(kind: str, width: int) -> None:
    inputs = some(4, 128)
    result = ACTIVATIONS[kind].rounded(inputs)
    for row, ours in zip(inputs.view(-1, width), result.view(-1, width), strict=True):
        levels = torch.arange(-127, 128) * (float(row.abs().max()) / 127)
        assert torch.allclose(ours, nearest(row, levels), atol=1e-6)


def test_int8_by_group_is_what_the_kernel_multiplies() -> None:
    inputs = some(5, 192)
    assert torch.equal(ACTIVATIONS["int8-g64"].rounded(inputs), round_activations(inputs).float())


def test_fp8_is_the_nearest_of_its_values() -> None:
    inputs = some(4, 48)
    result = ACTIVATIONS["fp8"].rounded(inputs)
    assert not result[0].any()
    for row, ours in itertools.islice(zip(inputs, result, strict=True), 1, None):
        scale = float(row.abs().max()) / 448
        assert torch.allclose(ours, nearest(row / scale, e4m3()) * scale, rtol=1e-6, atol=1e-9)


def test_nvfp4_is_the_nearest_of_its_values() -> None:
    inputs = some(4, 48)
    result = ACTIVATIONS["nvfp4"].rounded(inputs)
    whole = float(inputs.abs().max()) / (6 * 448)
    for row, ours in zip(inputs.view(-1, 16), result.view(-1, 16), strict=True):
        step = float(nearest(row.abs().max() / 6 / whole, e4m3())) * whole
        expected = nearest(row / step, e2m1()) * step if step else torch.zeros(16)
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-9)


def test_ties_of_nvfp4_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    inputs = torch.cat([ties, -ties, torch.tensor([6.0, 6 * 448 / 448])]).unsqueeze(0)
    # The tensor's largest is 6, so its scale is 1 / 448, and that of the one block 448.
    evens = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.allclose(ACTIVATIONS["nvfp4"].rounded(inputs)[0, :14], torch.cat([evens, -evens]))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_shape_and_dtype_stay(kind: str) -> None:
    rounded = ACTIVATIONS[kind].rounded(torch.ones(2, 3, 64, dtype=torch.bfloat16))
    assert (rounded.shape, rounded.dtype) == ((2, 3, 64), torch.bfloat16)
    assert torch.allclose(rounded.float(), torch.ones(2, 3, 64), rtol=2**-8)


def test_inputs_that_a_kind_cannot_divide(dense: Path) -> None:
    model = load_model(dense, device="cpu")
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(100, 128)
    with (
        pytest.raises(
            EvalError,
            match=r"--activations nvfp4: .*down_proj has 100 inputs, which is no multiple",
        ),
        rounded_inputs(model, dense, "nvfp4"),
    ):
        pass


def test_command(dense: Path, text: Path, tmp_path: Path) -> None:
    command = ["eval", str(dense), "--reference", str(dense), "--text", str(text)]
    command += ["--chunks", "2", "--seq-len", "64"]
    files = [tmp_path / f"{kind}.json" for kind in ("fp8", "nvfp4")]
    kl = []
    for file in files:
        options = ["--activations", file.stem, "--json", str(file)]
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        assert f"rounded inputs, {file.stem}" in done.output
        stored = json.loads(file.read_text())
        assert stored["activations"] == file.stem
        kl.append(stored["kl_mean"])
    assert 0 < kl[0] < 0.2 * kl[1]
    compared = CliRunner().invoke(app, ["compare", *map(str, files)], env={"COLUMNS": "1000"})
    assert compared.exit_code == 0, compared.output
    assert "weights: activations fp8 in" in compared.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--activations", "int4"],
            "--activations int4: expected one of int8, int8-g64, fp8, nvfp4",
        ),
        (["--activations", "int8", "--engine", "vllm"], "emulated with --engine hf only"),
    ],
)
def test_refused(dense: Path, text: Path, options: list[str], message: str) -> None:
    command = ["eval", str(dense), "--text", str(text), *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "1000"})
    assert done.exit_code == 1
    assert message in f"{done.output} {done.exception}"
