# SPDX-License-Identifier: Apache-2.0
"""``svsk eval --chat``: figures of whole models, and requests that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from svsk_eval.chat.answers import Answer
from svsk_eval.chat.metrics import score_answer
from svsk_eval.chat.scoring import evaluate_chat, prepare_chat
from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text.models import load_model
from tests.eval.chat.support import LIMIT, QUESTIONS, naive_answer, prompt_ids, request


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_figures_are_those_of_each_prompt_by_itself(models: Path, prompts: Path) -> None:
    scores = evaluate_chat(prepare_chat(request(models, prompts, "other")))
    model, reference = load_model(models / "other"), load_model(models / "dense")
    assert reference.generation_config is not None
    ends: Any = reference.generation_config.eos_token_id
    finished = tokens = 0
    for row, question in enumerate(QUESTIONS):
        ids = prompt_ids(models / "dense", question)
        answer, end = naive_answer(reference, ids, ends, LIMIT)
        finished += end is not None
        tokens += len(answer)
        whole = Answer(prompt=tuple(ids), answer=tuple(answer), end=end)
        with torch.no_grad():
            logits, ref_logits = (
                loaded(torch.tensor([whole.tokens])).logits[0, len(ids) - 1 : -1]
                for loaded in (model, reference)
            )
        expected = score_answer(logits, ref_logits, whole, ends)
        for name, value in expected.items():
            found = scores.per_prompt[name][row]
            assert (found is None) == (value is None)
            assert found == pytest.approx(value, abs=1e-4) if value is not None else True
    assert (scores.finished, scores.tokens, scores.prompts) == (finished, tokens, len(QUESTIONS))
    assert 0 < finished < len(QUESTIONS)


def test_a_model_does_not_differ_from_itself(models: Path, prompts: Path) -> None:
    figures = evaluate_chat(prepare_chat(request(models, prompts, "dense"))).figures()
    assert figures["kl"].mean == figures["end_kl"].mean == figures["delta_nll"].mean == 0.0
    assert figures["top1"].mean == 1.0
    assert figures["end_probability"] == figures["ref_end_probability"]


def test_a_checkpoint_scores_as_what_it_stands_for(models: Path, prompts: Path) -> None:
    stored = evaluate_chat(prepare_chat(request(models, prompts, "svsk")))
    restored = evaluate_chat(prepare_chat(request(models, prompts, "restored")))
    assert stored == restored
    assert stored.figures()["kl"].mean > 1e-4


def test_the_command_writes_what_it_shows(models: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    text = tmp_path / "text.txt"
    text.write_text("the rate of stones in a tin is not here\n" * 20)
    options = ["--chat", prompts, "--prompts", 4, "--answer-tokens", LIMIT, "--json", out]
    command = ["eval", models / "svsk", "--reference", models / "dense", *options]
    result = svsk(*command)
    assert result.exit_code == 0, result.output
    alone = json.loads(out.read_text())
    assert set(alone) == {"model", "reference", "dtype", "engine", "chat"}
    assert alone["model"] == str(models / "svsk")
    assert alone["chat"]["prompts"] == 4
    assert len(alone["chat"]["per_prompt"]["kl"]) == 4
    assert format(alone["chat"]["kl"], ".5f") in result.output
    assert format(alone["chat"]["end_probability"], ".4f") in result.output
    assert f"the others at the limit of {LIMIT} tokens" in result.output
    result = svsk(*command, "--text", text, "--chunks", 2, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    both = json.loads(out.read_text())
    assert both["chat"] == alone["chat"]
    assert both["chunks"] == 2
    assert both["model"] == alone["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Nothing to score: give --text, --chat, or both"),
        (["--text", "{prompts}", "--answers", "a.json"], "--answers a.json: goes with --chat only"),
        (
            ["--chat", "{prompts}", "--reference", "r", "--activations", "int8"],
            "answers are scored with activations as they are",
        ),
        (["--chat", "{prompts}"], "Name it with --reference"),
        (["--chat", "{prompts}", "--reference", "r", "--engine", "vllm"], "--engine hf only"),
        (
            ["--chat", "{prompts}", "--answers", "no/a.json"],
            "--answers no/a.json: cannot be written",
        ),
    ],
)
def test_options_that_do_not_go_together(
    models: Path, prompts: Path, options: list[str], message: str
) -> None:
    named = [option.format(prompts=prompts) for option in options]
    result = svsk("eval", models / "dense", *named)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_what_is_too_long_is_refused_before_weights_are_read(
    models: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(prompt_ids(models / "dense", question)) for question in QUESTIONS)
    prepare_chat(request(models, prompts, answer_tokens=512 - longest))
    with pytest.raises(
        EvalError,
        match=rf"line 5: {longest} tokens, and with .* of an answer more than the 512 that .*svsk",
    ):
        prepare_chat(request(models, prompts, answer_tokens=513 - longest))
    with pytest.raises(EvalError, match="--answer-tokens is 0, expected 1 or more"):
        prepare_chat(request(models, prompts, answer_tokens=0))
    with pytest.raises(EvalError, match="--prompts is 0, expected 1 or more"):
        prepare_chat(request(models, prompts, prompts=0))
    with pytest.raises(EvalError, match="dtype is 'int4'"):
        prepare_chat(request(models, prompts, dtype="int4"))
