# SPDX-License-Identifier: Apache-2.0
"""What is folded leaves the logits as they are, bit for bit; what cannot be is left alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from svsk_offline.calibration import BlockRunner, CalibrationSet, load_calibration
from svsk_offline.calibration.channel_maxima import collect_maxima
from svsk_offline.planning.key_channels import KeyChannels
from svsk_offline.planning.key_search import Attention, search_exponents
from svsk_offline.planning.smoothing import (
    Smoothing,
    key_exponents,
    outlier_exponents,
    plan_smoothing,
    smoothing_exponents,
)
from svsk_offline.recipe import SmoothingArgs
from svsk_offline.storage.decoder_blocks import linear_modules
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.fold import LARGEST_EXPONENT
from tests.support.format_builders import edit_json
from tests.support.tiny_models import FAMILIES, Family, write_dense

CPU = torch.device("cpu")
INPUTS = SmoothingArgs(alpha=0.7)
EVERYTHING = SmoothingArgs(alpha=0.7, keys=True)
BLOCKS = 2


def samples(source: ModelSource, count: int = 6) -> CalibrationSet:
    return load_calibration("python", source.tokenizer, count, 48, 0)


def plan(folder: Path, args: SmoothingArgs = EVERYTHING) -> tuple[ModelSource, Smoothing]:
    source = ModelSource(folder)
    return source, plan_smoothing(source, samples(source), args, CPU)


def uneven(folder: Path) -> Path:
    """A copy whose channels differ in scale, as those of real models do."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "up_proj.weight", "v_proj.weight", "k_proj.weight")):
            spread = torch.exp(1.5 * torch.randn(len(tensor), generator=generator)).to(tensor.dtype)
            tensors[name] = tensor * spread.reshape(-1, *[1] * (tensor.ndim - 1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def folded_folder(source: ModelSource, found: Smoothing, out: Path) -> Path:
    """The dense folder of the folded model."""
    shutil.copytree(source.folder, out)
    reader = source.folded(found.fold).tensors
    tensors = {name: reader.read(name) for name in reader.names}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_the_same_bits(tmp_path: Path, family: str) -> None:
    dense = uneven(write_dense(tmp_path / "dense", family))
    source, found = plan(dense, INPUTS)
    assert found.folded == {"norms": 2 * BLOCKS, "o": BLOCKS, "down": BLOCKS}
    assert not found.left
    folded = folded_folder(source, found, tmp_path / "folded")
    # Nothing that could be kept was left at 1.
    for exponents in (*found.fold.rows.values(), *found.fold.columns.values()):
        assert exponents.unique().numel() > 2
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(folded, dtype), logits(dense, dtype))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fine_factors_of_keys_leave_the_logits_but_for_rounding(
    tmp_path: Path, family: str
) -> None:
    dense = uneven(write_dense(tmp_path / "dense", family))
    source, found = plan(dense, SmoothingArgs(keys=True))
    assert found.folded == {"keys": BLOCKS}
    for exponents in found.fold.rows.values():
        assert torch.equal(exponents * 8, (exponents * 8).round())
        assert not torch.equal(exponents, exponents.round())
    folded = folded_folder(source, found, tmp_path / "folded")
    # In float64, so that nothing is rounded but what is stored.
    ours, reference = logits(folded, torch.float64), logits(dense, torch.float64)
    assert not torch.equal(ours, reference)
    assert (ours - reference).abs().max() < 1e-5 * reference.abs().max()


def test_the_logits_are_sensitive_to_a_factor(tmp_path: Path, tiny_llama: Path) -> None:
    """The comparison above can fail: one exponent of one channel changes bits."""
    source, found = plan(tiny_llama, INPUTS)
    name = "model.layers.0.mlp.down_proj.weight"
    found.fold.columns[name][7] += 1
    folded = folded_folder(source, found, tmp_path / "folded")
    assert not torch.equal(logits(folded, torch.float32), logits(tiny_llama, torch.float32))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outliers_alone_are_brought_down(tmp_path: Path, family: str) -> None:
    dense = uneven(write_dense(tmp_path / "dense", family))
    source, found = plan(dense, SmoothingArgs(above=4))
    assert found.folded == {"norms": 2 * BLOCKS, "o": BLOCKS, "down": BLOCKS}
    moved = torch.cat([found.fold.columns[name].flatten() for name in found.fold.columns])
    assert moved.min() == 0
    assert 0 < (moved > 0).float().mean() < 0.5
    folded = folded_folder(source, found, tmp_path / "folded")
    assert torch.equal(logits(folded, torch.bfloat16), logits(dense, torch.bfloat16))
    # What is over the multiple now was divided by the most that there is, or is so by rounding.
    _, after = plan(folded, SmoothingArgs(above=4))
    assert moved.max() == 2
    for name, exponents in after.fold.columns.items():
        assert not exponents[found.fold.columns[name] < 2].any()


@pytest.mark.parametrize("target", ["norms", "o", "down"])
def test_targets_are_those_named(tiny_qwen2: Path, target: str) -> None:
    args = SmoothingArgs.model_validate({"alpha": 0.5, "targets": [target]})
    _, found = plan(tiny_qwen2, args)
    assert set(found.folded) == {target}
    reader = {"norms": ("q_proj", "up_proj"), "o": ("o_proj",), "down": ("down_proj",)}[target]
    kinds = {name.split(".")[-2] for name in found.fold.columns}
    assert set(reader) <= kinds
    assert ("down_proj" in kinds) == (target == "down")


def test_factors_are_those_of_the_formula(tiny_llama: Path) -> None:
    """Against maxima taken from the whole model, and weights as stored."""
    alpha = 0.6
    source, found = plan(tiny_llama, SmoothingArgs(alpha=alpha))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen[name] = given[0].abs().flatten(0, -2).amax(0)

        return before

    for name, linear in linear_modules(model):
        linear.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(samples(source).tokens)
    weights = {name: linear.weight.abs().amax(0) for name, linear in linear_modules(model)}
    prefix = "model.layers.1"
    mlp = torch.maximum(weights[f"{prefix}.mlp.gate_proj"], weights[f"{prefix}.mlp.up_proj"])
    heads, dim = 2, 32  # key/value heads, each with two query heads
    shared = [
        values[f"{prefix}.self_attn.o_proj"].view(heads, 2, dim).amax(1).flatten()
        for values in (seen, weights)
    ]
    for name, maxima, columns in (
        ("mlp.down_proj", seen[f"{prefix}.mlp.down_proj"], weights[f"{prefix}.mlp.down_proj"]),
        ("mlp.gate_proj", seen[f"{prefix}.mlp.gate_proj"], mlp),
        ("self_attn.o_proj", *shared),
    ):
        factor = maxima.double() ** alpha / columns.double() ** (1 - alpha)
        logs = factor.log2()
        expected = (logs - logs.mean()).round()
        got = found.fold.columns[f"{prefix}.{name}.weight"]
        if name == "self_attn.o_proj":
            expected = expected.view(heads, 1, dim).expand(heads, 2, dim).flatten()
            rows = found.fold.rows[f"{prefix}.self_attn.v_proj.weight"]
            assert torch.equal(got.view(heads, 2, dim)[:, 1].flatten(), -rows)
        # A value between two powers may go either way with bfloat16 units.
        assert (got.double() - expected).abs().max() <= 1
        assert (got.double() == expected).float().mean() > 0.97
    norm = found.fold.rows[f"{prefix}.post_attention_layernorm.weight"]
    assert torch.equal(norm, -found.fold.columns[f"{prefix}.mlp.up_proj.weight"])


def test_exponents() -> None:
    maxima, weights = torch.tensor([8.0, 0.0, 2.0, 2.0]), torch.tensor([0.5, 1.0, 0.5, 0.0])
    # 0.5 (3 + 1) = 2 and 0.5 (1 + 1) = 1, less their mean; 0 where nothing is known
    assert smoothing_exponents(maxima, weights, 0.5).tolist() == [0, 0, 0, 0]
    assert smoothing_exponents(maxima, weights, 1.0).tolist() == [1, 0, -1, 0]
    assert smoothing_exponents(torch.zeros(3), torch.ones(3), 0.5).tolist() == [0, 0, 0]
    far = smoothing_exponents(torch.tensor([1e30, 1e-30]), torch.ones(2), 1.0)
    assert far.tolist() == [LARGEST_EXPONENT, -LARGEST_EXPONENT]
    # The median is 2: 16 is over 2 times it by 2 steps, the most; 5.7 by half of one or more, 5.5
    # by less.
    maxima = torch.tensor([16.0, 0.0, 2.0, 5.7, 2.0, 1.0, 1.0])
    assert outlier_exponents(maxima, 2.0).tolist() == [2, 0, 0, 1, 0, 0, 0]
    assert outlier_exponents(maxima.where(maxima != 5.7, 5.5), 2.0).tolist()[3] == 0
    assert outlier_exponents(torch.zeros(3), 2.0).tolist() == [0, 0, 0]
    assert outlier_exponents(torch.tensor([1e38, 1e-30, 1e-30]), 1.0)[0] == 2
    # Each head is centred for itself.
    keys = torch.tensor([4.0, 1.0, 64.0, 16.0])
    assert key_exponents(keys, 2).tolist() == [1, -1, 1, -1]
    # log2 3 is 1.58: 0.79 over the mean of it and 0, to the nearest eighth.
    assert key_exponents(torch.tensor([3.0, 1.0]), 1).tolist() == [0.75, -0.75]


def keys_of(folder: Path) -> list[torch.Tensor]:
    """Keys after rotary of each layer, [samples, heads, tokens, head_dim]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        cache = model(samples(ModelSource(folder)).tokens, use_cache=True).past_key_values
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_keys_are_evened_out(tmp_path: Path, family: str) -> None:
    """What a cache stores, after rotary: from biases (Qwen2) or norms (Qwen3) of any size."""
    dense = write_dense(tmp_path / "dense", family)
    tensors = load_file(dense / "model.safetensors")
    name = "k_norm.weight" if family == "qwen3" else "k_proj.bias"
    for key in tensors:
        if key.endswith(name):
            tensors[key][3] = 60.0
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    source, found = plan(dense, SmoothingArgs(keys=True))
    assert found.folded == {"keys": BLOCKS}
    folded = folded_folder(source, found, tmp_path / "folded")
    ours, reference = logits(folded, torch.float32), logits(dense, torch.float32)
    assert (ours - reference).abs().max() < 1e-4 * reference.abs().max()

    def spread(folder: Path) -> float:
        maxima = [keys.abs().amax((0, 2)) for keys in keys_of(folder)]
        return max(float(layer.amax() / layer.median()) for layer in maxima)

    assert spread(folded) < 0.25 * spread(dense)
    for layer in found.keys:
        assert layer.folded_ratio is not None
        assert layer.folded_ratio < 0.25 * layer.ratio
        assert layer.largest > 4 * layer.median


@pytest.mark.parametrize(("family", "head_dim"), [("qwen2", 32), ("qwen3", 64), ("qwen2", 16)])
def test_factors_of_keys_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, head_dim: int
) -> None:
    """From those of the formula, which stay where a head is no whole blocks of q4_0."""
    settings = {**FAMILIES[family].settings, "head_dim": head_dim, "hidden_size": 4 * head_dim}
    dense = uneven(write_dense(tmp_path / "dense", Family(family, settings)))
    given, chosen = [], []

    def search(attention: Attention, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        assert attention.keys.shape[-1] == head_dim
        found = search_exponents(attention, rows, index)
        given.append(rows)
        chosen.append(found[:, index].flatten())
        return found

    monkeypatch.setattr("svsk_offline.planning.smoothing.search_exponents", search)
    _, found = plan(dense, SmoothingArgs(keys=True))
    assert found.folded == {"keys": BLOCKS}
    assert len(chosen) == (0 if head_dim == 16 else BLOCKS)
    name = "k_norm" if family == "qwen3" else "k_proj"
    for block, exponents in enumerate(chosen):
        folded = found.fold.rows[f"model.layers.{block}.self_attn.{name}.weight"]
        assert torch.equal(folded, -exponents)
        assert not torch.equal(given[block].flatten().unique(), exponents.unique())


def test_key_channels() -> None:
    maxima = torch.tensor([8.0, 2.0, 2.0, 0.5, 0.5, 0.25])
    layer = KeyChannels.of(3, maxima, 2, torch.tensor([2, 0, 0, 0, 0, -1], dtype=torch.int8))
    assert (layer.block, layer.largest, layer.ratio, layer.folded_ratio) == (3, 8.0, 4.0, 1.0)
    nothing = KeyChannels.of(0, torch.zeros(4), 1, None)
    assert (nothing.ratio, nothing.folded_ratio) == (0.0, None)
    assert KeyChannels.of(0, torch.tensor([1.0, 0.0, 0.0]), 1, None).ratio == pytest.approx(1e6)


LEFT = {
    # Norms of 1 plus what is stored.
    "gemma2": {"o", "down", "keys"},
    "gemma3": {"o", "down"},
    # Squares the outputs of up_proj, and its norms are of 1 plus what is stored.
    "nemotron": {"o", "keys"},
    # Norms behind attention and MLP: q, k, v, gate and up read the residual stream.
    "olmo2": {"o", "down", "keys"},
    # Attention and MLP read one norm.
    "cohere": {"norms", "o", "down", "keys"},
    # gate and up, and q, k and v, are one matrix.
    "phi3": {"norms"},
    # q, k and v are one matrix, no gate.
    "falcon": {"norms"},
    # Partial rotary, LayerNorm with biases.
    "stablelm": {"norms", "o", "down", "keys"},
    # A quarter or half of each head is turned, in neighbouring pairs.
    "glm4": {"norms", "o", "keys"},
    "starcoder2": {"norms", "o", "keys"},
}


@pytest.mark.parametrize("family", sorted(LEFT))
def test_what_cannot_be_folded_is_left_alone(tmp_path: Path, family: str) -> None:
    """And listed; the rest leaves the logits as they are."""
    dense = uneven(write_dense(tmp_path / "dense", family))
    source, found = plan(dense)
    assert set(found.folded) == LEFT[family], found.left
    assert bool(found.left) == (LEFT[family] != {"norms", "o", "down", "keys"})
    # Keys are folded up to rounding: they are left out of the model that is compared bit by bit.
    inputs = plan_smoothing(source, samples(source), INPUTS, CPU)
    assert set(inputs.folded) == LEFT[family] - {"keys"}
    folded = folded_folder(source, inputs, tmp_path / "folded")
    assert torch.equal(logits(folded, torch.float32), logits(dense, torch.float32))


def test_matrices_of_two_blocks_are_left_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor that fills two parameters cannot be scaled for one of them."""
    source = ModelSource(tiny_llama)
    first, second = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(BLOCKS))
    source.map.sources[second] = first
    found = plan_smoothing(source, samples(source), SmoothingArgs(alpha=0.5), CPU)
    assert found.folded == {"norms": 4, "o": 2}
    assert [key for key in found.left if key.startswith("mlp.down_proj")] == [
        "mlp.down_proj: its weights are not stored for it alone"
    ]


