# SPDX-License-Identifier: Apache-2.0
"""Samples that run through a model one block at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from svsk_offline.calibration import BlockRunner, load_calibration
from svsk_offline.storage.dense_model import ModelSource


def test_hidden_states_on_disk_are_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    """Block outputs equal the whole model's, in memory and in a mapped file."""
    source = ModelSource(tiny_llama)
    texts = load_calibration("python", source.tokenizer, 3, 32, 0)
    name, blocks = source.blocks
    outputs = []
    for limit in (1 << 30, 0):
        runner = BlockRunner(
            source,
            texts,
            torch.device("cpu"),
            torch.float32,
            memory_limit=limit,
            batch_tokens=64,
            scratch=tmp_path,
        )
        assert (runner.file is not None) == (limit == 0)
        for index, block in enumerate(blocks):
            source.load(block, f"{name}.{index}.", torch.float32, torch.device("cpu"))
            runner.advance(index, block)
            source.unload(block)
        outputs.append(runner.hidden.clone())
        runner.close()
        assert not any(tmp_path.iterdir())
    assert torch.equal(*outputs)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = model.model(texts.tokens).last_hidden_state
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
