# SPDX-License-Identifier: Apache-2.0
"""Scoring through vLLM, without vLLM.

Its answers are made by hand, or by a package of its name that runs transformers.

The processes are real. With the real vLLM see ``tests/serving/test_served_scores.py``.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text.compare import compare_files
from svsk_eval.text.generate import generate_texts
from svsk_eval.text.metrics import ChunkScores, EvalInputs, EvalResult, summarize
from svsk_eval.text.scoring import evaluate, token_chunks
from svsk_eval.text.served import chunk_scores, evaluate_served, serve, served_scores
from svsk_kernels.errors import SvskError
from tests.support.tiny_models import (
    BOS,
    FAMILIES,
    VOCAB,
    write_dense,
    write_random_svsk,
    write_restored,
)

SEQ_LEN = 400
"""Two chunks fit a step of the engine, three do not."""

FAKE = Path(__file__).parents[2] / "support" / "fake_vllm"


@dataclass
class Entry:
    """What vLLM says of a token at a place."""

    logprob: float
    rank: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``dense``, ``svsk`` and ``restored``; their tokenizer puts BOS in front."""
    folder = tmp_path_factory.mktemp("models")
    write_dense(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.save_pretrained(folder / "dense")
    write_restored(write_random_svsk(folder / "dense", folder / "svsk"), folder / "restored")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        " ".join(rng.choice(["the", "rate", "of", "stones", "é", "not here\n"]) for _ in range(800))
    )
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Put a vLLM in front of the real one, if there is one.

    The function tells how it was called.
    """
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(FAKE), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "calls"))
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING", "FAKE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.fixture
def in_process(fake: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without the process, which takes seconds to start."""
    specification = importlib.util.spec_from_file_location("vllm", FAKE / "vllm" / "__init__.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "vllm", module)

    def run_request(module: str, request: Any, folder: Path, name: str, report: Any) -> None:
        file = folder / "request.json"
        file.write_text(request.model_dump_json())
        serve(file, lambda **message: report(message))

    monkeypatch.setattr("svsk_eval.text.served.run_request", run_request)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that must be found before minutes are spent on an engine."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: True if name == "vllm" else find_spec(name)
    )
    monkeypatch.setattr(
        "svsk_eval.text.served.run_request", lambda *_: pytest.fail("a process was started")
    )


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def test_log_probability_of_the_own_token_and_the_token_of_rank_one() -> None:
    places = [
        None,
        {7: Entry(-0.5, 1)},  # the prompt's own token is the likeliest
        {8: Entry(-3.0, 40), 5: Entry(-0.25, 1)},
        {
            9: Entry(-0.75, 2),
            6: Entry(-0.75, 1),
        },  # a tie, where the rank counts the tied tokens too
        {4: Entry(-0.75, 1), 3: Entry(-0.75, 1)},  # a tie, where it counts the likelier ones only
    ]
    assert chunk_scores([BOS, 7, 8, 9, 4], places) == ([-0.5, -3.0, -0.75, -0.75], [7, 5, 6, 3])


