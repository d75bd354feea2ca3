# SPDX-License-Identifier: Apache-2.0
"""What can be tested of the comparison with other quantisers without their environments."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

EVAL = Path(__file__).resolve().parents[2] / "eval"
if str(EVAL) not in sys.path:
    sys.path.append(str(EVAL))  # `peers` is not part of the installed package

common: Any = importlib.import_module("peers.common")
environment: Any = importlib.import_module("peers.environment")
run: Any = importlib.import_module("peers.run")

LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
]
REQUIREMENTS = sorted((EVAL / "peers").glob("*/requirements.txt"))


def block(number: int) -> list[str]:
    return [f"model.layers.{number}.{linear}.weight" for linear in LINEARS]


def reference() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(8, 64, dtype=torch.bfloat16) for name in block(0)}
    tensors["model.embed_tokens.weight"] = torch.randn(16, 64, dtype=torch.bfloat16)
    tensors["model.layers.0.input_layernorm.weight"] = torch.randn(64, dtype=torch.bfloat16)
    return tensors


class TestLinears:
    def test_only_the_seven_of_each_block(self) -> None:
        names = [
            *block(0),
            "model.layers.0.input_layernorm.weight",
            *block(1),
            "lm_head.weight",
            "model.norm.weight",
        ]
        assert common.block_linears(dict.fromkeys(names)) == block(0) + block(1)

    @pytest.mark.parametrize("names", [[], ["lm_head.weight"], [*block(0), *block(1)[:6]]])
    def test_refuses_others(self, names: list[str]) -> None:
        with pytest.raises(common.PeerError, match=r"exactly seven: (all|1)"):
            common.block_linears(dict.fromkeys(names))


class TestBits:
    def test_codes_scales_and_zero_points(self) -> None:
        tensors = {
            "a.weight_packed": torch.zeros(32, 16, dtype=torch.int32),  # 32 x 128 codes of 4 bits
            "a.weight_scale": torch.zeros(32, 2, dtype=torch.bfloat16),
            "a.weight_zero_point": torch.zeros(4, 2, dtype=torch.int32),  # 32 x 2 of 4 bits
            "a.weight_shape": torch.tensor([32, 128]),
        }
        parts = ("weight_packed", "weight_scale", "weight_zero_point")
        assert common.stored_bits(tensors, "a", parts) / (32 * 128) == 4 + 16 / 64 + 4 / 64
        del tensors["a.weight_zero_point"]
        assert common.stored_bits(tensors, "a", parts) / (32 * 128) == 4 + 16 / 64

    def test_names_what_it_found(self) -> None:
        with pytest.raises(
            common.PeerError, match=r"b: the checkpoint stores \['b.weight'\] of it, expected some"
        ):
            common.stored_bits({"b.weight": torch.zeros(1)}, "b", ("qweight",))

    def test_nibbles(self) -> None:
        values = torch.randint(0, 16, (3, 2, 8))
        packed = (values << torch.arange(0, 32, 4)).sum(-1)
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        assert torch.equal(common.unpack_nibbles(packed), values.flatten(1).to(torch.int32))


class TestTokens:
    def test_round_trip(self, tmp_path: Path) -> None:
        tokens = torch.arange(12).view(3, 4)
        common.save_tokens(tmp_path / "t.safetensors", tokens)
        assert torch.equal(common.load_tokens(tmp_path / "t.safetensors"), tokens)

    @pytest.mark.parametrize(
        ("tensors", "found"),
        [
            ({"x": torch.zeros(1)}, "no tensor"),
            ({"tokens": torch.zeros(2, 3)}, r"torch.float32 \[2, 3\]"),
        ],
    )
    def test_refuses_other_files(
        self, tmp_path: Path, tensors: dict[str, torch.Tensor], found: str
    ) -> None:
        save_file(tensors, tmp_path / "t.safetensors")
        with pytest.raises(common.PeerError, match=found):
            common.load_tokens(tmp_path / "t.safetensors")


class TestEnvironment:
    @pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.parent.name)
    def test_requirements_are_pinned(self, path: Path) -> None:
        environment.check_pinned(path)
        assert "torch==2.13.0" in path.read_text(encoding="utf-8").splitlines()

    def test_every_peer_has_its_files(self) -> None:
        for peer in run.PEERS.values():
            assert (EVAL / "peers" / peer.folder / "quantize.py").is_file()
            assert EVAL / "peers" / peer.folder / "requirements.txt" in REQUIREMENTS

    @pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "-e .", "torch @ file"])
    def test_names_the_line_that_is_not(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "requirements.txt"
        path.write_text(f"# pins\nnumpy==2.0.0\n{line}\n", encoding="utf-8")
        with pytest.raises(
            environment.PeerError, match=r"requirements.txt, line 3: .* is not pinned"
        ):
            environment.check_pinned(path)

    def test_is_made_once_and_again_when_a_pin_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, ran = tmp_path / "peer", []

        def pretend(command: list[str], _what: str) -> None:
            ran.append(command[1:3])
            (tmp_path / "envs" / "peer").mkdir(parents=True, exist_ok=True)
            (tmp_path / "envs" / "peer" / "pyvenv.cfg").touch()

        monkeypatch.setattr(environment, "run_shown", pretend)
        source.mkdir()
        for pin in ("numpy==2.0.0", "numpy==2.0.0", "numpy==2.0.1"):
            (source / "requirements.txt").write_text(pin + "\n", encoding="utf-8")
            python = environment.environment_python(source, tmp_path / "envs")
            assert python == tmp_path / "envs" / "peer" / "bin" / "python"
        assert ran == [["-m", "venv"], ["-m", "pip"]] * 2

    def test_failure_names_the_step(self) -> None:
        with pytest.raises(environment.PeerError, match="Doing it failed with exit status 3"):
            environment.run_shown([sys.executable, "-c", "raise SystemExit(3)"], "Doing it")

    def test_does_not_remove_a_folder_that_is_no_environment(self, tmp_path: Path) -> None:
        source, folder = tmp_path / "peer", tmp_path / "envs" / "peer"
        source.mkdir()
        (source / "requirements.txt").write_text("numpy==2.0.0\n", encoding="utf-8")
        folder.mkdir(parents=True)
        (folder / "mine.txt").touch()
        with pytest.raises(environment.PeerError, match="not a virtual environment"):
            environment.environment_python(source, tmp_path / "envs")
        assert (folder / "mine.txt").exists()


class TestGroupSize:
    def test_the_largest_that_divides_all(self) -> None:
        assert run.choose_group_size({"a": (8, 576), "b": (8, 1536)}, None) == 64
        assert run.choose_group_size({"a": (8, 1024), "b": (8, 1536)}, None) == 128
        assert run.choose_group_size({"a": (8, 1024)}, 32) == 32

    @pytest.mark.parametrize("size", [None, 128, 0])
    def test_refuses_what_does_not(self, size: int | None) -> None:
        with pytest.raises(run.PeerError, match=r"\[100, 576\] are not all multiples"):
            run.choose_group_size({"a": (8, 576), "b": (8, 100)}, size)


class TestDense:
    def write(self, folder: Path, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(
            '{"dtype": "bfloat16", "model_type": "llama"}', encoding="utf-8"
        )
        (model / "tokenizer.json").write_text("{}", encoding="utf-8")
        run.write_dense(model, reference(), new, folder / "out")
        written: dict[str, torch.Tensor] = common.load_folder(folder / "out")
        return written

    def test_the_rest_is_the_reference(self, tmp_path: Path) -> None:
        old, new = reference(), {name: torch.randn(8, 64) for name in block(0)}
        written = self.write(tmp_path, new)
        assert set(written) == set(old)
        assert all(tensor.dtype == torch.float32 for tensor in written.values())
        for name, tensor in written.items():
            assert torch.equal(tensor, new.get(name, old[name].float()))
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config == {"dtype": "float32", "model_type": "llama"}
        assert (tmp_path / "out" / "tokenizer.json").exists()

    def test_refuses_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        new = {name: torch.randn(8, 64) for name in block(0)}
        for number, (wrong, said) in enumerate(
            (
                (
                    {name: new[name] for name in block(0)[1:]},
                    "q_proj.weight: the peer gave no weight",
                ),
                (new | {"x": torch.zeros(1)}, "x: the peer gave .* no such tensor"),
                (
                    new | {block(0)[2]: torch.zeros(8, 32)},
                    r"v_proj.weight: .*\[8, 32\], the reference has \[8, 64\]",
                ),
                (
                    new | {block(0)[3]: torch.full((8, 64), float("nan"))},
                    "o_proj.weight: .* not finite",
                ),
            )
        ):
            (tmp_path / str(number)).mkdir()
            with pytest.raises(run.PeerError, match=said):
                self.write(tmp_path / str(number), wrong)

    def test_refuses_before_it_starts(self, tmp_path: Path) -> None:
        arguments = (tmp_path, tmp_path, "python", 1, 8, 0, None, tmp_path)
        with pytest.raises(run.PeerError, match=r"nf4: no such peer. There are gptq"):
            run.compare_peer("nf4", *arguments)
        with pytest.raises(run.PeerError, match="exists already"):
            run.compare_peer("gptq", *arguments)


def test_summary_counts_types() -> None:
    linears = {name: {"type": "Q5_0", "weights": 512, "bits": 2816} for name in block(0)}
    linears[block(0)[6]] = {"type": "Q4_K", "weights": 512, "bits": 2304}
    job = common.Job("gguf", "m", "t", "w", "e", 0, 3, {})
    result = {"linears": linears, "seconds": 1.5, "settings": {}, "versions": {}, "notes": ["n"]}
    result |= {"calibrated": True}
    tokens = SimpleNamespace(describe=lambda: {"source": "text"})
    record = run.summarize("gguf", job, result, tokens, Path("folder", "name"))
    assert record["bits_per_weight"] == pytest.approx((6 * 5.5 + 4.5) / 7, abs=1e-6)
    assert record["types"]["Q4_K"] == {
        "tensors": 1,
        "weights": 512,
        "bits": 2304,
        "bits_per_weight": 4.5,
    }
    assert record["types_by_linear"]["down_proj"] == {"Q4_K": 1}
    assert record["group_size"] is None
    assert record["calibration"] == {"source": "text", "seed": 3}
    assert record["reference"] == "name"
    result["calibrated"] = False
    assert run.summarize("gguf", job, result, tokens, Path("name"))["calibration"] is None


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

    def test_round_trip(self, convert: Any, tmp_path: Path) -> None:
        config = {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": 16,
            "max_position_embeddings": 32,
        }
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = reference()
        convert.to_gguf(str(tmp_path), tensors, tmp_path / "m.gguf")
        stored = convert.from_gguf(tmp_path / "m.gguf", str(tmp_path), list(tensors))
        for name, (kind, bits, weight) in stored.items():
            assert (kind, bits) == ("F32", 32 * tensors[name].numel())
            assert torch.equal(weight, tensors[name].float())

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"model_type": "qwen2"}, "'qwen2'"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
        ],
    )
    def test_refuses_other_models(
        self, convert: Any, tmp_path: Path, changed: dict[str, Any], said: str
    ) -> None:
        keys = dict.fromkeys(convert._NEEDED, 1) | {"model_type": "llama"} | changed
        (tmp_path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
        with pytest.raises(common.PeerError, match=said):
            convert.llama_config(str(tmp_path))
