# SPDX-License-Identifier: Apache-2.0
"""`svsk export --to compressed-tensors`: what is stored, and what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svsk_offline.export.compressed_tensors import export_compressed_tensors
from svsk_vllm.format import Checkpoint, EmbeddingArgs, SvskError, dequantize, restored_weight
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.tiny_models import (
    EMBEDDING,
    VOCAB,
    scheme,
    table_schemes,
    write_dense,
    write_random_svsk,
)


def checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Path:
    schemes = {
        "default": scheme("Linear", rank=3, **changes),
        "o": scheme(r"re:.*\.o_proj$", group_size=32),
    }
    return write_random_svsk(
        write_dense(folder / "dense", family), folder / "svsk", schemes=schemes
    )


@pytest.mark.parametrize("scale_bits", [16, 6])
def test_base_of_a_checkpoint(tmp_path: Path, scale_bits: ScaleBits) -> None:
    """Scales in two levels are multiplied out."""
    source = Checkpoint(checkpoint(tmp_path, scale_bits=scale_bits))
    out = export_compressed_tensors(source.folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    groups = {
        g["weights"]["group_size"]: set(g["targets"]) for g in config["config_groups"].values()
    }
    assert groups == {
        size: {name for name, spec in source.linears.items() if spec.group_size == size}
        for size in (32, 64)
    }
    assert config["ignore"] == ["lm_head", EMBEDDING]
    tensors = load_file(out / "model.safetensors")
    assert not [name for name in tensors if "sidecar" in name]
    for name, linear in source.iter_linears():
        stored = linear.to_tensors()
        assert torch.equal(tensors[f"{name}.weight_packed"], stored[f"{name}.weight_packed"])
        assert tensors[f"{name}.weight_scale"].dtype == torch.bfloat16
        assert torch.equal(tensors[f"{name}.weight_scale"], linear.scale)
        assert f"{name}.weight_row_scale" not in tensors
        assert tensors[f"{name}.weight_shape"].tolist() == [linear.spec.n, linear.spec.k]
    assert {name for name in tensors if name in source.dense_names} == set(source.dense_names)
    assert (out / "tokenizer.json").exists()


def test_loaded_by_transformers_as_the_base(tmp_path: Path) -> None:
    """Without this project's loader: the weights are the base's, rounded to the model's dtype."""
    source = Checkpoint(checkpoint(tmp_path, "qwen2"))
    out = export_compressed_tensors(source.folder, tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    for name, linear in source.iter_linears():
        base = dequantize(linear, with_sidecar=False).to(torch.bfloat16)
        reference.get_submodule(name).weight.data = base
    tokens = torch.arange(VOCAB).view(2, -1)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_tables_are_dense_and_unquantised_linears_ignored(tmp_path: Path) -> None:
    source = write_random_svsk(
        write_dense(tmp_path / "dense", "qwen2"),
        tmp_path / "svsk",
        schemes={"default": scheme("Linear", rank=2), **table_schemes("quad8", "int8")},
        ignore=(r"re:.*\.0\.self_attn",),
        embedding=EmbeddingArgs(module=EMBEDDING),
        shards=3,
    )
    out = export_compressed_tensors(source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    attention = [f"model.layers.0.self_attn.{p}_proj" for p in "koqv"]
    assert config["ignore"] == ["lm_head", EMBEDDING, *attention]
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    for table in ("lm_head", EMBEDDING):
        expected = restored_weight(Checkpoint(source).read_linear(table))
        assert torch.equal(weights[f"{table}.weight"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codebook": "quad8"},
            "down_proj has codebook 'quad8', W4A16 needs 'int4'.*--codebook int4",
        ),
        (
            {"group_size": 16},
            r"down_proj has groups of 16, W4A16 kernels take \(32, 64\).*--to dense",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = checkpoint(tmp_path, **changes)
    with pytest.raises(SvskError, match=message):
        export_compressed_tensors(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "svsk"]
