# SPDX-License-Identifier: Apache-2.0
"""Exported files in llama.cpp itself, through the npm package node-llama-cpp.

``npm install node-llama-cpp`` in a folder, and SVSK_LLAMA_CPP names that folder.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svsk_offline.export.gguf.model import export_gguf
from svsk_vllm.format import Checkpoint, dequantize
from tests.offline.export.gguf_files import write_svsk
from tests.support import tiny_models

FOLDER = "SVSK_LLAMA_CPP"
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
NLL_BOUND = 0.02
EFFECT_BOUND = 0.005
"""llama.cpp rounds inputs to 8 bits, which moves the effect of the large sidecars of this test."""
TEXT = "It's the 1st of 2048 tests: in here, he sat on the heath.\n\n  Rain (and rats)?"


@pytest.fixture(scope="module")
def package() -> Path:
    """The installed package."""
    package = Path(os.environ.get(FOLDER, "."), "node_modules", "node-llama-cpp")
    if shutil.which("node") is None or not package.is_dir():
        pytest.skip(f"{FOLDER} names no folder with the npm package node-llama-cpp")
    return package.resolve()


def asked(package: Path, folder: Path, model: Path, adapter: Path | None, ids: Any) -> Any:
    """llama.cpp's log-probabilities, and its tokens of ``TEXT``."""
    job = {
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "sequences": ids,
        "text": TEXT,
    }
    (folder / "job.json").write_text(json.dumps(job))
    files = [str(folder / name) for name in ("job.json", "answer.json")]
    run = subprocess.run(
        ["node", str(SCRIPT), str(package), *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "answer.json").read_text())


def nll_of(scores: list[list[float]]) -> float:
    return -sum(map(sum, scores)) / sum(map(len, scores))


def transformers_scores(
    svsk: Path, dense: Path, ids: list[list[int]], *, sidecar: bool
) -> list[list[float]]:
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, linear in Checkpoint(svsk).iter_linears():
        model.get_submodule(name).weight.data = dequantize(linear, with_sidecar=sidecar)
    with torch.inference_mode():
        logs = [model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in ids]
    return [
        log.gather(1, torch.tensor(row[1:])[:, None]).flatten().tolist()
        for log, row in zip(logs, ids, strict=True)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_predictions_and_tokens(
    package: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "SIDECAR_FRACTION", 0.2)
    svsk = write_svsk(tmp_path, family, tables=family != "qwen3")
    files = (tmp_path / "out.gguf", tmp_path / "lora.gguf")
    export_gguf(svsk, files[0], lora=files[1])
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 256, (96,), generator=generator).tolist() for _ in range(4)]
    dense = tmp_path / "dense"
    own = [transformers_scores(svsk, dense, ids, sidecar=sidecar) for sidecar in (False, True)]
    answers = [asked(package, tmp_path, files[0], adapter, ids) for adapter in (None, files[1])]
    theirs = [answer["scores"] for answer in answers]
    for one, other in zip(own, theirs, strict=True):
        assert abs(nll_of(one) - nll_of(other)) < NLL_BOUND
    effects = torch.tensor(own[1]) - torch.tensor(own[0])
    found = torch.tensor(theirs[1]) - torch.tensor(theirs[0])
    related = float(torch.corrcoef(torch.stack((effects.flatten(), found.flatten())))[0, 1])
    print(f"{family}: {float(effects.mean())}, {float(found.mean())}, correlation {related}")
    assert abs(float((effects - found).mean())) < EFFECT_BOUND
    assert related > 0.95, "the adapter does not do at each token what the sidecar does"
    tokens = AutoTokenizer.from_pretrained(svsk)(TEXT, add_special_tokens=False).input_ids
    assert answers[0]["tokens"] == tokens
