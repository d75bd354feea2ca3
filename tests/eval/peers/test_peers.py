# SPDX-License-Identifier: Apache-2.0
"""What can be tested of the comparison with other quantisers without their environments."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.eval.peers.modules import EVAL, block, common, environment, reference, run
from tests.support.tiny_models import write_dense

REQUIREMENTS = sorted((EVAL / "peers").glob("*/requirements.txt"))


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


class TestParent:
    SLEEPS = "from peers.common import end_with_parent as e; e(); import time; time.sleep(300)"

    def started(self, **more: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(EVAL)} | more
        return subprocess.Popen(
            [sys.executable, "-c", self.SLEEPS], stdin=subprocess.PIPE, env=environment
        )

    def test_a_peer_ends_with_the_sweep_that_started_it(self) -> None:
        process = self.started(SVSK_PEER_ENDS_WITH_PARENT="1")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=120) == 1

    def test_alone_it_does_not_look_at_standard_input(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(common.ENDS_WITH_PARENT, raising=False)
        started: list[Any] = []
        monkeypatch.setattr(threading.Thread, "start", started.append)
        common.end_with_parent()
        assert not started


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

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"peer": "nf3"}, r"nf3: no such peer. There are gptq"),
            ({"tables": "dense"}, "--tables dense: expected own or reference"),
            ({"peer": "nf4", "group_size": 64}, "--group-size 64: nf4 has groups of its own"),
            ({"out": Path()}, "exists already"),
        ],
    )
    def test_refuses_before_it_starts(
        self, tmp_path: Path, changed: dict[str, Any], said: str
    ) -> None:
        asked = {"peer": "gptq", "model": tmp_path, "out": tmp_path / "out", "calibration": ()}
        with pytest.raises(run.PeerError, match=said):
            run.Prepared.of(run.Request(**asked | changed))


@pytest.fixture
def result() -> dict[str, Any]:
    """What a script hands back of seven linears of 512 weights, and a table of 1024 in 8.5 bits."""
    linears = {name: {"type": "Q5_0", "weights": 512, "bits": 2816} for name in block(0)}
    linears[block(0)[6]] = {"type": "Q4_K", "weights": 512, "bits": 2304}
    embedding = {"model.embed_tokens.weight": {"type": "Q8_0", "weights": 1024, "bits": 8704}}
    norm = 64 * 32
    return {
        "linears": linears,
        "tables": embedding,
        "file_bits": 6 * 2816 + 2304 + 8704 + norm,
        "seconds": 1.5,
        "settings": {},
        "versions": {},
        "notes": ["n"],
        "calibrated": True,
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    job = common.Job("gguf", "m", "t", "w", "e", 0, 3, {})
    tokens = SimpleNamespace(describe=lambda: {"source": "text"})
    weights = sum(tensor.numel() for tensor in reference().values())
    record: dict[str, Any] = run.summarize(
        "gguf", job, result, tokens, Path("folder", "name"), weights
    )
    return record


def test_summary_counts_types(result: dict[str, Any]) -> None:
    record = summary(result)
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
    assert summary(result | {"calibrated": False})["calibration"] is None


def test_summary_counts_the_whole_file(result: dict[str, Any]) -> None:
    stored = 6 * 2816 + 2304 + 8704 + 2048
    record = summary(result)
    assert record["bits_per_weight_of_all"] == pytest.approx(stored / (3584 + 1024 + 64), abs=1e-6)
    assert record["bytes"] == stored / 8
    assert record["tables"] == {"model.embed_tokens.weight": "Q8_0"}
    kept = summary(run.with_reference_tables(result, reference()))
    assert kept["bytes"] == (stored - 8704 + 16 * 1024) / 8  # bfloat16 as in the reference
    assert kept["tables"] == {}
    assert kept["bits_per_weight"] == record["bits_per_weight"]


class TestMeasured:
    def test_belongs_to_model_and_tokens(self, tmp_path: Path) -> None:
        models = [write_dense(tmp_path / "a"), write_dense(tmp_path / "b", seed=1)]
        files = {
            run.measured_file(tmp_path / "kept", model, SimpleNamespace(fingerprint=tokens))
            for model in models
            for tokens in ("x", "y")
        }
        assert len(files) == 4
        assert (
            run.measured_file(tmp_path / "kept", models[0], SimpleNamespace(fingerprint="x"))
            in files
        )
        assert (tmp_path / "kept").is_dir()
