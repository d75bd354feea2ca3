# SPDX-License-Identifier: Apache-2.0
"""Running models through vLLM, one process per model, and the models to run.

The module is skipped where vLLM is not installed; the set-up of the project installs it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_offline.export.dense import restore
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import load_recipe
from svsk_vllm.format import Checkpoint, Codebook, ConfigGroup
from tests.support.forked import ForkedPopen, ForkServer
from tests.support.tiny_models import scheme as make_scheme
from tests.support.tiny_models import write_dense, write_random_svsk, write_restored

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")

ROOT = Path(__file__).parents[2]
SECONDS = 600
"""For one model: to start, to answer, to end."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint and the dense model it stands for."""

    svsk: Path
    restored: Path


def serving_environment(tensor_parallel_size: int = 1) -> dict[str, str]:
    """Environment of a vLLM process on a CPU."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends a function to the workers
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if tensor_parallel_size > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            str(rank) for rank in range(tensor_parallel_size)
        )
    return environment


Run = Callable[..., dict[str, Any]]
Fork = Callable[[Path, Mapping[str, str]], int]


class VllmPopen(ForkedPopen):
    """Jobs as forks of a process that has imported vLLM, but nothing that reads their settings."""

    server = ForkServer(
        "torch._inductor.compile_fx",
        "vllm.entrypoints.llm",
        "vllm.model_executor.models.llama",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
        environment=serving_environment(),
    )
    modules = ("tests.serving.worker", "svsk_eval.text.served")


def start_vllm(folder: Path, environment: Mapping[str, str], popen: Any = subprocess.Popen) -> int:
    """Run the job in a folder, and return the exit code of its process."""
    files = [str(folder / name) for name in ("job.json", "answer.json")]
    command = [sys.executable, "-m", "tests.serving.worker", *files]
    with (folder / "log").open("wb") as log:
        process = popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            return process.wait(SECONDS)
        finally:
            process.kill()


@pytest.fixture(scope="package")
def fork_vllm() -> Iterator[Fork]:
    """Runs a job in a fork; from the start where there is a GPU, which no fork could use."""
    if torch.cuda.is_available():
        yield start_vllm
        return
    yield partial(start_vllm, popen=VllmPopen)
    VllmPopen.server.stop()


@pytest.fixture
def fork_served(fork_vllm: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of ``svsk eval --engine vllm`` are forks too, but where there is a GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(subprocess, "Popen", VllmPopen)


@pytest.fixture(scope="package")
def run_vllm(tmp_path_factory: pytest.TempPathFactory, fork_vllm: Fork) -> Run:
    """A function that runs :mod:`tests.serving.worker` on one model and returns its answer."""

    def run(
        model: Path,
        prompts: Sequence[Sequence[int]],
        *,
        dtype: str = "bfloat16",
        eager: bool = True,
        tp: int = 1,
        max_tokens: int = 32,
        sequences: Sequence[Sequence[int]] = (),
        reload: bool = False,
        kernel: str = "auto",
        features: str = "",
        plugins: bool = True,
        **engine: Any,
    ) -> dict[str, Any]:
        if torch.cuda.is_available() and torch.cuda.device_count() < tp:
            pytest.skip(f"{tp} GPUs are needed, there is {torch.cuda.device_count()}")
        folder = tmp_path_factory.mktemp("vllm")
        job = {
            "engine": {
                "model": str(model),
                "dtype": dtype,
                "enforce_eager": eager,
                "tensor_parallel_size": tp,
                "max_model_len": 512,
                "disable_log_stats": True,
                **engine,
            },
            "prompts": prompts,
            "max_tokens": max_tokens,
            "sequences": sequences,
            "reload": reload,
        }
        (folder / "job.json").write_text(json.dumps(job))
        environment = serving_environment(tp) | {"SVSK_KERNEL": kernel}
        if not plugins:
            environment |= {"VLLM_PLUGINS": ""}
        if features:
            environment |= {"SVSK_CPU_FEATURES": features, "ATEN_CPU_CAPABILITY": features}
        # What is forked has vLLM's operators for this processor already.
        forks = tp == 1 and not features and plugins
        code = (fork_vllm if forks else start_vllm)(folder, environment)
        if code:
            raise RuntimeError(
                f"{folder}: exit code {code}\n{(folder / 'log').read_text()[-8000:]}"
            )
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        answer["log"] = (folder / "log").read_text()
        return answer

    return run


def served_schemes(codebook: Codebook = "int4") -> Mapping[str, ConfigGroup]:
    """Ranks and widths that differ within fused layers, two tilings in gate_up, odd tiles."""
    scheme = partial(make_scheme, codebook=codebook)
    return {
        "default": scheme("Linear", rank=3),
        "q": scheme(r"re:.*\.q_proj$", rank=4),
        "k": scheme(r"re:.*\.k_proj$", rank=2, num_bits=4),
        "v": scheme(r"re:.*\.v_proj$"),
        "o": scheme(r"re:.*\.o_proj$", rank=8, num_bits=4, group_size=32),
        "gate": scheme(r"re:.*\.gate_proj$", rank=2, num_bits=4),
        "up": scheme(r"re:.*\.up_proj$", rank=6, tile_n=0),
    }


def write_pair(folder: Path, family: str, dtype: torch.dtype, codebook: Codebook = "int4") -> Pair:
    """A random checkpoint of a tiny model with tiles of 48 x 96, and its dense twin."""
    dense = write_dense(folder / "dense", family, dtype=dtype)
    svsk = write_random_svsk(dense, folder / "svsk", schemes=served_schemes(codebook))
    return Pair(svsk, write_restored(svsk, folder / "restored"))


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Tiny checkpoints by family, dtype and codebook, made once."""
    made: dict[tuple[str, torch.dtype, Codebook], Pair] = {}

    def get(family: str, dtype: torch.dtype, codebook: Codebook = "int4") -> Pair:
        key = (family, dtype, codebook)
        if key not in made:
            made[key] = write_pair(tmp_path_factory.mktemp(f"{family}-pair"), *key)
        return made[key]

    return get


