# SPDX-License-Identifier: Apache-2.0
"""Models for the comparison of throughput, and what is reported. Running vLLM is left to the benchmark itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import svsk_eval.throughput as throughput
from svsk_eval.errors import EvalError
from svsk_eval.w4a16 import write_w4a16
from svsk_vllm.format import Checkpoint
from tests.support.tiny_models import scheme, write_dense, write_random_svsk


def checkpoint(folder: Path, **changes: Any) -> Path:
    schemes = {"default": scheme("Linear", rank=3, **changes), "o": scheme(r"re:.*\.o_proj$", group_size=32)}
    return write_random_svsk(write_dense(folder / "dense"), folder / "svsk", schemes=schemes)


def test_base_of_a_checkpoint_as_w4a16(tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(tmp_path))
    out = write_w4a16(source.folder, tmp_path / "w4a16")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    groups = {g["weights"]["group_size"]: set(g["targets"]) for g in config["config_groups"].values()}
    assert groups == {
        size: {name for name, spec in source.linears.items() if spec.group_size == size} for size in (32, 64)
    }
    tensors = load_file(out / "model.safetensors")
    assert not [name for name in tensors if "sidecar" in name]
    for name, linear in source.iter_linears():
        stored = linear.to_tensors()
        assert torch.equal(tensors[f"{name}.weight_packed"], stored[f"{name}.weight_packed"])
        assert torch.equal(tensors[f"{name}.weight_scale"], stored[f"{name}.weight_scale"])
        assert tensors[f"{name}.weight_shape"].tolist() == [linear.spec.n, linear.spec.k]
    assert {name for name in tensors if name in source.dense_names} == set(source.dense_names)
    assert (out / "tokenizer.json").exists()


def test_other_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="has codebook 'quad8', W4A16 needs 'int4'"):
        write_w4a16(checkpoint(tmp_path, codebook="quad8"), tmp_path / "w4a16")


def test_models_are_asked_in_turn_and_the_prompt_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    given: list[dict[str, Any]] = []

    class Fake:
        def __init__(self, model: Path, tokens: int, engine_args: dict[str, Any]) -> None:
            self.name, self.closed = str(model), False
            given.append(engine_args)

        def seconds(self, batch: int, tokens: int) -> float:
            asked.append((self.name, batch, tokens))
            return 5.0 + (tokens - 1) * {"a": 0.5, "b": 0.25}[self.name]

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(throughput, "Server", Fake)
    more = {"enforce_eager": True}
    found = throughput.measure({"x": Path("a"), "y": Path("b")}, [1, 8], tokens=10, repeats=2, engine_args=more)
    assert given == [{"gpu_memory_utilization": 0.45, "enforce_eager": True}] * 2
    assert found == {"x": {1: 2.0, 8: 16.0}, "y": {1: 4.0, 8: 32.0}}
    assert asked[:4] == [("a", 1, 1), ("a", 1, 11), ("b", 1, 1), ("b", 1, 11)]
    assert throughput.table_rows(found, [1, 8]) == [["x", "2 (0.50x)", "16 (0.50x)"], ["y", "4 (1.00x)", "32 (1.00x)"]]


def test_engine_arguments_that_are_measured_with_cannot_be_set() -> None:
    with pytest.raises(EvalError, match="--engine-arg max_model_len: it follows"):
        throughput.measure({"x": Path("a")}, [1], tokens=2, repeats=1, engine_args={"max_model_len": 9})
