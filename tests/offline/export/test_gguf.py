# SPDX-License-Identifier: Apache-2.0
"""`svsk export --to gguf`: every tensor of the file, with and without a template."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from svsk_offline.export.formats import export_format
from svsk_offline.export.gguf.model import export_gguf
from svsk_offline.export.gguf.tokenizer import pre_tokenizer_name
from svsk_offline.export.request import check_request
from svsk_vllm.format import Checkpoint, SvskError, dequantize
from svsk_vllm.format.config import EmbeddingArgs
from tests.offline.export.gguf_files import (
    expected_order,
    names_of,
    read_gguf,
    whole_matrix_schemes,
    write_svsk,
    write_template,
)
from tests.support.format_builders import edit_json
from tests.support.tiny_models import (
    EMBEDDING,
    FAMILIES,
    VOCAB,
    Family,
    scheme,
    table_schemes,
    write_dense,
    write_random_svsk,
)


def assert_exact(svsk: Path, tensors: dict[str, Any], architecture: str) -> None:
    """Every tensor of the checkpoint, in its place, bit for bit; and no other."""
    source, name_of = Checkpoint(svsk), names_of(architecture)
    expected: dict[str, tuple[str, torch.Tensor]] = {}
    for name, linear in source.iter_linears():
        kind = "Q4_0" if linear.spec.scheme.weights.codebook == "int4" else "Q8_0"
        base = dequantize(linear, with_sidecar=False)
        expected[name_of(f"{name}.weight")] = (kind, expected_order(name, base, architecture))
    for name in source.dense_names:
        tensor = source.read_dense(name)
        kind = "F32" if tensor.ndim == 1 else "BF16"
        in_order = expected_order(name, tensor.float(), architecture)
        expected[name_of(name)] = (kind, in_order)
    assert expected.keys() == tensors.keys() - {"rope_freqs.weight"}
    for name, (kind, values) in expected.items():
        assert tensors[name][0] == kind, name
        assert torch.equal(tensors[name][1], values), name


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_without_a_template(tmp_path: Path, family: str, tables: bool) -> None:
    svsk, said = write_svsk(tmp_path, family, tables=tables), []
    written = export_gguf(svsk, tmp_path / "out.gguf", say=said.append)
    assert written == [tmp_path / "out.gguf"]
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    assert_exact(svsk, tensors, family)
    assert fields["general.architecture"] == family
    assert fields[f"{family}.attention.head_count_kv"] == 2
    assert fields[f"{family}.rope.dimension_count"] == (64 if family == "qwen3" else 32)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCAB
    assert fields["tokenizer.ggml.tokens"][256:259] == ["<pad>", "<eos>", "<bos>"]
    assert fields["tokenizer.ggml.token_type"][255:259] == [1, 3, 3, 3]
    assert fields["tokenizer.ggml.eos_token_id"] == 257
    assert ("output.weight" in tensors) == (family != "llama")
    assert any("2 linears have the codebook quad8" in text and "8.5 bits" in text for text in said)
    assert any("the sidecars of 12 linears are not in the file" in text for text in said)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_with_a_template(tmp_path: Path, family: str, kind: str) -> None:
    """Its rows are permuted in one family and not in the other; its values are only compared."""
    svsk = write_svsk(tmp_path, family)
    template = write_template(tmp_path / "dense", tmp_path / "t.gguf", family, kind)
    export_gguf(svsk, tmp_path / "out.gguf", template=template)
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    assert_exact(svsk, tensors, family)
    assert torch.equal(tensors["rope_freqs.weight"][1], torch.ones(16)), "the template's alone"
    assert fields["general.name"] == "template"
    assert fields["tokenizer.ggml.tokens"] == ["a", "b"]
    assert fields["tokenizer.ggml.scores"] == [0.5, 1.5]
    assert fields["general.file_type"] == 2


@pytest.mark.parametrize("with_template", [False, True])
def test_adapter(tmp_path: Path, with_template: bool) -> None:
    svsk = write_svsk(tmp_path, "llama")
    template = write_template(tmp_path / "dense", tmp_path / "t.gguf", "llama")
    files = [tmp_path / "out.gguf", tmp_path / "lora.gguf"]
    options = {"template": template} if with_template else {}
    assert export_gguf(svsk, files[0], lora=files[1], **options) == files
    fields, tensors = read_gguf(files[1])
    kept = {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
    assert kept == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    name_of, count = names_of("llama"), 0
    for name, linear in Checkpoint(svsk).iter_linears():
        if linear.spec.rank:
            (_, a), (_, b) = (tensors[f"{name_of(f'{name}.weight')}.lora_{x}"] for x in "ab")
            sidecar = dequantize(linear) - dequantize(linear, with_sidecar=False)
            sidecar = expected_order(name, sidecar, "llama")
            assert (b @ a - sidecar).norm() < 2**-10 * sidecar.norm(), name
            count += 2
    assert count == len(tensors) == 24


def test_norms_that_are_one_more_in_the_template(tmp_path: Path) -> None:
    """As Gemma's and Nemotron's."""
    svsk = write_svsk(tmp_path, "llama")
    shifted = tmp_path / "shifted"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 1
    model.save_pretrained(shifted)
    template = write_template(shifted, tmp_path / "t.gguf", "llama")
    export_gguf(svsk, tmp_path / "out.gguf", template=template)
    norm = Checkpoint(svsk).read_dense("model.norm.weight").float() + 1
    assert torch.equal(read_gguf(tmp_path / "out.gguf")[1]["output_norm.weight"][1], norm)


def refused(folder: Path, match: str, svsk: Path, **options: Any) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(SvskError, match=match):
        export_gguf(svsk, folder / "out.gguf", **options)
    assert sorted(folder.iterdir()) == before, "something half written"


def finished(writer: gguf.GGUFWriter) -> Path:
    """The file of a writer that was given all of it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path or "")


