# SPDX-License-Identifier: Apache-2.0
"""The sweep of gradients, block by block, against a backward pass through the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import InputStatistics, OutputGradients, load_calibration
from svsk_offline.calibration.gradients import draw_labels
from svsk_offline.calibration.room import Room
from svsk_offline.calibration.way_back import Observed
from svsk_offline.storage.decoder_blocks import linear_modules
from svsk_offline.storage.dense_model import ModelSource
from tests.support.sweeps import sweep
from tests.support.tiny_models import write_dense

CPU = torch.device("cpu")


def whole_model(
    folder: Path, tokens: torch.Tensor, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output gradient of every linear, by a backward pass per sample."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def hook(name: str) -> Any:
        def after(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs, gradients = found.setdefault(name, ([], []))
            inputs.append(given[0].detach())
            output.register_hook(lambda gradient: gradients.append(gradient))

        return after

    for name, module in linear_modules(model.model):
        module.register_forward_hook(hook(name))
    for sample in tokens:
        logits = model(input_ids=sample.unsqueeze(0)).logits[0]
        labels = draw_labels(logits.detach().softmax(-1), generator)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return {
        name: (torch.cat(inputs), torch.cat(gradients))
        for name, (inputs, gradients) in found.items()
    }


@pytest.mark.parametrize(("family", "limit"), [("llama", 1 << 30), ("qwen2", 0)])
def test_sweep_equals_one_backward_pass(tmp_path: Path, family: str, limit: int) -> None:
    """Tied and untied heads, hidden states in memory and in a file; inputs of two kinds."""
    folder = write_dense(tmp_path / "dense", family, dtype=torch.float32)
    source = ModelSource(folder)
    texts = load_calibration("python", source.tokenizer, 5, 24, 0)
    expected = whole_model(folder, texts.tokens, seed=3)
    gradients: dict[str, OutputGradients] = {}
    statistics: list[dict[str, InputStatistics]] = [{}, {}]
    order: list[int] = []

    def visit(index: int, block: nn.Module, observed: Observed) -> None:
        assert not block.weight.is_meta if hasattr(block, "weight") else True
        order.append(index)
        own = observed.gradients
        gradients.update({f"layers.{index}.{name}": value for name, value in own.items()})
        for kind, given in zip(statistics, (observed.fitted, observed.held_out), strict=True):
            kind.update({f"layers.{index}.{name}": value for name, value in given.items()})

    for _ in range(2):  # the model's skeleton is left as it was found
        order.clear()
        sweep(source, texts, visit, held_out=2, seed=3, room=Room(limit, None), scratch=tmp_path)
        assert order == [1, 0]
    assert gradients.keys() == expected.keys()
    for name, (inputs, gradient) in expected.items():
        squares = gradient.square()
        torch.testing.assert_close(gradients[name].tokens, squares.sum(-1), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(
            gradients[name].rows, squares.mean((0, 1)), rtol=1e-3, atol=1e-10
        )
        own = gradients[name]
        for moment, part in ((own.fitted, slice(3)), (own.held_out, slice(3, 5))):
            late = gradient[part, 4:].flatten(0, 1)  # the first tokens are sinks
            assert moment is not None
            unit = moment.hessian.trace() / (late.T @ late).trace()
            size = 1e-4 * float(late.square().sum())
            torch.testing.assert_close(moment.hessian / unit, late.T @ late, rtol=1e-3, atol=size)
        for kind, part in zip(statistics, (slice(3), slice(3, 5)), strict=True):
            weights = squares[part].sum(-1).flatten()
            rows = inputs[part].flatten(0, 1)
            hessian = rows.T @ (rows * weights.unsqueeze(1)) / weights.sum()
            torch.testing.assert_close(
                kind[name].hessian, hessian, rtol=1e-3, atol=1e-4 * float(hessian.max())
            )
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_labels_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0]).expand(20_000, 5)
    shares = torch.bincount(draw_labels(probabilities, generator), minlength=5) / 20_000
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.015)
    assert not shares[0]
    assert not shares[4]


def test_token_weights() -> None:
    """A token of weight w counts like w copies of it.

    First tokens are counted apart, without weights.
    """
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 2, 0, 3], [1, 1, 1, 1], [0, 0, 2, 1]])
    weighted = InputStatistics(8, CPU, full=True, first=True)
    weighted.add(x[:2], weights[:2])
    weighted.add(x[2:], weights[2:])
    copies = x.flatten(0, 1).repeat_interleave(weights.flatten().long(), 0)
    torch.testing.assert_close(weighted.hessian, copies.T @ copies / len(copies))
    torch.testing.assert_close(weighted.first_hessian, x[:, 0].T @ x[:, 0] / 3)


@pytest.mark.parametrize("moments", [False, True])
def test_gradients_that_are_not_finite_are_refused(tmp_path: Path, moments: bool) -> None:
    folder = write_dense(tmp_path / "dense", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # finite, which no logit is then
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = ModelSource(folder)
    texts = load_calibration("python", source.tokenizer, 2, 24, 0)
    with pytest.raises(
        SvskError,
        match=r"model\.layers\.1\.mlp\.down_proj: its output's gradient is not finite on the calib",
    ):
        sweep(source, texts, lambda *_: None, moments=moments)
