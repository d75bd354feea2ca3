# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command, end to end on a tiny model.

Exit codes, output, errors without tracebacks.
"""

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_offline.recipe import load_recipe, recipe_names
from svsk_vllm.format import Checkpoint, ShardedReader
from svsk_vllm.version import __version__
from tests.support.format_builders import edit_json

SMALL = ["--samples", "24", "--seq-len", "32"]


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    result = svsk(
        "quantize",
        tiny_llama,
        out,
        "--recipe",
        "published",
        "--rank",
        4,
        "--tile-m",
        48,
        "--tile-n",
        96,
        *SMALL,
    )
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.output
    assert re.search(r"bits per weight \d.\d{4} of the linears of the blocks, \d", result.output)
    assert f"  svsk eval {out} --reference {tiny_llama} --text" in result.output
    worst = result.output.split("largest errors of outputs:")[1].split("next:")[0]
    errors = [float(line.split()[1]) for line in worst.strip().splitlines()]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert re.search(r"peak memory \d+\.\d\d GiB\n", result.output), "and nothing of a GPU"
    return out


def test_version_and_help() -> None:
    assert __version__ in svsk("--version").output
    for command in (
        "quantize",
        "inspect",
        "validate",
        "export",
        "restore",
        "eval",
        "compare",
        "generate",
        "recipes",
    ):
        assert command in svsk("--help").output
        assert svsk(command, "--help").exit_code == 0


def test_inspect(checkpoint: Path) -> None:
    table = svsk("inspect", checkpoint)
    assert table.exit_code == 0
    found = json.loads(svsk("inspect", checkpoint, "--json", "-").stdout)
    assert f"{found['bits_per_weight']:.4f}" in table.output
    bits = sum(sum(row["bits"].values()) for row in found["groups"])
    assert found["bits_per_weight"] == pytest.approx(bits / found["quantized_weights"])
    stored = [
        tensor for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values()
    ]
    dense = [ShardedReader(checkpoint).read(name) for name in Checkpoint(checkpoint).dense_names]
    of_all = (
        8
        * sum(tensor.nbytes for tensor in stored)
        / (found["quantized_weights"] + sum(tensor.numel() for tensor in dense))
    )
    assert found["bits_per_weight_of_all"] == pytest.approx(of_all)
    assert f"{of_all:.4f} of all weights" in table.output
    assert found["producer"]["recipe"] == "published"
    assert (
        found["producer"]["recipe_hash"]
        == load_recipe("published")
        .override(
            {
                "sidecar": {"rank": 4, "tile_m": 48, "tile_n": 96},
                "calibration": {"samples": 24, "seq_len": 32},
            }
        )
        .digest
    )


def test_validate(checkpoint: Path, tmp_path: Path) -> None:
    good = svsk("validate", checkpoint)
    assert good.exit_code == 0
    assert "valid" in good.output
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    edit_json(
        broken / "config.json",
        lambda config: config["quantization_config"].update(ignore=["re:.*q_proj"]),
    )
    bad = svsk("validate", broken)
    assert bad.exit_code == 1
    for index in (0, 1):
        assert f"model.layers.{index}.self_attn.q_proj" in bad.output


def test_eval_of_a_checkpoint_and_of_its_restored_model(
    checkpoint: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
    )
    assert svsk("restore", checkpoint, tmp_path / "dense").exit_code == 0
    figures = []
    for model in (checkpoint, tmp_path / "dense"):
        target = tmp_path / "scores.json"
        options = [
            "--reference",
            tiny_llama,
            "--text",
            text,
            "--chunks",
            4,
            "--seq-len",
            64,
            "--json",
            target,
        ]
        result = svsk("eval", model, *options)
        assert result.exit_code == 0, result.output
        figures.append(json.loads(target.read_text()))
    assert [scores.pop("model") for scores in figures] == [str(checkpoint), str(tmp_path / "dense")]
    assert figures[0] == figures[1]
    keys = {"nll", "ppl", "delta_nll", "kl_mean", "kl_p99", "top1"}
    assert keys | {f"{key}_se" for key in keys} | {"tokens", "chunks"} <= set(figures[0])
    assert figures[0]["chunks"] == 4
    assert figures[0]["tokens"] == 4 * 63
    assert figures[0]["ppl"] == pytest.approx(math.exp(figures[0]["nll"]))
    assert 0 < figures[0]["kl_mean"] < 0.1


def test_generate_with_transformers(checkpoint: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "one two three", "--prompt", "four"]
    result = svsk("generate", checkpoint, *prompts, "--engine", "hf", "--max-tokens", 5)
    assert result.exit_code == 0, result.output
    svsk("restore", checkpoint, tmp_path / "dense")
    assert (
        svsk("generate", tmp_path / "dense", *prompts, "--engine", "hf", "--max-tokens", 5).output
        == result.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "nowhere/at/all", "out"], "no such folder"),
        (["quantize", "no-such-org/no-such-model", "out"], "the hub did not give it"),
        (["quantize", "MODEL", "out", "--recipe", "nonsense"], "is not one of"),
        (["quantize", "MODEL", "out", "--rank", "513"], "sidecar.rank"),
        (["quantize", "MODEL", "out", "--rank", "3", "--factor-bits", "4"], "must be even"),
        (
            ["quantize", "MODEL", "out", "--group-size", "100"],
            "--group-size 100: expected one of these: 16",
        ),
        (
            ["quantize", "MODEL", "out", "--target-bpw", "4.5", "--rank", "8"],
            "--rank: no effect under a bit budget",
        ),
        (
            ["quantize", "MODEL", "out", "--target-bpw", "4.5", "--recipe", "published"],
            "allocation: goes with method alternating only",
        ),
        (["quantize", "MODEL", "out", "--target-bpw", "3"], "allocation.target_bpw"),
        (["quantize", "MODEL", "out", "--codebook", "nf4"], "codebook"),
        (["quantize", "MODEL", "out", "--calibration", "missing.txt"], "no such file"),
        (["inspect", "MODEL"], "not a quantised checkpoint"),
        (["restore", "MODEL", "out"], "not a quantised checkpoint"),
        (["inspect", "no[/b]such"], "no[/b]such"),
        (["eval", "MODEL", "--text", "missing.txt"], "--text missing.txt: no such file"),
        (["eval", "MODEL", "--text", "."], "--text .: is not a regular file"),
        (
            ["quantize", "MODEL", "out", "--rank", "0", "--tile-m", "64"],
            "--tile-m: no effect at rank 0",
        ),
        (
            ["quantize", "MODEL", "out", "--ignore", "re:.*typo"],
            "--ignore re:.*typo: matches no linear layer",
        ),
        (["quantize", "MODEL", "MODEL/config.json", "--overwrite"], "overlaps the model"),
        (["quantize", "MODEL", "out", "--chat-template"], "--chat-template has no effect"),
        (["quantize", "MODEL", "out", "--samples", "0"], "calibration.samples"),
        (["quantize", "MODEL", "out", "--seq-len", "513"], "--seq-len is 513, but"),
        (["restore", "MODEL", "MODEL", "--overwrite"], "overlaps the model"),
        (["export", "MODEL", "out", "--to", "onnx"], "--to onnx: expected one of these: dense, "),
        (["export", "MODEL", "MODEL", "--to", "dense", "--overwrite"], "overlaps the model"),
        (["export", "MODEL", "out", "--to", "compressed-tensors"], "not a quantised checkpoint"),
        (["tune", "MODEL", "no/out.yaml"], "its folder does not exist"),
        (["tune", "MODEL", "out.json"], "expected a name ending in .yaml"),
        (["tune", "MODEL", "out.yaml", "--calibration", "missing.txt"], "no such file"),
        (["tune", "MODEL", "out.yaml", "--device", "nonsense"], "--device nonsense"),
        (
            ["bench", "MODEL", "--reference", "MODEL", "--html", "nowhere/x.html"],
            "its folder does not exist",
        ),
        (
            [
                "eval",
                "MODEL",
                "--text",
                "MODEL/config.json",
                "--chunks",
                "1",
                "--device",
                "nonsense",
            ],
            "--device nonsense",
        ),
        (
            ["eval", "MODEL", "--text", "missing.txt", "--json", "nowhere/x.json"],
            "its folder does not exist",
        ),
        (["quantize", "MODEL", "MODEL", "--overwrite"], "overlaps the model"),
        (["quantize", "MODEL", "out", "--calibration", "."], "is a folder"),
        (
            ["generate", "MODEL", "--prompt", "a", "--engine", "tgi"],
            "expected one of these: vllm",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_one(
    arguments: list[str],
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = svsk(*(argument.replace("MODEL", str(tiny_llama)) for argument in arguments))
    assert result.exit_code == 1
    assert "error:" in result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_codebooks_and_factor_widths(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--codebook",
        "quad8",
        "--factor-bits",
        4,
        "--rank",
        6,
        "--group-size",
        32,
        "--ignore",
        "re:.*mlp",
        "--head",
        "dense",
    ]
    assert svsk("quantize", tiny_llama, out, *options, *SMALL).exit_code == 0
    assert svsk("validate", out).exit_code == 0
    schemes = {spec.scheme.model_dump_json() for spec in Checkpoint(out).linears.values()}
    assert len(schemes) == 1
    spec = Checkpoint(out).linears["model.layers.0.self_attn.q_proj"]
    assert (spec.scheme.weights.codebook, spec.factor_bits, spec.rank, spec.group_size) == (
        "quad8",
        4,
        6,
        32,
    )


def test_bit_budget_and_sequential_calibration(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--recipe",
        "fast",
        "--target-bpw",
        4.6,
        "--tile-m",
        0,
        "--tile-n",
        0,
        "--sequential",
    ]
    assert svsk("quantize", tiny_llama, out, *options, *SMALL).exit_code == 0
    assert svsk("validate", out).exit_code == 0
    found = json.loads(svsk("inspect", out, "--json", "-").stdout)
    assert 4.4 < found["bits_per_weight"] <= 4.6
    values = found["producer"]["recipe_values"]
    assert values["allocation"]["target_bpw"] == 4.6
    assert values["calibration"]["sequential"] is True


def test_recipes_are_listed_and_files_accepted(tiny_llama: Path, tmp_path: Path) -> None:
    listed = svsk("recipes").output
    assert all(name in listed for name in recipe_names())
    assert "published" in recipe_names()
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "name: mine\nmethod: published\nsidecar: {rank: 2}\n"
        "calibration: {samples: 4, seq_len: 32}\n"
    )
    assert svsk("quantize", tiny_llama, tmp_path / "out", "--recipe", mine).exit_code == 0
    assert Checkpoint(tmp_path / "out").config.producer["recipe"] == "mine"
    mine.write_text("name: mine\nmethod: published\nsidecars: {rank: 2}\n")
    wrong = svsk("quantize", tiny_llama, tmp_path / "out2", "--recipe", mine)
    assert wrong.exit_code == 1
    assert "sidecars" in wrong.output
