# SPDX-License-Identifier: Apache-2.0
"""What tools that know nothing of SVSK do with a checkpoint.

Stop and say what to do. No model of random weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svsk_offline.storage.restore import restore
from svsk_vllm.format.config import STOCK_LOADER_KEY, STOCK_LOADER_NOTE
from tests.hf.loading import Folders, MakeFolders, assert_same, load
from tests.support.tiny_models import write_random_svsk

ASK_TRANSFORMERS = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
from transformers import AutoModelForSequenceClassification
for load in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
    try:
        load.from_pretrained(sys.argv[1])
    except ValueError as error:
        print("stopped:", error)
try:
    pipeline("text-generation", sys.argv[1])
except ValueError as error:
    print("stopped:", error)
assert not any(name.startswith("svsk") for name in sys.modules)
"""


def run(*command: str, **environment: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_stops(qwen2: Folders, tmp_path: Path, shards: int) -> None:
    svsk = qwen2.svsk if shards == 1 else write_random_svsk(qwen2.dense, tmp_path, shards=shards)
    code, printed = run("-c", ASK_TRANSFORMERS, str(svsk))
    assert code == 0, printed
    assert printed.count("stopped:") == 4
    assert printed.count(STOCK_LOADER_NOTE) >= 4


def test_lm_eval_stops(qwen2: Folders) -> None:
    pytest.importorskip("lm_eval")
    code, printed = run(
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={qwen2.svsk}",
        "--device",
        "cpu",
        "--tasks",
        "svsk_smoke",
        "--include_path",
        str(Path(__file__).parents[2] / "eval" / "tasks"),
    )
    assert code != 0
    # It asks for the method before it asks for the weights.
    assert "Unknown quantization type, got svsk" in printed


def test_vllm_without_the_plugin_stops(qwen2: Folders) -> None:
    pytest.importorskip("vllm")
    ask = "import sys; from vllm.config import ModelConfig; ModelConfig(sys.argv[1])"
    code, printed = run("-c", ask, str(qwen2.svsk), VLLM_PLUGINS="none")
    assert code != 0
    assert "svsk" in printed.splitlines()[-1] or "Unknown quantization method: svsk" in printed


def test_a_checkpoint_without_the_note_loads_as_before(broken: Path, qwen2: Folders) -> None:
    """Checkpoints that were written before there was one."""
    path = broken / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config[STOCK_LOADER_KEY]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert_same(load(broken), load(qwen2.restored))


def test_what_leaves_the_format_leaves_the_note(
    folders: MakeFolders, qwen2: Folders, tmp_path: Path
) -> None:
    load(qwen2.svsk).save_pretrained(tmp_path / "saved")
    restore(qwen2.svsk, tmp_path / "restored")
    for name in ("saved", "restored"):
        assert STOCK_LOADER_KEY not in json.loads(
            (tmp_path / name / "config.json").read_text(encoding="utf-8")
        )
        code, printed = run("-c", ASK_TRANSFORMERS, str(tmp_path / name))
        assert code == 0, printed
        assert "stopped:" not in printed
