# SPDX-License-Identifier: Apache-2.0
"""Answers worked out plainly: one prompt at a time, without padding or cache."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from svsk_eval.chat.scoring import ChatRequest

LIMIT = 12

QUESTIONS = (
    "what is a tin",
    "how many stones are in the tin that is not here",
    "sort one, three and two",
    "is it raining",
    "say a word, and then another word that rhymes with it, and explain why it does",
    "why",
    "who is there",
    "where does the train to the sea start",
    "add two and two",
    "name a colour",
)
"""More than are answered in one batch, and of several lengths."""


def prompt_ids(folder: Path, question: str) -> list[int]:
    """Tokens of a question as the folder's chat template puts it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(encoded["input_ids"])


@torch.no_grad()
def naive_answer(
    model: Any, prompt: Sequence[int], ends: Collection[int], limit: int
) -> tuple[list[int], int | None]:
    """The likeliest tokens, and the end among them if there is one."""
    answer: list[int] = []
    for _ in range(limit):
        ids = torch.tensor([[*prompt, *answer]])
        token = int(model(ids, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return answer, token
        answer.append(token)
    return answer, None


def request(folder: Path, file: Path, model: str = "svsk", /, **changes: Any) -> ChatRequest:
    """Score one of the fixture's models on the answers of ``dense``."""
    values = {
        "model": str(folder / model),
        "reference": str(folder / "dense"),
        "file": file,
        "prompts": len(QUESTIONS),
        "answer_tokens": LIMIT,
        # answers are the same on every processor
        "dtype": "float32",
        **changes,
    }
    return ChatRequest.model_validate(values)
