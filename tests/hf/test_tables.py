# SPDX-License-Identifier: Apache-2.0
"""Quantised embeddings and heads (format 1.1): loaded as restored, tied and untied."""

from pathlib import Path

import pytest
import torch

from svsk_offline.export.dense import restore
from svsk_vllm.architecture.folder_check import checkpoint_problems
from svsk_vllm.format import EmbeddingArgs, SvskFormatError
from tests.hf.loading import assert_same, load, logits
from tests.support.format_builders import edit_json, edit_tensors
from tests.support.tiny_models import (
    EMBEDDING,
    TableKind,
    default_schemes,
    table_schemes,
    write_dense,
    write_random_svsk,
)


def with_tables(
    folder: Path, family: str, head: TableKind | None, embedding: TableKind | None
) -> Path:
    tied = family == "llama"
    return write_random_svsk(
        write_dense(folder / "dense", family),
        folder / "svsk",
        schemes=default_schemes() | table_schemes(None if tied else head, embedding),
        ignore=() if head and not tied else ("lm_head",),
        embedding=EmbeddingArgs(module=EMBEDDING, tied=tied) if embedding else None,
    )


@pytest.mark.parametrize(
    ("family", "head", "embedding"),
    [
        ("llama", "int8", "int8"),
        ("llama", "quad8", "quad8"),
        ("qwen2", "int8", "int8"),
        ("qwen2", "quad8", "int8"),
        ("qwen2", None, "int8"),
        ("qwen2", "int8", None),
        ("llama", "mixed-int8", "mixed-int8"),
        ("qwen2", "mixed-int8", "mixed-int8"),
        ("qwen2", "mixed-int8", None),
    ],
)
def test_loaded_as_restored(
    tmp_path: Path, family: str, head: TableKind | None, embedding: TableKind | None
) -> None:
    svsk = with_tables(tmp_path, family, head, embedding)
    assert checkpoint_problems(svsk) == []
    model, reference = load(svsk), load(restore(svsk, tmp_path / "restored"))
    assert_same(model, reference)
    assert torch.equal(logits(model), logits(reference))
    lookup, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert (lookup.weight.data_ptr() == output.weight.data_ptr()) == (family == "llama")
    original = load(tmp_path / "dense").get_input_embeddings().weight
    assert torch.equal(lookup.weight, original) == (embedding is None)
    torch.testing.assert_close(lookup.weight, original, rtol=0, atol=0.1)


def test_a_table_that_config_json_does_not_name_is_refused(tmp_path: Path) -> None:
    svsk = with_tables(tmp_path, "qwen2", None, "int8")
    edit_json(svsk / "config.json", lambda c: c["quantization_config"].pop("embedding"))
    with pytest.raises(SvskFormatError, match=r"model\.embed_tokens: stored quantised, but it"):
        load(svsk)


def test_a_table_without_its_hot_rows_is_refused(tmp_path: Path) -> None:
    svsk = with_tables(tmp_path, "llama", "mixed-int8", "mixed-int8")
    edit_tensors(svsk, lambda tensors: tensors.pop(f"{EMBEDDING}.weight_hot_packed"))
    with pytest.raises(SvskFormatError, match=r"embed_tokens\.weight_hot_packed: missing"):
        load(svsk)


def test_a_table_without_its_scales_is_refused(tmp_path: Path) -> None:
    svsk = with_tables(tmp_path, "llama", "int8", "int8")
    edit_tensors(svsk, lambda tensors: tensors.pop(f"{EMBEDDING}.weight_scale"))
    with pytest.raises(SvskFormatError, match=r"model\.embed_tokens\.weight_scale: missing"):
        load(svsk)
