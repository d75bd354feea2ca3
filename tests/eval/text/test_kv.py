# SPDX-License-Identifier: Apache-2.0
"""``svsk eval --kv``: what a stored cache costs, and every combination it must refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text import scoring
from svsk_eval.text.scoring import evaluate
from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache import KvKinds
from tests.support.format_builders import edit_json
from tests.support.tiny_models import Family, write_dense, write_random_svsk

SEQ_LEN = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the rate of stones in a tin is not here, and the tin is\n" * 20)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_dense(folder / "dense")
    write_random_svsk(folder / "dense", folder / "svsk")
    return folder


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def known(value: float | None) -> float:
    assert value is not None
    return value


def test_the_cache_alone_is_measured_on_the_dense_model(models: Path, text: Path) -> None:
    dense = models / "dense"
    kl = {}
    for kind in ("raw", "q8_0", "kpc32", "q4_1", "q4_0", "int4"):
        result = evaluate(dense, dense, text, 3, SEQ_LEN, kv=KvKinds.parse(kind))
        assert result.ref_nll == evaluate(dense, None, text, 3, SEQ_LEN).nll, "without a cache"
        kl[kind] = known(result.kl_mean)
    assert abs(kl["raw"]) < 1e-7
    assert 1e-7 < kl["q8_0"] < min(kl["kpc32"], kl["q4_1"], kl["q4_0"], kl["int4"]) / 10


def test_an_svsk_model_with_a_cache(models: Path, text: Path) -> None:
    plain = evaluate(models / "svsk", models / "dense", text, 2, SEQ_LEN)
    kind = KvKinds.parse("kpc32:raw")
    stored = evaluate(models / "svsk", models / "dense", text, 2, SEQ_LEN, kv=kind)
    assert stored.ref_nll == plain.ref_nll
    assert known(stored.kl_mean) != known(plain.kl_mean)
    assert stored.to_json()["kv"] == "kpc32:raw"
    assert "kv" not in plain.to_json()


def test_the_command_writes_what_compare_pairs(models: Path, text: Path, tmp_path: Path) -> None:
    dense = models / "dense"
    options = ["--reference", dense, "--text", text, "--chunks", 3, "--seq-len", SEQ_LEN]
    for kind in ("kpc32", "q4_0"):
        result = svsk("eval", dense, *options, "--kv", kind, "--json", tmp_path / f"{kind}.json")
        assert result.exit_code == 0, result.output
    assert "attended to stored keys (q4_0) and values (q4_0)" in result.output
    first, second = (
        json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("kpc32", "q4_0")
    )
    assert (first["kv"], second["kv"]) == ("kpc32:q4_1", "q4_0:q4_0")
    assert first["text_fingerprint"] == second["text_fingerprint"]
    both = [tmp_path / "kpc32.json", tmp_path / "q4_0.json"]
    result = svsk("compare", *both, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "weights: cache kpc32:q4_1" in " ".join(result.output.split())
    (comparison,) = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert comparison["rounding"] == ["cache kpc32:q4_1", "cache q4_0:q4_0"]
    pair = comparison["metrics"]["kl"]
    assert pair["difference"] == pytest.approx(second["kl_mean"] - first["kl_mean"])
    assert pair["se"] > 0
    edit_json(both[1], lambda scores: scores.pop("kv"))
    result = svsk("compare", *both)
    assert "nothing in" in " ".join(result.output.split())
    assert "note" not in svsk("compare", both[0], both[0]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv", "fp8"], "'fp8' is no kind of keys, expected one of raw, q8_0"),
        (["--kv", "q4_0:kpc32"], "'kpc32' is no kind of values"),
        (
            ["--kv", "kpc32", "--engine", "vllm"],
            "--kv kpc32: goes with --engine hf only, vLLM serves from caches of its own",
        ),
        (
            ["--kv", "kpc32", "--chat", "{text}", "--reference", "r"],
            "--kv kpc32: goes with --text only",
        ),
    ],
)
def test_options_that_do_not_go_together(
    models: Path, text: Path, options: list[str], message: str
) -> None:
    named = [option.format(text=text) for option in options]
    result = svsk("eval", models / "dense", "--text", text, *named)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_hybrid_is_refused_before_weights_are_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dense(tmp_path / "dense")
    edit_json(
        folder / "config.json",
        lambda config: config.update(
            model_type="qwen3_next", layer_types=["full_attention", "linear_attention"]
        ),
    )
    monkeypatch.setattr(scoring, "load_model", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(SvskError, match="layer 1 of this qwen3_next model keeps a LinearAtt"):
        evaluate(folder, None, text, 1, SEQ_LEN, kv=KvKinds.parse("int4"))


def test_a_head_that_llama_cpps_types_do_not_take(text: Path, tmp_path: Path) -> None:
    odd = Family("llama", {"head_dim": 40, "tie_word_embeddings": True})
    folder = write_dense(tmp_path / "odd", odd)
    for kind in ("q8_0", "kpc32"):
        with pytest.raises(SvskError, match=r"has 40 channels, .* types store"):
            evaluate(folder, None, text, 1, SEQ_LEN, kv=KvKinds.parse(kind))
    for kind in ("int4", "kpc32:raw"):
        evaluate(folder, None, text, 1, SEQ_LEN, kv=KvKinds.parse(kind))


def test_a_model_without_such_a_cache(
    models: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = scoring.load_model

    def without_cache(*arguments: Any, **named: Any) -> Any:
        model: Any = load(*arguments, **named)
        forward = model.forward
        model.forward = lambda input_ids, use_cache=False: forward(input_ids=input_ids)
        return model

    monkeypatch.setattr(scoring, "load_model", without_cache)
    with pytest.raises(EvalError, match="LlamaForCausalLM takes no cache of keys and values"):
        evaluate(models / "dense", None, text, 1, SEQ_LEN, kv=KvKinds.parse("q8_0"))
