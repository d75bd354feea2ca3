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

from svsk_offline.export.dense import restore
from svsk_vllm.format.model_config import STOCK_LOADER_KEY, STOCK_LOADER_NOTE
from tests.hf.loading import Folders, assert_same, load
from tests.support.tiny_models import write_random_svsk

ASK_TRANSFORMERS = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    print("FOLDER")
    for load in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        try:
            load.from_pretrained(folder)
        except ValueError as error:
            print("stopped:", error)
    try:
        pipeline("text-generation", folder)
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


@pytest.fixture(scope="module")
def asked(qwen2: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[Path | int, str]:
    """What transformers, in one process, says of each folder.

    Checkpoints by their number of shards, and the two kinds of folders that leave the format.
    """
    folder = tmp_path_factory.mktemp("asked")
    load(qwen2.svsk).save_pretrained(folder / "saved")
    folders: dict[Path | int, Path] = {
        1: qwen2.svsk,
        3: write_random_svsk(qwen2.dense, folder / "three", shards=3),
        folder / "saved": folder / "saved",
        folder / "restored": restore(qwen2.svsk, folder / "restored"),
    }
    # unbuffered: what it warns of stands beside what it prints
    asking = ("-u", "-c", ASK_TRANSFORMERS, *map(str, folders.values()))
    code, printed = run(*asking)
    assert code == 0, printed
    return dict(zip(folders, printed.split("FOLDER\n")[1:], strict=True))


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_stops(asked: dict[Path | int, str], shards: int) -> None:
    assert asked[shards].count("stopped:") == 4
    assert asked[shards].count(STOCK_LOADER_NOTE) >= 4


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


def test_what_leaves_the_format_leaves_the_note(asked: dict[Path | int, str]) -> None:
    left = {folder: printed for folder, printed in asked.items() if isinstance(folder, Path)}
    assert sorted(folder.name for folder in left) == ["restored", "saved"]
    for folder, printed in left.items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert STOCK_LOADER_KEY not in config
        assert "stopped:" not in printed
