# SPDX-License-Identifier: Apache-2.0
"""The table of what vLLM fuses is that of the installed vLLM, and says what vLLM's classes say."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from svsk_vllm.format.architectures import vllm_class

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")

SCRIPTS = Path(__file__).resolve().parents[2] / ".ci"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("vllm_architectures")
    sys.modules.pop("vllm_architectures", None)


@pytest.mark.slow
def test_the_table_is_up_to_date(script: ModuleType, tmp_path: Path) -> None:
    """A table made from another vLLM than is installed is compared below all the same."""
    table, stored = script.read_table(), json.loads(script.TABLE.read_text(encoding="utf-8"))
    if stored["vllm"] != table["vllm"]:
        pytest.skip(f"made from vLLM {stored['vllm']}, installed is {table['vllm']}")
    assert stored == table, "run python .ci/vllm_architectures.py --write"
    script.write_table(table, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == script.TABLE.read_bytes()


def test_classes_that_can_be_imported_say_the_same() -> None:
    """Every set that a class declares, or that its mapper of names makes, is in the table."""
    from vllm.model_executor.models import registry

    wrong: dict[str, Any] = {}
    compared = 0
    for architecture, (module, name) in registry._TEXT_GENERATION_MODELS.items():
        try:
            full = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
            cls = getattr(importlib.import_module(full), name)
        except ImportError:  # an optional package is missing
            continue
        compared += 1
        listed = [set(parts) for parts in vllm_class({"architectures": [architecture]}).fused]
        declared = getattr(cls, "packed_modules_mapping", None) or {}
        for parts in declared.values():
            if len(parts) > 1 and set(parts) not in listed:
                wrong[architecture] = parts
        mapper = getattr(cls, "hf_to_vllm_mapper", None)
        stacked: dict[str, set[str]] = {}
        for part, (target, _) in (getattr(mapper, "orig_to_new_stacked", None) or {}).items():
            # Phi3's mapper is Llama's, its folders hold one tensor.
            if target.rpartition(".")[2] not in declared:
                stacked.setdefault(target, set()).add(part.rpartition(".")[2])
        for parts in stacked.values():
            if len(parts) > 1 and not any(
                parts <= {part.rpartition(".")[2] for part in other} for other in listed
            ):
                wrong[architecture] = sorted(parts)
    assert wrong == {}
    assert compared > 80
