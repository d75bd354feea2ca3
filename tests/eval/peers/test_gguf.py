# SPDX-License-Identifier: Apache-2.0
"""Models as GGUF and back, and the importance of weights, which is computed once."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.peers.modules import common, reference


class TestGguf:
    @pytest.fixture
    def convert(self) -> Any:
        pytest.importorskip("gguf")
        return importlib.import_module("peers.gguf.convert")

    def test_heads_are_permuted_and_back(self, convert: Any) -> None:
        weight = torch.arange(2 * 6 * 3).view(12, 3)
        permuted = convert.interleave_heads(weight, 2)
        assert permuted[:, 0].div(3, rounding_mode="floor").tolist() == [
            0,
            3,
            1,
            4,
            2,
            5,
            6,
            9,
            7,
            10,
            8,
            11,
        ]
        assert torch.equal(convert.uninterleave_heads(permuted, 2), weight)

    @pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
    def test_round_trip(self, convert: Any, tmp_path: Path, kind: str) -> None:
        config = {
            "model_type": kind,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "vocab_size": 16,
            "max_position_embeddings": 32,
        }
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors, query = reference(), "model.layers.0.self_attn.q_proj.weight"
        if kind == "qwen2":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.randn(8)
        if kind == "qwen3":
            tensors["model.layers.0.self_attn.q_norm.weight"] = torch.randn(2)
        family, path = convert.Family.of(str(tmp_path)), tmp_path / "m.gguf"
        convert.to_gguf(family, tensors, path)
        stored = convert.from_gguf(path, family, list(tensors))
        assert set(stored) == set(tensors)
        for name, (found, bits, weight) in stored.items():
            assert (found, bits) == ("F32", 32 * tensors[name].numel())
            assert torch.equal(weight, tensors[name].float())
        # only llama's rows are moved
        [written] = [
            torch.from_numpy(tensor.data.copy())
            for tensor in importlib.import_module("gguf").GGUFReader(path).tensors
            if tensor.name == "blk.0.attn_q.weight"
        ]
        assert torch.equal(written, tensors[query].float()) == (kind != "llama")

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"model_type": "gemma2"}, "'gemma2'"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
            ({"attention_bias": True}, "attention_bias True"),
        ],
    )
    def test_refuses_other_models(
        self, convert: Any, tmp_path: Path, changed: dict[str, Any], said: str
    ) -> None:
        keys = dict.fromkeys(convert._NEEDED, 1) | {"model_type": "llama"} | changed
        (tmp_path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
        with pytest.raises(common.PeerError, match=said):
            convert.Family.of(str(tmp_path))

    def test_importance_is_computed_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("gguf")
        quantize: Any = importlib.import_module("peers.gguf.quantize")
        computed = []

        def importance(*_: Any) -> dict[str, torch.Tensor]:
            computed.append(1)
            return {"blk.0.attn_q.weight": torch.tensor([1.0, 2.0])}

        monkeypatch.setattr(quantize, "importance", importance)
        job = common.Job("gguf", "m", "t", "w", "e", 0, 0, {}, str(tmp_path / "kept.safetensors"))
        found = [quantize.kept_importance(job, None, []) for _ in range(2)]
        assert len(computed) == 1
        assert torch.equal(found[0]["blk.0.attn_q.weight"], found[1]["blk.0.attn_q.weight"])
