# SPDX-License-Identifier: Apache-2.0
"""``svsk quantize`` and the models it writes, on a simulated GPU.

No devices are mixed, and the bits are the CPU's.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from rich.console import Console
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_eval.bench.engines import hf_model
from svsk_eval.bench.journal import Journal
from svsk_eval.speed.random_model import VARIANTS, write_random_model
from svsk_eval.text.generate import generate_texts
from svsk_eval.text.models import load_model
from svsk_eval.text.scoring import EvalResult, evaluate
from svsk_kernels.errors import SvskError
from svsk_kernels.gpu import error_feedback as feedback
from svsk_offline import quantize_block, run
from svsk_offline.calibration import BlockRunner, input_statistics, load_calibration
from svsk_offline.console import quantize_with_progress
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.planning import measurements
from svsk_offline.quantizers import lowrank
from svsk_offline.quantizers.error_feedback import Levels, round_in_a_loop
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.layer_report import LayerReport
from svsk_vllm.format import Checkpoint
from tests.offline.folders import folder_bytes
from tests.support.simulated_cuda import simulated_cuda
from tests.support.tiny_models import FAMILIES, Family, write_dense, write_random_svsk

GPU = torch.device("cuda", 0)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FEW = ("lm_head", r"re:.*\.(q|k|v|gate|up)_proj$")
BUDGET = {"target_bpw": 4.7, "ranks": (0, 2, 4), "factor_bits": (4, 8)}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads, in which transformers loads, do not see the simulation."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, which computes for the simulated GPU, has no product of 16-bit factors in float32."""
    monkeypatch.setattr(input_statistics, "multiplied_exactly", lambda *_: False)


