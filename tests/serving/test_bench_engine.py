# SPDX-License-Identifier: Apache-2.0
"""lm-eval's vllm model with a journal answers as lm-eval's own does, and asks nothing twice."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.serving.conftest import ROOT, serving_environment
from tests.support.tiny_models import write_dense, write_random_svsk

SCRIPT = """
import json, sys
from pathlib import Path
from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM
from svsk_eval.bench import journaled_model
from svsk_eval.bench.engines import vllm_model
from svsk_eval.bench.journal import Journal
from svsk_eval.errors import EvalError

prompts = ["The rate", "of stones", "in a tin", "The rate", "is here and " * 20, "not"]
greedy = {"until": ["e", "\\n"], "max_gen_toks": 16, "do_sample": False}
short = {"until": [], "max_gen_toks": 3, "do_sample": False}
long = {"until": [], "max_gen_toks": 100, "do_sample": False}
silent = {"until": [], "max_gen_toks": 3}
sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
pairs = [("The rate", " of"), ("The rate", " in a tin"), ("of", " stones")]
pairs += [("The rate", " of"), ("", "tin")]

def generations(settings):
    arguments = [(prompt, settings) for prompt in prompts]
    return [Instance("generate_until", {}, pair, i) for i, pair in enumerate(arguments)]

def answers_to(*settings):
    return [model.generate_until(generations(one)) for one in settings]

def plain(answers):
    return [[float(value), bool(greedy)] for value, greedy in answers]

likely = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
rolling = [Instance("loglikelihood_rolling", {}, ("The rate of stones in a tin",), 0)]
counts = []
arguments = {"pretrained": sys.argv[1], "dtype": "float32", "max_model_len": 256}
arguments |= {"seed": 1234, "batch_size": "auto", "enforce_eager": True}
journal = Journal(Path(sys.argv[2]))
model = vllm_model(arguments, journal, lambda count: counts.append(count))
inner = model._loglikelihood_tokens
found = {"texts": answers_to(greedy, short)}
found["likely"] = plain(model.loglikelihood(likely))
found["rolling"] = model.loglikelihood_rolling(rolling)
found["own_texts"] = [VLLM.generate_until(model, generations(one)) for one in (greedy, short)]
model._loglikelihood_tokens = lambda *a, **k: VLLM._loglikelihood_tokens(model, *a, **k)
found["own_likely"] = plain(model.loglikelihood(likely))
found["own_rolling"] = model.loglikelihood_rolling(rolling)
model._loglikelihood_tokens = inner
found["sampled"] = model.generate_until(generations(sampled))
found["silent"] = model.generate_until(generations(silent))
answers = model.generated([request.args for request in generations(short)])
found["endings"] = [[answer.tokens, answer.stopped] for answer in answers]
found["before"] = len(journal), counts[-1].known, model.new_tokens
journal.close()
again = Journal(Path(sys.argv[2]))
model.attach(again, lambda count: None)
model.model.llm_engine.add_request = None  # nothing may be asked
found["again"] = answers_to(greedy, short, sampled)
found["again_likely"] = plain(model.loglikelihood(likely))
again.close()
Path(sys.argv[2]).unlink()
del model.model.llm_engine.add_request
model.attach(Journal(Path(sys.argv[2])), lambda count: None)
backwards = model.generate_until(generations(sampled)[::-1])
found["backwards"] = backwards[::-1]
model.begin_task(3)
first = model.generate_until(generations(sampled))
lines = len(model.journal)
model.repeat = 2
third = model.generate_until(generations(sampled))
answers = model.generated([request.args for request in generations(sampled)])
found["repeats"] = [first, third, [answer.seed for answer in answers], lines, len(model.journal)]
journaled_model._RUNNING_SECONDS = 0
counts.clear()
model.attach(model.journal, lambda count: counts.append(count))
model.generate_until(generations(long))
found["running"] = [[count.done, count.tokens] for count in counts], model.new_tokens

def refusal(call, *arguments):
    try:
        call(*arguments)
    except EvalError as error:
        return str(error)

found["refused"] = [
    refusal(model.generate_until, generations({"until": [], "max_gen_toks": 256})),
    refusal(
        model.loglikelihood,
        [Instance("loglikelihood", {}, ("The rate", " of stones" * 100), 0)],
    ),
]
stream = model._stream

def aborted(*arguments):
    for index, output in stream(*arguments):
        output.outputs[0].finish_reason = "abort"
        yield index, output

model._stream = aborted
found["refused"].append(refusal(model.generate_until, generations({"max_gen_toks": 5})))
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    model = write_random_svsk(write_dense(folder / "dense"), folder / "svsk")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(folder / "journal.jsonl")],
        env=serving_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return answer


def test_answers_are_lm_evals_own(found: dict[str, Any]) -> None:
    assert found["texts"] == found["own_texts"]
    assert len(set(found["texts"][0])) > 2
    assert [greedy for _, greedy in found["likely"]] == [
        greedy for _, greedy in found["own_likely"]
    ]
    values, own = ([value for value, _ in found[key]] for key in ("likely", "own_likely"))
    assert values == pytest.approx(own, abs=1e-3)
    assert found["rolling"] == pytest.approx(found["own_rolling"], abs=1e-3)
    assert found["rolling"][0] < -1


def test_nothing_is_asked_twice(found: dict[str, Any]) -> None:
    assert found["again"][:2] == found["texts"]
    assert found["again"][2] == found["sampled"]
    assert found["again_likely"] == found["likely"]
    # Five different prompts in three settings, all six when sampling, four different pairs, one
    # window of a text.
    assert found["before"][0] == 5 * 3 + 6 + 4 + 1


def test_settings_that_say_nothing_are_greedy(found: dict[str, Any]) -> None:
    assert found["silent"] == found["texts"][1]


def test_endings(found: dict[str, Any]) -> None:
    for tokens, stopped in found["endings"]:
        assert 1 <= tokens <= 3
        assert stopped or tokens == 3


def test_a_sampled_answer_depends_on_its_own_request_only(found: dict[str, Any]) -> None:
    assert len(set(found["sampled"])) > 3
    # The two equal prompts exchange their numbers, and with them their answers.
    order = [0, 1, 2, 3, 4, 5]
    order[0], order[3] = 3, 0
    assert found["backwards"] == [found["sampled"][index] for index in order]


def test_several_answers_are_drawn_at_once_with_seeds_of_their_own(found: dict[str, Any]) -> None:
    first, third, seeds, before, after = found["repeats"]
    assert first == found["sampled"]
    assert third != first
    assert len(set(third)) > 3
    assert len(set(seeds)) == 6
    assert before == after == 6 * 3


def test_tokens_of_answers_that_are_not_finished_are_told(found: dict[str, Any]) -> None:
    counts, tokens = found["running"]
    assert counts[0] == [1, 0]  # a prompt is there twice
    assert counts[-1] == [6, tokens]
    told = [count for _, count in counts]
    assert told == sorted(told)
    early = [count for done, count in counts if done == 1]  # no answer is finished
    assert early[-1] > 32


def test_what_a_model_cannot_answer_is_said(found: dict[str, Any]) -> None:
    room, continuation, ending = found["refused"]
    assert "Answers may have 256 tokens, which leaves no room for a prompt in a context of" in room
    assert "tokens does not fit the model's 256. Give a larger --model-arg" in continuation
    assert ending == "vLLM ended a request with 'abort', expected 'stop' or 'length'."
