# SPDX-License-Identifier: Apache-2.0
"""Folders and files that are given for a model and are none: told without a look at the hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline.storage.hub import check_model


def a_model_of_another_name(at: Path) -> None:
    (at / "llama-8b").mkdir()
    (at / "llama-8b" / "config.json").write_text("{}")


def quantised(at: Path) -> None:
    (at / "llama").mkdir()
    declared = {"quantization_config": {"quant_method": "awq"}}
    (at / "llama" / "config.json").write_text(json.dumps(declared))


def gguf(at: Path) -> None:
    (at / "llama").mkdir()
    (at / "llama" / "llama-Q4_0.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_model_of_another_name, r"llama: no such folder\. Did you mean llama-8b in "),
        (quantised, r"llama: is quantised already \(awq\)\. Start from the unquantised model"),
        (gguf, r"llama: has no config\.json, but a GGUF file, which is not read here\. Give the"),
    ],
)
def test_what_is_no_model_to_quantise(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(SvskError, match=message):
        check_model(str(tmp_path / "llama"), dense=True)