def test_templates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    svsk = write_svsk(tmp_path, "llama")
    write_dense(tmp_path / "other", "llama", seed=1)
    other = write_template(tmp_path / "other", tmp_path / "other.gguf", "llama")
    refused(tmp_path, "differs from the template's by .*another model", svsk, template=other)
    wide = Family("llama", {"tie_word_embeddings": True, "intermediate_size": 256})
    write_dense(tmp_path / "wide", wide)
    other = write_template(tmp_path / "wide", tmp_path / "wide.gguf", "llama")
    refused(tmp_path, r"shape \[\d+, \d+\], the template has", svsk, template=other)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 2)
    refused(tmp_path, "one file of several. Join them", svsk, template=finished(writer))
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    refused(
        tmp_path, "has no tensor for .* of the checkpoint's in all", svsk, template=finished(writer)
    )
    writer = gguf.GGUFWriter(tmp_path / "later.gguf", "of-next-year")
    unknown = "architecture 'of-next-year': unknown to the package gguf. Install a newer one"
    refused(tmp_path, unknown, svsk, template=finished(writer))
    nameless = tmp_path / "nameless.gguf"
    nameless.write_bytes(b"GGUF\x03\0\0\0" + bytes(16))
    no_name = r"nameless\.gguf: has no general\.architecture\. Name a GGUF file of a model"
    refused(tmp_path, no_name, svsk, template=nameless)
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"no GGUF file at all" * 9):
        damaged.write_bytes(content)
        refused(tmp_path, "damaged.gguf: not a GGUF file|has no general", svsk, template=damaged)


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """Which ``svsk validate`` would tell of; the export looks at what is there."""
    svsk = write_svsk(tmp_path, "llama")
    tensors = load_file(svsk / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    with safe_open(svsk / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, svsk / "model.safetensors", metadata)
    message = r"config\.json: the checkpoint has no embedding, expected token_embd\.weight's"
    refused(tmp_path, message, svsk)


def test_sidecars_of_an_embedding_are_refused(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    svsk = write_random_svsk(
        dense,
        tmp_path / "svsk",
        schemes={**whole_matrix_schemes(), **table_schemes(None, "quad8")},
        embedding=EmbeddingArgs(module=EMBEDDING, tied=True),
    )
    message = (
        r"--lora: model\.embed_tokens: an adapter cannot hold the sidecar of an embedding\. Qu"
    )
    refused(tmp_path, message, svsk, lora=tmp_path / "lora.gguf")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    svsk = write_svsk(tmp_path, "llama")
    weights = svsk / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    message = r"model\.safetensors: .* `svsk validate .*/svsk` lists \d+ problem\(s\) in all"
    refused(tmp_path, message, svsk)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lora = tmp_path / "lora.gguf"
    dense = write_dense(tmp_path / "dense", "llama")
    tiled = write_random_svsk(dense, tmp_path / "tiled")
    refused(tmp_path, "--lora: .*tiles of rank .*--tile-m 0 --tile-n 0", tiled, lora=lora)
    small = {"default": scheme("Linear", group_size=16)}
    narrow = write_random_svsk(dense, tmp_path / "narrow", schemes=small)
    refused(tmp_path, r"q_proj|down_proj: groups of 16", narrow)
    refused(tmp_path, "--lora: .* has no sidecar", narrow, lora=lora)
    tied = Family("llama", {"tie_word_embeddings": True})
    headless = write_random_svsk(write_dense(tmp_path / "t", tied), tmp_path / "headless")
    edit_json(headless / "config.json", lambda config: config.update(tie_word_embeddings=False))
    refused(tmp_path, "the head is not tied, but the checkpoint has none", headless)
    edit_json(tiled / "config.json", lambda config: config.update(num_experts=4))
    refused(tmp_path, "num_experts: mixtures of experts are not exported", tiled)
    mistral = write_random_svsk(write_dense(tmp_path / "m", "mistral"), tmp_path / "mistral")
    refused(tmp_path, "model_type 'mistral': .* can be written from the checkpoint alone", mistral)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu': expected one of .*Give a GGUF file of the same",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps, which GGUF needs"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a number"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2', expected a number"),
        ({"num_hidden_layers": 1}, "GGUF's architecture qwen2 has no place for it"),
        ({"vocab_size": VOCAB, "use_sliding_window": True}, "use_sliding_window True"),
    ],
)
def test_settings_that_llama_cpp_would_not_be_told_of(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    svsk = write_svsk(tmp_path, "qwen2")
    edit_json(svsk / "config.json", lambda config: config.update(change))
    refused(tmp_path, message, svsk)


def test_scaled_rotary_embedding_of_llama_3(tmp_path: Path) -> None:
    """What llama.cpp divides the frequencies by gives transformers' own."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    family = Family("llama", {**FAMILIES["llama"].settings, "rope_parameters": rope})
    dense = write_dense(tmp_path / "dense", family)
    svsk = write_random_svsk(dense, tmp_path / "svsk")
    export_gguf(svsk, tmp_path / "out.gguf")
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    assert_exact(svsk, tensors, "llama")
    assert fields["llama.rope.freq_base"] == 500000.0
    factors = tensors["rope_freqs.weight"][1]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert float(factors.max()) == pytest.approx(8.0, rel=1e-5)
    assert float(factors.min()) == pytest.approx(1.0, rel=1e-5)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
)
SPLIT += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def sequence(first: dict[str, Any], *, regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, {**BYTES, "use_regex": regex}]}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (BYTES, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, regex=True), "smollm"),
        (sequence(split(SPLIT), regex=False), "llama-bpe"),
        (sequence(split(SPLIT.replace("{1,3}", "")), regex=False), "qwen2"),
        (sequence(split(SPLIT), regex=True), None),
        (sequence(split(SPLIT.replace("{1,3}", "{1,2}")), regex=False), None),
        (sequence({"type": "Digits", "individual_digits": False}, regex=True), None),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)
def test_rules_by_which_text_is_cut(rules: dict[str, Any] | None, name: str | None) -> None:
    tokenizer = {"pre_tokenizer": rules, "model": {"type": "BPE"}}
    if name:
        assert pre_tokenizer_name(tokenizer, Path("x")) == name
        tokenizer["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(SvskError, match=r"x: cuts text by rules that are not known.*--template"):
        pre_tokenizer_name(tokenizer, Path("x"))


def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    svsk = write_svsk(tmp_path, "llama")
    path = svsk / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzzz"] = VOCAB
    path.write_text(json.dumps(content))
    refused(tmp_path, f"token 'zzzz' is number {VOCAB}, the embedding has {VOCAB} rows", svsk)
    path.unlink()
    refused(tmp_path, "tokenizer.json: no such file.*--template", svsk)


def test_requests_that_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, out = export_format("gguf"), tmp_path / "out.gguf"
    (tmp_path / "there.gguf").write_bytes(b"precious")
    (tmp_path / "old.gguf").write_bytes(b"GGUF and more")

    def refuse(match: str, to: Path = out, *, overwrite: bool = True, **options: Any) -> None:
        options = {"template": None, "lora": None, **options}
        with pytest.raises(SvskError, match=match):
            check_request(kind, tmp_path / "svsk", to, overwrite=overwrite, **options)

    refuse("expected a name ending in .gguf", tmp_path / "out")
    refuse("its folder does not exist", tmp_path / "no" / "out.gguf")
    refuse("holds something that is not GGUF", tmp_path / "there.gguf")
    refuse("pass --overwrite", tmp_path / "old.gguf", overwrite=False)
    refuse("--lora .*: expected a name ending in .gguf", lora=tmp_path / "x.bin")
    refuse("--template .*: no such file. Name a GGUF file", template=tmp_path / "no.gguf")
    refuse("must be different files", lora=out)
    check_request(
        kind, tmp_path / "svsk", tmp_path / "old.gguf", template=None, lora=None, overwrite=True
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse(r"needs the package gguf: pip install 'svsk-vllm\[gguf\]'")
