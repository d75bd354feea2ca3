# SPDX-License-Identifier: Apache-2.0
"""Tiny models that answer, some of them to an end, and a file of prompts."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from svsk_eval.text.models import load_model
from tests.eval.chat.support import LIMIT, QUESTIONS, naive_answer, prompt_ids
from tests.support.format_builders import edit_json
from tests.support.tiny_models import EOS, write_dense, write_random_svsk, write_restored

TEMPLATE = (
    "<bos>{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders.

    ``dense``, whose generation settings name a second end of answers that it comes to,
    ``other`` (other weights), ``svsk`` (of dense) and ``restored`` (what svsk stands for).
    """
    folder = tmp_path_factory.mktemp("chat-models")
    for seed, name in enumerate(("dense", "other")):
        write_dense(folder / name, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / name)
    dense = load_model(folder / "dense")
    # Random weights do not say <eos>: what they do say in the midst of an answer is made an end.
    said, _ = naive_answer(dense, prompt_ids(folder / "dense", QUESTIONS[0]), {EOS}, LIMIT)
    end = next(token for place, token in enumerate(said) if place > 3 and token not in said[:place])
    for name in ("dense", "other"):
        edit_json(
            folder / name / "generation_config.json",
            # a penalty that would change answers, were it taken
            lambda config: config.update(eos_token_id=[EOS, end], repetition_penalty=5.0),
        )
    write_random_svsk(folder / "dense", folder / "svsk")
    write_restored(folder / "svsk", folder / "restored")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of :data:`QUESTIONS`."""
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"question": question, "answer": "not used"}) for question in QUESTIONS]
    path.write_text("\n".join(rows) + "\n")
    return path