def test_a_log_probability_that_is_not_a_number_is_passed_on() -> None:
    logprobs, top = chunk_scores([1, 2], [None, {2: Entry(math.nan, 0), 0: Entry(math.nan, 1)}])
    assert math.isnan(logprobs[0])
    assert top == [0]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "gave no prompt log-probabilities for a prompt of 3"),
        (
            [None, {7: Entry(-1, 1)}],
            "gave 2 prompt log-probabilities for a prompt of 3",
        ),  # as with a cached prefix
        (
            [None, {7: Entry(-1, 1)}, None],
            r"Place 2 .* tokens \[\], expected the prompt's own token 8",
        ),
        (
            [None, {5: Entry(-1, 1)}, {8: Entry(-1, 1)}],
            r"Place 1 .* tokens \[5\], expected the prompt's own token 7",
        ),
        (
            [None, {7: Entry(-1, 1)}, {8: Entry(-3, 9)}],
            r"Place 2 .* tokens \[8\], .* and the likeliest one",
        ),
    ],
)
def test_missing_entries_are_an_error(places: Any, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        chunk_scores([BOS, 7, 8], places)


def test_figures_are_those_of_the_transformers_path(
    models: Path, text: Path, fake: Callable[[], Any]
) -> None:
    calls: list[tuple[int, int]] = []
    served = evaluate_served(
        models / "restored",
        models / "dense",
        text,
        3,
        SEQ_LEN,
        "float32",
        {"seed": 5},
        lambda done, total: calls.append((done, total)),
    )
    expected = evaluate(models / "restored", models / "dense", text, 3, SEQ_LEN, "float32", "cpu")
    for name in ("nll", "nll_se", "ppl", "delta_nll", "delta_nll_se", "ref_nll", "top1", "top1_se"):
        assert getattr(served, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    assert served.top1 is not None
    assert 0 < served.top1 < 1, "a case that shows nothing"
    for name in ("nll", "ref_nll", "top1"):
        assert getattr(served.per_chunk, name) == pytest.approx(
            getattr(expected.per_chunk, name), abs=1e-5
        )
    assert (served.kl_mean, served.kl_p99, served.per_chunk.kl) == (None, None, None)
    assert (served.tokens, served.chunks) == (3 * (SEQ_LEN - 1), 3)
    assert expected.inputs is not None
    settings = {
        "vllm": "0.0.fake",
        "device": "cpu",
        "svsk_kernels": ["FakeKernel"],
        "engine_args": {"seed": 5},
    }
    assert served.inputs == replace(expected.inputs, engine="vllm", engine_settings=settings)
    assert served.to_json()["engine_settings"] == settings
    assert calls == [(0, 6), (2, 6), (3, 6), (3, 6), (5, 6), (6, 6)]
    orders = fake()
    assert [call["model"] for call in orders] == [str(models / "restored"), str(models / "dense")]
    assert orders[0]["pid"] != orders[1]["pid"]
    assert {call["seed"] for call in orders} == {5}
    for name, value in (("VLLM_LOGGING_LEVEL", "WARNING"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0")):
        assert {call["env"][name] for call in orders} == {value}


@pytest.mark.usefixtures("in_process")
def test_the_reference_is_served_in_the_dtype_of_the_model(
    models: Path, text: Path, fake: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svsk_eval.text.engine_args.has_bf16_products", lambda: True)
    result = evaluate_served(models / "dense", models / "dense", text, 1, 32)
    assert [call["dtype"] for call in fake()] == ["auto", "bfloat16"]
    assert result.inputs is not None
    assert result.inputs.dtype == "bfloat16"
    assert (result.delta_nll, result.top1) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "fail",
            (
                r"dense: its process failed \(exit code 1\).*log line 99\n.*RuntimeError: no"
                r" memory for this"
            ),
        ),
        ("kill", r"dense: its process failed \(ended by SIGKILL, as when memory runs out\)"),
    ],
)
def test_a_process_that_fails_is_an_error_that_names_the_model(
    models: Path, text: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    with pytest.raises(EvalError, match=f"(?s){message}") as caught:
        evaluate_served(models / "dense", None, text, 3, SEQ_LEN, "float32")
    assert "log line 0\n" not in str(caught.value), "the end of the log, not all of it"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("other", "vLLM scored another prompt"),
        (
            "nan",
            (
                "dense: the log-probability of token 3 of chunk 2 is nan, and 1 of 1197 are not"
                " finite, in float32"
            ),
        ),
    ],
)
def test_answers_that_mean_nothing_are_refused(
    models: Path, text: Path, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    with pytest.raises(EvalError, match=message):
        evaluate_served(models / "dense", None, text, 3, SEQ_LEN, "float32")


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (None, r"dense: its vLLM process ended without a result \(No such file"),
        ((3, 7), r"dense: vLLM gave scores of shape \[3, 7\], expected \[3, 399\]"),
    ],
)
def test_a_process_that_leaves_no_result_is_an_error(
    models: Path,
    text: Path,
    no_process: None,
    monkeypatch: pytest.MonkeyPatch,
    left: tuple[int, int] | None,
    message: str,
) -> None:
    def run_request(_module: str, request: Any, folder: Path, *_: Any) -> None:
        if left is not None:
            tensors = {"logprobs": torch.zeros(left), "top": torch.zeros(left, dtype=torch.bool)}
            save_file(tensors, folder / "result.safetensors", {"vllm": "{}"})

    monkeypatch.setattr("svsk_eval.text.served.run_request", run_request)
    with pytest.raises(EvalError, match=message):
        evaluate_served(models / "dense", None, text, 3, SEQ_LEN, "float32")


