# SPDX-License-Identifier: Apache-2.0
"""Models that differ from Llama in what is stored, or in how blocks are called.

Run by blocks, and quantised.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner
from svsk_offline.calibration.block_runner import StandIn
from svsk_offline.calibration.text import CalibrationSet
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import validate_against_architecture
from svsk_vllm.format import Checkpoint
from tests.support.tiny_models import HYBRID_FAMILIES, VOCAB, Family, write_dense

CPU = torch.device("cpu")
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
FAMILIES = {
    # A buffer that is not stored scales the embedding; attention logits are capped.
    "gemma2": Family(
        "gemma2", {"head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 2.0}
    ),
    "gemma3_text": Family("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    # Stored under other names than the model class's.
    "gpt_neox": Family("gpt_neox"),
    # A norm, or positions, before the blocks.
    "bloom": Family("bloom", {"n_layer": 2, "n_head": 4}),
    "opt": Family("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "gpt_neo": Family(
        "gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    ),
    # Blocks return a tuple; of two.
    "falcon": Family("falcon"),
    "bamba": Family("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    # A mask with as many rows as samples.
    "xglm": Family("xglm", {"d_model": 128, "ffn_dim": 256, "num_layers": 2, "attention_heads": 4}),
    # The kernel of a convolution has three dimensions; linear attention that is stored in parts.
    "qwen3_5_text": HYBRID_FAMILIES["qwen3_5"],
    "falcon_h1": HYBRID_FAMILIES["falcon_h1"],
    "granite4": HYBRID_FAMILIES["granite4"],
    "olmo_hybrid": Family(
        "olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"], **LINEAR_ATTENTION}
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / request.param, FAMILIES[request.param])


def sample_tokens(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))


def logits_of(folder: Path, **kwargs: Any) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(sample_tokens()).logits
    return logits


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def run_by_blocks(source: ModelSource) -> torch.Tensor:
    """Logits with one block in memory at a time, two samples at a time."""
    tokens = sample_tokens()
    name, blocks = source.blocks
    runner = BlockRunner(
        source, CalibrationSet(tokens, "random", ""), CPU, torch.float32, batch_tokens=48
    )
    for index, block in enumerate(blocks):
        source.load(block, f"{name}.{index}.", torch.float32, CPU)
        runner.advance(index, block)
        source.unload(block)
    rows = []
    given = StandIn(blocks[-1], lambda *_: runner.hidden[row : row + 1], members=runner.members)
    with (
        source.replaced_blocks([given]) as model,
        source.loaded_outside(torch.float32, CPU),
        torch.no_grad(),
    ):
        for row in range(len(tokens)):
            rows.append(model(input_ids=tokens[row : row + 1], use_cache=False).logits[0])
    return torch.stack(rows)


def test_blocks_one_at_a_time_are_the_model(dense: Path) -> None:
    """The second time as well: what is not stored is still there after weights were dropped."""
    source = ModelSource(dense)
    expected = logits_of(dense, attn_implementation="eager")
    for _ in range(2):
        torch.testing.assert_close(run_by_blocks(source), expected, rtol=1e-3, atol=1e-4)


def test_quantized_with_gradients_and_loaded_again(dense: Path, tmp_path: Path) -> None:
    recipe = load_recipe("best").override(
        {
            "calibration": {"samples": 16, "seq_len": 64},
            "allocation": {"ranks": (2, 4)},
            "alternating": {"rounds": 1, "polish": 1},
        }
    )
    quantize(dense, tmp_path / "out", recipe)
    assert validate_against_architecture(tmp_path / "out") == []
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.embedding is not None
    ranks = {s.rank for s in checkpoint.linears.values() if s.scheme.weights.codebook != "int8"}
    # vLLM moves BLOOM's rows, and not those of a sidecar.
    assert ranks <= ({0} if dense.name == "bloom" else {2, 4})
    expected = logits_of(dense, attn_implementation="eager")
    noise = kl(expected, torch.zeros_like(expected))
    # Linear attention of random weights is a steep function: its states are products over all
    # tokens.
    bound = 0.9 if dense.name == "qwen3_5_text" else 0.5
    assert (
        0 < kl(expected, logits_of(tmp_path / "out", attn_implementation="eager")) < bound * noise
    )


def test_names_in_the_checkpoint_are_those_of_the_source(tmp_path: Path) -> None:
    """GPT-NeoX is stored with embed_out, its class has lm_head: loaders expect what is on disk."""
    dense = write_dense(tmp_path / "dense", FAMILIES["gpt_neox"])
    recipe = load_recipe("fast").override(
        {"calibration": {"samples": 16, "seq_len": 64}, "sidecar": {"rank": 0}}
    )
    quantize(dense, tmp_path / "out", recipe)
    before = set(ModelSource(dense).tensors.names)
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert "embed_out.weight" in before
    assert "embed_out.weight_packed" in stored
    assert {
        name.removesuffix(".weight_packed") + ".weight"
        for name in stored
        if name.endswith("_packed")
    } <= before


def test_arguments_that_depend_on_the_tokens_are_refused(tmp_path: Path) -> None:
    settings = {"head_dim": 32, "global_head_dim": 32, "vocab_size_per_layer_input": VOCAB}
    dense = write_dense(tmp_path / "dense", Family("gemma4_text", settings))
    with pytest.raises(SvskError, match="arguments that depend on the tokens"):
        quantize(dense, tmp_path / "out", "fast")


def test_a_model_that_runs_otherwise_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model class that unpacks four things, or fails for reasons of its own."""
    source = ModelSource(write_dense(tmp_path / "dense"))

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("needs a\nGPU")

    monkeypatch.setattr(type(source.model), "forward", fail)
    with pytest.raises(
        SvskError, match=r"one decoder block at a time \(RuntimeError: needs a GPU\)"
    ):
        BlockRunner(source, CalibrationSet(sample_tokens(), "random", ""), CPU, torch.float32)


def test_a_matrix_that_is_made_when_loading_is_not_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored as one matrix, split by transformers: no name that both loaders know."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    dense = write_dense(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for layer in (0, 1):
        parts = [
            tensors.pop(f"model.layers.{layer}.mlp.{kind}_proj.weight") for kind in ("gate", "up")
        ]
        tensors[f"model.layers.{layer}.mlp.both.weight"] = torch.cat(parts)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    split = WeightConverter(
        "mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]
    )
    known = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: [split] if kind == "llama" else known(kind),
    )
    with pytest.raises(
        SvskError, match=r"gate_proj\.weight is made from model\.layers\.0\.mlp\.both\.weight"
    ):
        quantize(dense, tmp_path / "out", "fast")
    torch.testing.assert_close(
        run_by_blocks(ModelSource(dense)), logits_of(dense), rtol=1e-3, atol=1e-4
    )
    recipe = load_recipe("fast").override(
        {"calibration": {"samples": 16, "seq_len": 64}, "ignore": ("re:.*(gate|up)_proj",)}
    )
    quantize(dense, tmp_path / "out", recipe)
    assert kl(logits_of(dense), logits_of(tmp_path / "out")) < 0.2