def test_keys_that_other_blocks_read_are_left_alone(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    edit_json(dense / "config.json", lambda config: config.update(num_kv_shared_layers=1))
    _, found = plan(dense)
    assert set(found.folded) == {"norms", "down"}
    assert all("other blocks read" in key for key in found.left)


def test_maxima_over_several_batches(tiny_qwen2: Path) -> None:
    """Of every sample, whatever runs at a time; linears of one input share theirs."""
    source = ModelSource(tiny_qwen2)
    found = []
    for tokens in (48, 10_000):
        runner = BlockRunner(source, samples(source), CPU, torch.float32, batch_tokens=tokens)
        block = source.blocks[1][0]
        source.load(block, "model.layers.0.", torch.float32, CPU)
        found.append(collect_maxima(runner, 0, block, ["self_attn.k_proj"]))
        source.unload(block)
    for one, other in zip(*(part.inputs for part in found), strict=True):
        assert one.linears == other.linears
        assert one.norm == other.norm
        assert torch.allclose(one.maxima, other.maxima, rtol=1e-5)
    written = [part.outputs["self_attn.k_proj"] for part in found]
    assert written[0].count == written[1].count == samples(source).tokens.numel()
    for attribute in ("maxima", "squares", "powers"):
        one, other = (getattr(channels, attribute) for channels in written)
        assert torch.allclose(one, other, rtol=1e-4)
    assert [read.linears for read in found[0].inputs] == [
        [f"self_attn.{name}_proj" for name in "qkv"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert [read.norm for read in found[0].inputs] == [
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ]


def test_saved_and_loaded(tmp_path: Path, tiny_qwen2: Path) -> None:
    _, found = plan(tiny_qwen2)
    found.save(tmp_path / "f.safetensors")
    again = Smoothing.load(tmp_path / "f.safetensors")
    assert again.fold.digest == found.fold.digest
    assert again.record() == found.record()
    assert again.lines() == found.lines()