@pytest.fixture(autouse=True)
def one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in bfloat16 on a GPU, and on some CPUs in float32.

    Here in bfloat16 everywhere, to compare the results.
    """
    monkeypatch.setattr(run, "block_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(measurements, "block_dtype", lambda device: torch.bfloat16)


@pytest.fixture(autouse=True)
def loop_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that rounds a block of columns cannot be launched here.

    Its own tests compare it with this loop.
    """

    def loop(
        work: torch.Tensor,
        coupling: torch.Tensor,
        pivots: torch.Tensor,
        scale: torch.Tensor,
        low: int,
        high: int,
        quad8: bool,
        values: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        feedback.check_block(work, coupling, pivots, scale, values)
        levels = Levels(low, high, "quad8" if quad8 else "int4")
        return round_in_a_loop(work, coupling, pivots, scale, levels, values)

    monkeypatch.setattr(feedback, "feedback_block", loop)


@pytest.fixture(autouse=True)
def exact_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU singular vectors are iterated.

    With as many to spare as these tiles have columns, they are exact.
    """
    monkeypatch.setattr(lowrank, "_OVERSAMPLING", 64)


def small_model(folder: Path, family: str = "llama", **settings: Any) -> Path:
    known = FAMILIES[family]
    return write_dense(folder, Family(known.model_type, {**known.settings, **SMALL, **settings}))


def small_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe on a handful of short samples, with tiles that fit nothing.

    ``changes`` by section.
    """
    small = {
        "calibration": {"samples": 12, "seq_len": 24},
        "sidecar": {"rank": 4, "tile_m": 48, "tile_n": 48},
    }
    for section, values in changes.items():
        small[section] = values if section == "ignore" else {**small.get(section, {}), **values}
    return load_recipe(name).override(small)


def without_fingerprint(folder: Path) -> dict[str, bytes]:
    """Contents of a checkpoint but for what names its run: the kind of device is part of that."""
    producer = json.loads((folder / "config.json").read_text())["quantization_config"]["producer"]
    fingerprint = producer["svsk_fingerprint"].encode()
    return {
        name: data.replace(fingerprint, bytes(len(fingerprint)))
        for name, data in folder_bytes(folder).items()
    }


@pytest.mark.parametrize(
    ("family", "recipe", "changes"),
    [
        ("llama", "published", {}),
        (
            "qwen2",
            "published",
            {
                "weights": {"codebook": "quad8", "group_size": 32},
                "calibration": {"sequential": True},
            },
        ),
        ("qwen2", "fast", {}),
        (
            "llama",
            "fast",
            {"alternating": {"polish": 1, "scales": "absmax"}, "sidecar": {"rank": 0}},
        ),
        (
            "qwen3",
            "best",
            {"alternating": {"rounds": 2, "aim": 1.0}, "ignore": FEW},
        ),
        (
            "mistral",
            "best",
            {
                "ignore": FEW,
                "weights": {"codebook": "quad8"},
                "alternating": {"rounds": 1},
                "allocation": BUDGET,
            },
        ),
        (
            "llama",
            "fast",
            {"gradients": {"token_power": 0.5, "row_power": 1.0, "shared": True}},
        ),
    ],
    ids=["published", "quad8", "fast", "base only", "best", "budget", "gradients"],
)
def test_quantize_gives_the_bytes_of_a_cpu(
    tmp_path: Path, family: str, recipe: str, changes: Mapping[str, Any]
) -> None:
    dense = small_model(
        tmp_path / "dense", family, num_hidden_layers=2 if recipe == "published" else 1
    )
    chosen = small_recipe(recipe, **changes)
    on_cpu = quantize(dense, tmp_path / "cpu", chosen, device="cpu")
    with simulated_cuda():
        on_gpu = quantize(dense, tmp_path / "gpu", chosen, device="cuda")
    assert without_fingerprint(tmp_path / "gpu") == without_fingerprint(tmp_path / "cpu")
    assert [report.error for report in on_gpu.layers] == [report.error for report in on_cpu.layers]


def test_blocks_run_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above means something: what is compared was computed there."""
    seen = []
    original = quantize_block.quantize_linear

    def spy(name: str, weight: torch.Tensor, statistics: Any, *rest: Any) -> Any:
        seen.append((weight.device, statistics.hessian.device))
        return original(name, weight, statistics, *rest)

    monkeypatch.setattr(quantize_block, "quantize_linear", spy)
    dense = small_model(tmp_path / "dense", num_hidden_layers=1)
    with simulated_cuda():
        quantize(
            dense, tmp_path / "out", small_recipe("fast", sidecar={"rank": 0})
        )  # device="auto"
        with pytest.raises(SvskError, match="--device cuda:1: not usable here"):
            quantize(dense, tmp_path / "other", "fast", device="cuda:1")
    assert seen == [(GPU, GPU)] * 7


@pytest.mark.parametrize(
    "changes",
    [{}, {"calibration": {"sequential": True}}, {"alternating": {"aim": 1.0}}],
    ids=["dense", "sequential", "aim"],
)
def test_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    dense = small_model(tmp_path / "dense")
    recipe = small_recipe(
        "fast",
        ignore=FEW,
        sidecar={"rank": 0},
        gradients={"token_power": 0.5, "row_power": 1.0},
    ).override(changes)

    def stop(report: LayerReport) -> None:
        if report.name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    with simulated_cuda():
        quantize(dense, tmp_path / "whole", recipe, device="cuda")
        with pytest.raises(KeyboardInterrupt):
            quantize(dense, tmp_path / "out", recipe, device="cuda", progress=Progress(layer=stop))
        redone: list[str] = []
        noted = Progress(layer=lambda report: redone.append(report.name))
        quantize(dense, tmp_path / "out", recipe, device="cuda", progress=noted)
    assert {name.split(".")[2] for name in redone} == {"1"}
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_randomised_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only matrices far larger than the above go through."""
    monkeypatch.setattr(lowrank, "_EXACT_LIMIT", 8)
    monkeypatch.setattr(lowrank, "_OVERSAMPLING", 2)
    matrices = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    expected = [
        *lowrank.truncated_svd(matrices[0], 4),
        lowrank.leading_right_vectors(matrices, 4, exact=False),
    ]
    with simulated_cuda():
        there = matrices.cuda()
        found = [*lowrank.truncated_svd(there[0], 4), lowrank.leading_right_vectors(there, 4)]
        assert [tensor.device for tensor in found] == [GPU] * 4
        assert all(
            torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True)
        )