def test_generate_without_vllm(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        EvalError,
        match=r"--engine vllm: vLLM is not installed \(.*\)\. Install it, or use --engine hf",
    ):
        generate_texts(str(models / "dense"), ["a"], engine="vllm")


@pytest.mark.usefixtures("in_process")
def test_generate_with_a_vllm_that_does_not_serve_it(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "fail")
    with pytest.raises(EvalError, match=r"vLLM cannot serve .*dense: no memory for this model"):
        generate_texts(str(models / "dense"), ["a"], engine="vllm")


def test_an_interrupted_evaluation_leaves_no_process(
    models: Path, text: Path, fake: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_served(models / "dense", None, text, 3, SEQ_LEN, "float32", None, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(fake()[0]["pid"], 0)


def test_models_that_do_not_fit_are_refused_before_an_engine_starts(
    models: Path, text: Path, tmp_path: Path, no_process: None
) -> None:
    with pytest.raises(
        EvalError, match=r"dense: takes 512 tokens at most, .*Use --seq-len 511 or less"
    ):
        evaluate_served(models / "dense", None, text, 1, 512)
    with pytest.raises(EvalError, match="takes 512 tokens at most, chunks have 600"):
        evaluate_served(models / "dense", None, text, 1, 600)
    padded = replace(
        FAMILIES["llama"], settings={**FAMILIES["llama"].settings, "vocab_size": VOCAB + 64}
    )
    for seed, family in enumerate(("llama", padded)):
        write_dense(tmp_path / str(seed), family)
    with pytest.raises(
        EvalError, match=f"vocabulary of {VOCAB}, the reference .* one of {VOCAB + 64}"
    ):
        evaluate_served(tmp_path / "0", tmp_path / "1", text, 1, 32)
    with pytest.raises(EvalError, match=r"tokenizers of .* differ"):
        evaluate_served(tmp_path / "0", models / "dense", text, 1, 32)
    with pytest.raises(EvalError, match="the model's vocabulary has 320"):
        served_scores(models / "dense", torch.full((1, 8), VOCAB))
    with pytest.raises(SvskError, match="absent: not a folder here, and the hub did not give it"):
        served_scores(tmp_path / "absent", torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(EvalError, match=r"no config\.json"):
        served_scores(tmp_path, torch.ones(1, 8, dtype=torch.int64))
    for shape in ((8,), (0, 8), (3, 1)):
        with pytest.raises(EvalError, match=r"shape .* expected \[chunks, seq_len\]"):
            served_scores(models / "dense", torch.ones(shape, dtype=torch.int64))
    with pytest.raises(EvalError, match="are not JSON"):
        served_scores(
            models / "dense", torch.ones(1, 8, dtype=torch.int64), engine_args={"a": object()}
        )


def test_what_cannot_be_served_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:
    tokens = torch.ones(1, 8, dtype=torch.int64)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "other,svsk2")
        with pytest.raises(
            EvalError, match="svsk: an SVSK checkpoint, but VLLM_PLUGINS=other,svsk2 keeps"
        ):
            served_scores(models / "svsk", tokens)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", lambda **_: ())
        with pytest.raises(
            EvalError, match="svsk: an SVSK checkpoint, but its vLLM plugin is not installed in "
        ):
            served_scores(models / "svsk", tokens)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EvalError, match=r"--engine vllm: vLLM is not installed in this environment. Install it"
    ):
        served_scores(models / "dense", tokens)


@pytest.fixture
def served_result(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Have the command get a result at once; the list collects what it asks for."""
    calls: list[tuple[Any, ...]] = []
    rows = [
        torch.tensor([1.0, 2.0]).numpy(),
        torch.tensor([1.0, 1.5]).numpy(),
        None,
        torch.ones(2).numpy(),
    ]
    inputs = EvalInputs(
        "m",
        "r",
        "0f",
        3,
        "bfloat16",
        "vllm",
        {"vllm": "9.9", "device": "cuda", "svsk_kernels": ["TritonKernel"], "engine_args": {}},
    )

    def run(*arguments: Any) -> EvalResult:
        calls.append(arguments[:-1])
        arguments[-1](0, 4)
        arguments[-1](4, 4)
        return replace(summarize([ChunkScores(*rows)] * 2), inputs=inputs)

    monkeypatch.setattr("svsk_eval.text.request.evaluate_served", run)
    return calls


def test_the_command_names_what_was_used(served_result: list[Any], tmp_path: Path) -> None:
    target, text = tmp_path / "scores.json", tmp_path / "t.txt"
    text.write_text("A text.")
    options = ["--text", text, "--reference", "r", "--chunks", 2, "--seq-len", 3, "--json", target]
    engine = [
        "--engine",
        "vllm",
        "--engine-arg",
        "tensor_parallel_size=2",
        "--engine-arg",
        "enforce_eager=true",
    ]
    result = svsk("eval", "m", *options, *engine)
    assert result.exit_code == 0, result.output
    assert served_result == [
        ("m", "r", text, 2, 3, "auto", {"tensor_parallel_size": 2, "enforce_eager": True})
    ]
    for shown in (
        "1.50000",
        "delta NLL",
        "served by vLLM 9.9 on cuda in bfloat16; SVSK kernels: TritonKernel",
        "KL: none, vLLM does not give whole distributions",
    ):
        assert shown in result.output
    assert "KL(reference" not in result.output
    written = json.loads(target.read_text())
    assert (written["engine"], written["dtype"], written["kl_mean"]) == ("vllm", "bfloat16", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engine", "vllm", "--device", "cuda:1"],
            "--device cuda:1: vLLM chooses the device itself",
        ),
        (["--engine", "tgi"], "--engine tgi: expected one of these: vllm, hf"),
        (["--engine-arg", "enforce_eager=true"], "enforce_eager: goes with --engine vllm only"),
        (["--engine", "vllm", "--engine-arg", "enforce_eager"], "expected name=value"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    served_result: list[Any], options: list[str], message: str, tmp_path: Path
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("A text.")
    result = svsk("eval", "m", "--text", text, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not served_result


def scores_file(path: Path, nll: float, **keys: Any) -> Path:
    per_chunk = {"nll": [nll, nll + 1], "ref_nll": [1.0, 2.0], "top1": [0.5, 0.75]}
    scores = {
        "model": "m",
        "text_fingerprint": "0f",
        "seq_len": 8,
        "dtype": "float32",
        "per_chunk": per_chunk,
        **keys,
    }
    path.write_text(json.dumps(scores))
    return path


def test_engines_are_compared_by_nll_and_named(tmp_path: Path) -> None:
    """A file of a version that knew one engine only counts as that engine's."""
    old = scores_file(tmp_path / "old.json", 1.0)
    same = scores_file(tmp_path / "same.json", 1.25, engine="hf")
    served = scores_file(tmp_path / "served.json", 1.5, engine="vllm", dtype="bfloat16")
    first, second = compare_files([old, same, served])
    assert (first.engines, second.engines) == (None, ("hf float32", "vllm bfloat16"))
    assert second.metrics["nll"].difference == 0.5
    assert second.metrics.keys() == {"nll", "delta_nll", "top1"}
    plain, mixed = svsk("compare", old, same).output, svsk("compare", old, served).output
    assert "scored with hf float32, " in mixed
    assert "served.json with vllm bfloat16" in mixed
    row = re.compile(r"(?<!delta )NLL +\d")
    assert row.search(mixed)
    assert not row.search(plain)
    assert "scored with" not in plain


def test_an_unknown_engine_in_a_file_is_refused(tmp_path: Path) -> None:
    old, bad = (
        scores_file(tmp_path / "old.json", 1.0),
        scores_file(tmp_path / "bad.json", 1.0, engine="tgi"),
    )
    with pytest.raises(
        EvalError, match=r"bad\.json: not a .*old\.json: engine: expected hf or vllm"
    ):
        compare_files([old, bad])


def test_tokens_of_a_text_start_with_bos(models: Path, text: Path) -> None:
    """Otherwise the comparison of the two paths would not show that it is served too."""
    tokens = token_chunks(text, AutoTokenizer.from_pretrained(models / "dense"), 3, SEQ_LEN)
    assert tokens[:, 0].tolist() == [BOS] * 3
