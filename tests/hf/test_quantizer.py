# SPDX-License-Identifier: Apache-2.0
"""transformers loads an SVSK checkpoint as the dense folder it stands for, bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

from svsk_vllm.format import Checkpoint, ShardedReader, dequantize, restored_weight
from svsk_vllm.hf.quantizer import SvskHfConfig, SvskHfQuantizer, register_with_transformers
from tests.hf.loading import (
    MOE,
    Q_PROJ,
    Folders,
    MakeFolders,
    assert_same,
    load,
    logits,
)
from tests.support.format_builders import edit_tensors
from tests.support.tiny_models import (
    FAMILIES,
    default_schemes,
    scheme,
    write_dense,
    write_random_svsk,
    write_restored,
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_restored_model(
    folders: MakeFolders, family: str, dtype: torch.dtype
) -> None:
    made = folders(family, torch.bfloat16)
    model, reference = load(made.svsk, dtype=dtype), load(made.restored, dtype=dtype)
    assert_same(model, reference)
    found = logits(model)
    assert found.dtype == dtype
    assert torch.equal(found, logits(reference))
    # The checkpoint is not the model it was made from, so equality is not by accident.
    assert (found - logits(load(made.dense, dtype=dtype))).float().std() > 0.05


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32], ids=str)
def test_float16_checkpoint(folders: MakeFolders, dtype: Any) -> None:
    made = folders("qwen3", torch.float16)
    model = load(made.svsk, dtype=dtype)
    assert model.dtype == (torch.float16 if dtype == "auto" else dtype)
    assert torch.equal(logits(model), logits(load(made.restored, dtype=dtype)))


def test_dtype_defaults_to_the_checkpoints(qwen2: Folders) -> None:
    assert {parameter.dtype for parameter in load(qwen2.svsk).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_restored_weight_is_w_hat_rounded_once(folders: MakeFolders, dtype: torch.dtype) -> None:
    linear = Checkpoint(folders("qwen3", dtype).svsk).read_linear(Q_PROJ)
    weight = restored_weight(linear)
    assert weight.dtype == dtype
    assert torch.equal(weight, dequantize(linear).to(dtype))


def test_float32_request_gives_the_rounded_weights(qwen2: Folders) -> None:
    weight = load(qwen2.svsk, dtype=torch.float32).get_parameter(f"{Q_PROJ}.weight")
    exact = dequantize(Checkpoint(qwen2.svsk).read_linear(Q_PROJ))
    assert torch.equal(weight, exact.bfloat16().float())
    assert not torch.equal(weight, exact)


def test_generate(qwen2: Folders) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2.svsk)
    inputs = tokenizer("the cat sat on the hat", return_tensors="pt")
    model, reference = load(qwen2.svsk), load(qwen2.restored)
    tokens = model.generate(**inputs, do_sample=False, min_new_tokens=16, max_new_tokens=16)
    assert torch.equal(
        tokens, reference.generate(**inputs, do_sample=False, min_new_tokens=16, max_new_tokens=16)
    )
    assert tokens.shape[1] == inputs.input_ids.shape[1] + 16
    assert len(set(tokens[0, -16:].tolist())) > 4
    assert tokenizer.decode(tokens[0]).startswith("the cat sat on the hat")


def test_biases_are_kept(qwen2: Folders) -> None:
    stored = ShardedReader(qwen2.dense)
    model = load(qwen2.svsk)
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{projection}.bias"
        assert torch.equal(model.get_parameter(name), stored.read(name))
        assert stored.read(name).abs().max() > 0.1


def test_tied_embedding_stays_tied(folders: MakeFolders) -> None:
    made = folders("llama", torch.bfloat16)
    model = load(made.svsk)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(
        model.lm_head.weight, ShardedReader(made.dense).read("model.embed_tokens.weight")
    )


def test_targeted_head_tied_to_the_embedding(folders: MakeFolders, tmp_path: Path) -> None:
    made = folders("llama", torch.bfloat16)
    assert_same(load(write_random_svsk(made.dense, tmp_path, ignore=())), load(made.restored))


def test_targeted_head_tied_to_the_embedding_and_stored_again(
    folders: MakeFolders, tmp_path: Path
) -> None:
    made = folders("llama", torch.bfloat16)
    svsk = write_random_svsk(made.dense, tmp_path, ignore=())
    embedding = ShardedReader(made.dense).read("model.embed_tokens.weight")
    edit_tensors(svsk, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert_same(load(svsk), load(made.restored))


def test_the_loaded_model_is_an_ordinary_one(qwen2: Folders) -> None:
    model = load(qwen2.svsk)
    assert all(
        type(module) is torch.nn.Linear
        for name, module in model.named_modules()
        if name.endswith("_proj")
    )
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert not model.training


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"dtype": "float16", "device_map": "cpu"},
    ],
    ids=str,
)
def test_loading_options(qwen2: Folders, options: dict[str, Any]) -> None:
    assert_same(load(qwen2.svsk, **options), load(qwen2.restored, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offloading_to_disk(qwen2: Folders, tmp_path: Path, dtype: torch.dtype) -> None:
    device_map = {"model.layers.1": "disk", "model.layers.0": "cpu"}
    device_map |= dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    model = load(
        qwen2.svsk, dtype=dtype, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(model), logits(load(qwen2.restored, dtype=dtype)))


def test_shards(qwen2: Folders, tmp_path: Path) -> None:
    sharded = write_random_svsk(qwen2.dense, tmp_path, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert_same(load(sharded), load(qwen2.restored))


def test_hub_id(qwen2: Folders, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(qwen2.svsk, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    model = load("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert_same(model, load(qwen2.restored))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_model_without_head(qwen2: Folders, dtype: torch.dtype) -> None:
    # Names lose their "model." here, which makes transformers forget the requested dtype of what it
    # renames.
    model, reference = (
        AutoModel.from_pretrained(path, dtype=dtype) for path in (qwen2.svsk, qwen2.restored)
    )
    assert_same(model, reference)


def test_modules_that_the_class_keeps_in_float32(
    folders: MakeFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["o_proj"])
    made = folders("llama", torch.bfloat16)
    model = load(made.svsk)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    assert_same(model, load(made.restored))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_save_pretrained_writes_a_dense_folder(
    folders: MakeFolders, family: str, tmp_path: Path
) -> None:
    made = folders(family, torch.bfloat16)
    load(made.svsk).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads(
        (tmp_path / "config.json").read_text(encoding="utf-8")
    )
    saved, restored = (
        load_file(tmp_path / "model.safetensors"),
        load_file(made.restored / "model.safetensors"),
    )
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in restored)
    assert_same(load(tmp_path), load(made.restored))


def test_dense_experts_beside_quantized_attention(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", MOE)
    svsk = write_random_svsk(
        dense, tmp_path / "svsk", schemes={"attention": scheme("re:.*self_attn.*", rank=2)}
    )
    restored = write_restored(svsk, tmp_path / "restored")
    for dtype in (torch.bfloat16, torch.float32):
        assert_same(load(svsk, dtype=dtype), load(restored, dtype=dtype))


def test_config_passed_by_the_caller(qwen2: Folders) -> None:
    # lm-eval hands the checkpoint's own config back.
    raw = json.loads((qwen2.svsk / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]
    config = AutoQuantizationConfig.from_dict(raw)
    assert config.to_dict() == {**raw, "producer": {}}
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert_same(load(qwen2.svsk, quantization_config=config), load(qwen2.restored))


def test_registering_again_changes_nothing() -> None:
    register_with_transformers()
    assert AUTO_QUANTIZER_MAPPING["svsk"] is SvskHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["svsk"] is SvskHfConfig


def test_importing_twice() -> None:
    run_python("import importlib, sys, svsk_vllm.hf; importlib.reload(sys.modules['svsk_vllm.hf'])")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "svsk_vllm",
            ["vllm", "triton", "transformers", "torch", "compressed_tensors", "pydantic"],
        ),
        ("svsk_vllm.hf", ["vllm", "triton", "compressed_tensors"]),
    ],
)
def test_what_an_import_imports(module: str, absent: list[str]) -> None:
    loaded = run_python(f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))")
    assert loaded == "[]"


def test_default_schemes_cover_what_they_claim(qwen2: Folders) -> None:
    linears = Checkpoint(qwen2.svsk).linears
    ranks = {name.rpartition(".")[2]: spec.rank for name, spec in linears.items()}
    assert ranks == {
        "q_proj": 4,
        "k_proj": 1,
        "v_proj": 0,
        "o_proj": 8,
        "gate_proj": 2,
        "up_proj": 6,
        "down_proj": 3,
    }
    assert len(linears) == 2 * len(default_schemes())
    assert all(spec.n % 32 == 0 and spec.k % 64 == 0 for spec in linears.values())