def test_hidden_states_in_a_file(tmp_path: Path) -> None:
    source = ModelSource(small_model(tmp_path / "dense"))
    texts = load_calibration("python", source.tokenizer, 3, 24, 0)
    outputs = []
    with simulated_cuda():
        for device, limit in ((GPU, 0), (GPU, 1 << 30), (torch.device("cpu"), 0)):
            runner = BlockRunner(
                source, texts, device, torch.float32, memory_limit=limit, scratch=tmp_path
            )
            assert runner.hidden.device.type == "cpu"
            name, blocks = source.blocks
            source.load(blocks[0], f"{name}.0.", torch.float32, device)
            runner.advance(0, blocks[0])
            source.unload(blocks[0])
            outputs.append(runner.hidden.clone())
            runner.close()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_of_a_checkpoint_against_its_source(tmp_path: Path, family: str) -> None:
    """``svsk eval`` with the engine hf.

    The checkpoint is dequantised by the transformers loader.
    """
    dense = write_dense(tmp_path / "dense", family)
    svsk = write_random_svsk(dense, tmp_path / "svsk")
    restored = restore(svsk, tmp_path / "restored")
    text = tmp_path / "text.txt"
    text.write_text("The rate of stones in a tin is not here. " * 20)

    def scored(model: Path, device: str | None) -> EvalResult:
        return evaluate(model, dense, text, chunks=3, seq_len=32, dtype="float32", device=device)

    expected = scored(svsk, "cpu")
    assert expected.kl_mean is not None
    assert expected.kl_mean > 1e-3
    with simulated_cuda():
        assert load_model(svsk).device == GPU
        assert scored(svsk, "cuda") == expected
        assert scored(restored, None).per_chunk == expected.per_chunk


def test_transformers_loads_a_checkpoint_straight_to_the_gpu(tmp_path: Path) -> None:
    svsk = write_random_svsk(write_dense(tmp_path / "dense", "qwen2"), tmp_path / "svsk")
    expected = AutoModelForCausalLM.from_pretrained(svsk, dtype=torch.float32).state_dict()
    with simulated_cuda():
        for device_map in ("cuda", {"": 0}):
            model: Any = AutoModelForCausalLM.from_pretrained(
                svsk, dtype=torch.float32, device_map=device_map
            )
            assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {GPU}
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor.cpu(), expected[name]), name
            assert model(torch.arange(8, device="cuda").view(1, 8)).logits.device == GPU


def test_the_summary_tells_the_peak_memory_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, shown = small_model(tmp_path / "dense", num_hidden_layers=1), io.StringIO()
    console = Console(file=shown, soft_wrap=True)
    asked: list[torch.device] = []

    def peak(device: torch.device) -> int:
        asked.append(device)
        return 5 << 29

    with simulated_cuda(), monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "max_memory_allocated", peak)
        quantize_with_progress(
            console, dense, tmp_path / "out", small_recipe("published"), device="cuda:0"
        )
    assert " GiB, of the GPU 2.50 GiB\n" in shown.getvalue()
    assert asked == [GPU]


def test_tasks_with_transformers(tmp_path: Path) -> None:
    """``svsk bench`` with the engine hf."""
    svsk = write_random_svsk(write_dense(tmp_path / "dense"), tmp_path / "svsk")
    greedy = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    prompts = ["The rate", "of stones", "in a tin"]
    written = [
        Instance("generate_until", {}, (prompt, greedy), index)
        for index, prompt in enumerate(prompts)
    ]
    rated = [
        Instance("loglikelihood", {}, (prompt, " is here"), index)
        for index, prompt in enumerate(prompts)
    ]

    def answers(device: str) -> tuple[Any, Any]:
        arguments = {"pretrained": str(svsk), "dtype": "float32", "batch_size": 2, "device": device}
        model = hf_model(arguments, Journal(tmp_path / f"{device}.jsonl"), lambda *_: None)
        assert model.model.device.type == device
        return model.generate_until(written), model.loglikelihood(rated)

    expected = answers("cpu")
    with simulated_cuda():
        assert answers("cuda") == expected
        texts = generate_texts(str(svsk), prompts, "hf", max_tokens=8, dtype="float32")
    assert texts == generate_texts(str(svsk), prompts, "hf", max_tokens=8, dtype="float32")


def test_random_model_drawn_on_the_gpu(tmp_path: Path) -> None:
    changes = {
        "num_hidden_layers": 1,
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 128,
    }
    for kind in VARIANTS:
        with simulated_cuda():
            write_random_model(tmp_path / kind, "qwen3-4b", kind, changes, device="cuda")
        write_random_model(tmp_path / f"{kind} cpu", "qwen3-4b", kind, changes, device="cpu")
        assert folder_bytes(tmp_path / kind) == folder_bytes(tmp_path / f"{kind} cpu")
    assert Checkpoint(tmp_path / "svsk-r16").linears
