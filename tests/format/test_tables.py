# SPDX-License-Identifier: Apache-2.0
"""Quantised embeddings and heads (format 1.1): codes of 8 bits, and which module is a table."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svsk_kernels.codebook import unpack_bytes
from svsk_vllm.format import (
    Checkpoint,
    EmbeddingArgs,
    LinearSpec,
    QuantizedLinear,
    SvskCheckpointConfig,
    SvskFormatError,
    dequantize,
    pack_codes,
    unpack_codes,
    validate_checkpoint,
)
from svsk_vllm.format.architecture_fit import Architecture
from tests.support.format_builders import (
    EMBEDDING,
    HEAD,
    SmallCheckpoint,
    build_small_checkpoint,
    make_group,
    property_test,
    random_linear,
)


@property_test
@given(
    hnp.arrays(
        np.int32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.integers(-(2**31), 2**31 - 1),
    )
)
def test_every_word_holds_four_codes(words: np.ndarray) -> None:
    packed = torch.from_numpy(words)
    codes = unpack_codes(packed, words.shape[1] * 4, 8)
    raw = words.astype("<i4").tobytes()
    assert codes.flatten().tolist() == [byte - 128 for byte in raw]
    assert torch.equal(pack_codes(codes, 8), packed)
    assert torch.equal(unpack_bytes(packed), codes)


def test_eight_bit_codes_of_a_row_that_is_no_whole_word_are_refused() -> None:
    with pytest.raises(SvskFormatError, match="K = 6 is not a multiple of 4"):
        pack_codes(torch.zeros(2, 6, dtype=torch.int8), 8)


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_the_weight_is_code_times_scale(group_size: int) -> None:
    scheme = make_group(codebook="int8", group_size=group_size)
    linear = random_linear(LinearSpec("m", 7, 192, scheme))
    read = QuantizedLinear.from_tensors(linear.spec, linear.to_tensors())
    assert torch.equal(read.codes, linear.codes)
    assert int(linear.codes.min()) < -100
    scale = linear.scale.double().repeat_interleave(group_size, 1)
    assert torch.equal(dequantize(read).double(), linear.codes.double() * scale)


@pytest.mark.parametrize(
    ("weights", "sidecar", "words"),
    [
        ({"num_bits": 8}, {}, "num_bits 8 with codebook int4, whose codes have 4 bits"),
        ({"codebook": "int8"}, {}, "num_bits 4 with codebook int8"),
        ({"num_bits": 8, "codebook": "int8", "scale_bits": 8}, {}, "scale_bits 8 with num_bits 8"),
        ({"num_bits": 8, "codebook": "int8"}, {"rank": 2}, "sidecar of rank 2 with num_bits 8"),
    ],
)
def test_schemes_of_eight_bits_that_are_none(
    weights: dict[str, Any], sidecar: dict[str, Any], words: str
) -> None:
    group = {"targets": ["m"], "weights": weights, "sidecar": sidecar}
    raw = {"quant_method": "svsk", "version": "1.1", "config_groups": {"g": group}}
    with pytest.raises(SvskFormatError, match=words):
        SvskCheckpointConfig.from_dict(raw)


def hot_linear(n: int = 9, hot_rows: int = 4, group_size: int = 32) -> QuantizedLinear:
    scheme = make_group(targets=["m"], hot_rows=hot_rows, group_size=group_size)
    return random_linear(LinearSpec("m", n, 96, scheme))


@property_test
@given(n=st.integers(2, 30), share=st.floats(0, 1))
def test_hot_rows_come_back_in_their_places(n: int, share: float) -> None:
    linear = hot_linear(n, max(1, int(share * (n - 1))), 16)
    assert linear.hot is not None
    read = QuantizedLinear.from_tensors(linear.spec, linear.to_tensors())
    assert torch.equal(read.codes, linear.codes)
    assert torch.equal(read.scale, linear.scale)
    assert read.hot is not None
    assert torch.equal(read.hot, linear.hot)
    scale = linear.scale.double().repeat_interleave(16, 1)
    assert torch.equal(dequantize(read).double(), linear.codes.double() * scale)
    assert int(linear.codes[linear.hot.long()].abs().max()) > 100


@pytest.mark.parametrize(
    ("weights", "group", "words"),
    [
        ({"codebook": "quad8"}, {}, "hot_rows 3 with codebook quad8 and scale_bits 16: expected"),
        ({"codebook": "int8", "num_bits": 8}, {}, "hot_rows 3 with codebook int8"),
        ({"scale_bits": 6}, {}, "hot_rows 3 with codebook int4 and scale_bits 6: expected int4"),
        ({"hot_rows": -1}, {}, "hot_rows: expected at least 0, got -1"),
        ({}, {"sidecar": {"rank": 2}}, "sidecar of rank 2 with hot_rows 3: expected 0"),
        ({}, {"targets": ["m", "Linear"]}, "target Linear with hot_rows 3: expected the name"),
        ({}, {"targets": ["re:.*embed"]}, r"target re:\.\*embed with hot_rows 3"),
    ],
)
def test_schemes_with_hot_rows_that_are_none(
    weights: dict[str, Any], group: dict[str, Any], words: str
) -> None:
    whole = {"targets": ["m"], "weights": {"hot_rows": 3, **weights}, **group}
    raw = {"quant_method": "svsk", "version": "1.1", "config_groups": {"g": whole}}
    with pytest.raises(SvskFormatError, match=words):
        SvskCheckpointConfig.from_dict(raw)


def test_hot_rows_are_of_version_1_1() -> None:
    config = SvskCheckpointConfig(
        config_groups={"g": make_group(targets=["m"], hot_rows=3), "rest": make_group()}
    ).to_dict()
    assert config["version"] == "1.1"
    assert "hot_rows" not in config["config_groups"]["rest"]["weights"]
    with pytest.raises(SvskFormatError, match=r"version 1\.0 with .*hot_rows"):
        SvskCheckpointConfig.from_dict({**config, "version": "1.0"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.flip(0), "names rows twice or not in ascending order"),
        (lambda rows: rows.clamp(min=int(rows[1])), "names rows twice"),
        (lambda rows: rows + 45, "names rows .* to .*, expected 0 to 49"),
        (lambda rows: rows - 50, "names rows -.* to .*, expected 0 to 49"),
        (lambda rows: rows[:-1], r"weight_hot_rows: torch.int32 \[6\], expected .* \[7\]"),
        (lambda rows: rows.long(), "weight_hot_rows: torch.int64"),
    ],
)
def test_a_damaged_list_of_hot_rows_is_a_problem(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    small = build_small_checkpoint(tmp_path, tables=True, hot_rows=7)
    assert validate_checkpoint(tmp_path, architecture(small)) == []
    small.replace(f"{HEAD}.weight_hot_rows", change)
    (problem,) = validate_checkpoint(tmp_path, architecture(small))
    assert re.search(message, problem)
    assert f"{HEAD}.weight_hot_rows" in problem
    if message.startswith("names"):
        message += r".*\. The file is damaged: copy or download it again"
    with pytest.raises(SvskFormatError, match=message):
        Checkpoint(tmp_path).read_linear(HEAD)


def test_a_damaged_scale_of_a_hot_row_is_a_problem(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, tables=True, hot_rows=7)

    def damage(scale: torch.Tensor) -> torch.Tensor:
        scale[3, 0] = float("nan")
        return scale

    small.replace(f"{EMBEDDING}.weight_hot_scale", damage)
    (problem,) = validate_checkpoint(tmp_path)
    assert f"{EMBEDDING}.weight_hot_scale: 1 of 14 values are not finite" in problem


def test_rows_that_are_missing_are_a_problem(tmp_path: Path) -> None:
    """Another number of hot rows in config.json makes a matrix of another size."""
    small = build_small_checkpoint(tmp_path, tables=True, hot_rows=7)

    def fewer(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["head"]["weights"]["hot_rows"] = 6

    small.edit_config(fewer)
    problems = validate_checkpoint(tmp_path, architecture(small))
    assert any("lm_head.weight_packed: holds [49, 64], the architecture" in p for p in problems)
    assert any("lm_head.weight_hot_packed: torch.int32 [7, 16], expected" in p for p in problems)


@pytest.mark.parametrize("codebook", ["int4", "int8"])
def test_the_version_says_that_there_is_something_new(codebook: Any) -> None:
    config = SvskCheckpointConfig(
        config_groups={"g": make_group(codebook=codebook)},
        embedding=None if codebook == "int8" else EmbeddingArgs(module="m"),
    ).to_dict()
    assert config["version"] == "1.1"
    with pytest.raises(
        SvskFormatError, match=r"version 1\.0 with .*num_bits 8.* an embedding or activations"
    ):
        SvskCheckpointConfig.from_dict({**config, "version": "1.0"})
    assert "embedding" not in SvskCheckpointConfig(config_groups={"g": make_group()}).to_dict()


def test_no_class_name_means_the_embedding() -> None:
    config = SvskCheckpointConfig(
        config_groups={"g": make_group()}, embedding=EmbeddingArgs(module=EMBEDDING)
    )
    assert config.scheme_for(EMBEDDING) is None
    assert config.scheme_for(HEAD) is not None


def architecture(small: SmallCheckpoint, *, tied: bool = False) -> Architecture:
    return Architecture(
        small.dense_shapes,
        linears=frozenset({*small.linears, HEAD} - {EMBEDDING}),
        tables=frozenset({EMBEDDING}),
        tied={f"{HEAD}.weight": f"{EMBEDDING}.weight"} if tied else {},
    )


def test_a_checkpoint_with_tables_is_valid(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, tables=True)
    assert validate_checkpoint(tmp_path, architecture(small)) == []
    for name, linear in small.linears.items():
        assert torch.equal(Checkpoint(tmp_path).read_linear(name).codes, linear.codes)


def edited(small: SmallCheckpoint, value: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["embedding"] = value

    small.edit_config(change)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, f"{EMBEDDING}: stored quantised, but it is an embedding"),
        ({"module": HEAD}, f"embedding names {HEAD}, which is no embedding"),
        ({"module": "x"}, "embedding names x, which is not stored quantised"),
        ({"module": EMBEDDING, "tied": True}, "embedding.tied is True, but the model does not use"),
    ],
)
def test_a_table_that_the_config_names_wrong(tmp_path: Path, value: Any, message: str) -> None:
    small = build_small_checkpoint(tmp_path, tables=True)
    edited(small, value)
    assert any(message in problem for problem in validate_checkpoint(tmp_path, architecture(small)))


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, tables=True)
    edited(small, {"module": EMBEDDING, "tied": True})
    problems = validate_checkpoint(tmp_path, architecture(small, tied=True))
    assert problems == [
        f"{EMBEDDING}: stored quantised, and {HEAD}.weight, to which config.json ties it, is stored"
        " too. Remove one, or the tie."
    ]


def test_a_damaged_scale_of_a_table_is_a_problem(tmp_path: Path) -> None:
    small = build_small_checkpoint(tmp_path, tables=True)

    def damage(scale: torch.Tensor) -> torch.Tensor:
        scale[3, 0] = float("inf")
        return scale

    small.replace(f"{EMBEDDING}.weight_scale", damage)
    (problem,) = validate_checkpoint(tmp_path)
    assert f"{EMBEDDING}.weight_scale: 1 of 100 values are not finite" in problem


def test_levels_count_128_in_the_bound_of_a_weight(tmp_path: Path) -> None:
    """127 times 1e3 is beyond float16, 15 times is not."""
    small = build_small_checkpoint(tmp_path, dtype=torch.float16, tables=True)

    def enlarge(scale: torch.Tensor) -> torch.Tensor:
        scale[3] = 1e3
        return scale

    small.replace(f"{EMBEDDING}.weight_scale", enlarge)
    (problem,) = validate_checkpoint(tmp_path)
    assert "can hold" in problem
