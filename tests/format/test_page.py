# SPDX-License-Identifier: Apache-2.0
"""What docs/format.md says is what the package does.

Its example, key table, worked examples and numbers.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel

from svsk_vllm.format import (
    SUFFIXES,
    ConfigGroup,
    EmbeddingArgs,
    LinearSpec,
    SidecarArgs,
    SvskCheckpointConfig,
    WeightArgs,
    codebook_levels,
    pack_codes,
    pack_factors,
)
from svsk_vllm.format.group_scales import pack_scale_codes
from svsk_vllm.version import FORMAT_VERSION
from tests.support.format_builders import make_group

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def key_table() -> dict[str, str]:
    """Key and default, as printed, of every row of the two key tables."""
    section = PAGE.split("## 2.")[1].split("## 3.")[0]
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| [^|]+ \| ([^|]+) \| .+ \|$", section, flags=re.MULTILINE
    )
    return {key: default.strip(" `") for key, default in rows}


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": field for name, field in model.model_fields.items()}


def test_the_example_config_is_valid_and_complete() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    example = json.loads(block)
    assert SvskCheckpointConfig.from_dict(example).to_dict() == example
    assert example["version"] == FORMAT_VERSION


def test_the_key_tables_are_the_schema() -> None:
    schema = fields(SvskCheckpointConfig) | fields(ConfigGroup)
    schema |= fields(WeightArgs, "weights.") | fields(SidecarArgs, "sidecar.")
    schema |= fields(EmbeddingArgs, "embedding.")
    del schema["weights"], schema["sidecar"]
    table = key_table()
    assert set(table) == set(schema)
    for key, printed in table.items():
        # a folder must declare the method and the version, although a config made in Python need
        # not
        if schema[key].is_required() or key in ("quant_method", "version"):
            assert printed == "required", key
        else:
            default = schema[key].get_default(call_default_factory=True)
            expected = default if isinstance(default, str) else json.dumps(default)
            assert printed == expected, key


def test_the_tensor_table_has_every_suffix() -> None:
    section = PAGE.split("## 4.")[1].split("## 5.")[0]
    assert tuple(re.findall(r"^\| `P\.([a-z_]+)` ", section, flags=re.MULTILINE)) == SUFFIXES


def test_the_worked_example_of_codes() -> None:
    codes = [-8, -1, 0, 1, 7, 3, -3, 2]
    word = pack_codes(torch.tensor([codes], dtype=torch.int8))
    assert f"codes {', '.join(map(str, codes))} are the nibbles" in PAGE
    assert f"word is {int(word) & 0xFFFFFFFF:#x}, as int32\n{int(word)}," in PAGE
    assert f"bytes {word.numpy().astype('<i4').tobytes().hex(' ')}." in PAGE


def test_the_worked_example_of_eight_bit_codes() -> None:
    word = pack_codes(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8), 8)
    stored = word.numpy().astype("<i4").tobytes().hex(" ")
    assert f"codes -128, -1, 0, 127 are the bytes {stored}," in PAGE
    assert f"the word is {int(word) & 0xFFFFFFFF:#x}, as int32\n{int(word)}." in PAGE


def test_the_worked_example_of_factors() -> None:
    stored = pack_factors(torch.tensor([-8, 7, 0, -1], dtype=torch.int8), 4)
    assert f"factors -8, 7, 0, -1 are the bytes {stored.numpy().tobytes().hex(' ')}." in PAGE


def test_the_worked_example_of_scale_codes() -> None:
    stored = pack_scale_codes(torch.tensor([[-32, -1, 0, 31]], dtype=torch.int8), 6)
    assert f"63 and the bytes {stored.numpy().tobytes().hex(' ')}." in PAGE


@pytest.mark.parametrize(("group_size", "bits"), [(32, 8), (16, 6)])
def test_the_bits_per_weight_of_two_levels(group_size: int, bits: Literal[6, 8]) -> None:
    spec = LinearSpec("m", 2048, 4096, make_group(group_size=group_size, scale_bits=bits))
    assert spec.bits_per_weight == 4 + bits / group_size + 16 / 4096
    assert f"{spec.bits_per_weight:.3f} with g = {group_size} and {bits}-bit" in PAGE


def test_the_bits_per_weight_of_eight_bit_codes() -> None:
    spec = LinearSpec("m", 2048, 4096, make_group(codebook="int8"))
    assert spec.bits_per_weight == 8.25
    assert "With 8-bit codes, g =\n64 and 16-bit scales: 8.25." in PAGE


def test_the_bits_per_weight_of_hot_rows() -> None:
    n, k, h = 49152, 576, 8000
    spec = LinearSpec("m", n, k, make_group(targets=["m"], hot_rows=h))
    assert spec.bits_per_weight == pytest.approx(4.25 + (4 + 32 / k) * h / n)
    assert f"for N = {n}, K = {k} and h = {h} {spec.bits_per_weight:.3f}." in PAGE


def test_the_levels_of_quad8() -> None:
    printed = ", ".join(f"{level:g}" for level in codebook_levels("quad8").tolist())
    assert f"| {printed} |" in PAGE


@pytest.mark.parametrize(
    ("row", "rank", "tile_m", "tile_n", "bits"),
    [
        ("no sidecar", 0, 512, 1024, 8),
        ("rank 16, 512 x 1024, 8 bits", 16, 512, 1024, 8),
        ("rank 32, 512 x 1024, 4 bits", 32, 512, 1024, 4),
        ("rank 16, 1024 x 2048, 8 bits", 16, 1024, 2048, 8),
        ("rank 256, 4096 x 4096, 4 bits", 256, 4096, 4096, 4),
    ],
)
def test_the_bits_per_weight(row: str, rank: int, tile_m: int, tile_n: int, bits: int) -> None:
    spec = LinearSpec(
        "linear", 4096, 4096, make_group(rank=rank, tile_m=tile_m, tile_n=tile_n, num_bits=bits)
    )
    formula = 4 + 16 / 64 + bits * rank * (1 / tile_n + 1 / tile_m) + 32 * rank / (tile_m * tile_n)
    assert spec.bits_per_weight == formula
    (printed,) = re.findall(rf"^\| {re.escape(row)} \| ([0-9. +]+) \|$", PAGE, flags=re.MULTILINE)
    assert sum(map(float, printed.split("+"))) == pytest.approx(formula, abs=1e-4)