@pytest.fixture(scope="session")
def smollm2_pair(
    tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path
) -> Callable[[str], Pair]:
    """SmolLM2 quantised on little text, tiles of 256 x 200, and restored, by stored dtype.

    The dtype matters: a restored bfloat16 folder has rounded weights, which serving it in float16
    does not undo. In bfloat16 it is the recipe ``best`` in a single round, ranks and group sizes
    chosen under a bit budget; in float16 ``published``.
    """
    made: dict[str, Pair] = {}

    def get(dtype: str) -> Pair:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("smollm2-pair")
            tiles = {"rank": 16, "tile_m": 256, "tile_n": 200}
            changes: dict[str, Any] = {
                "calibration": {"samples": 16, "seq_len": 256},
                "sidecar": tiles,
            }
            if dtype == "bfloat16":
                changes |= {
                    "allocation": {"target_bpw": 5.0, "group_sizes": (64,), "scale_bits": (16,)},
                    "alternating": {"rounds": 1, "polish": 0},
                }
            recipe = load_recipe("best" if dtype == "bfloat16" else "published").override(changes)
            quantize(smollm2_dir, folder / "svsk", recipe, dtype=dtype)
            if dtype == "bfloat16":
                assert_ranks_differ_within_fused_layers(folder / "svsk")
            made[dtype] = Pair(folder / "svsk", restore(folder / "svsk", folder / "restored"))
        return made[dtype]

    return get


def assert_ranks_differ_within_fused_layers(folder: Path) -> None:
    """Otherwise the comparison would not test what it is for."""
    linears = Checkpoint(folder).linears
    blocks = {name.rpartition(".self_attn.")[0] for name in linears if ".self_attn." in name}
    ranks = [{linears[f"{block}.self_attn.{p}_proj"].rank for p in "qkv"} for block in blocks]
    assert any(len(found) == 3 for found in ranks)
    assert {spec.group_size for spec in linears.values()} == {32, 64}
