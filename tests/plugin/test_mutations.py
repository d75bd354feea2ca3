# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints against `svsk validate`, the transformers loader and the plugin.

What a loader takes, validate calls valid, and it has the numbers that docs/format.md gives, read by
a decoder of its own; whatever is refused is refused in words of ours, within seconds and without
much memory.
"""

import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import ValidationError

import svsk_vllm.hf
from svsk_vllm.architecture.folder_check import checkpoint_problems
from svsk_vllm.format import ConfigGroup, EmbeddingArgs, SvskFormatError
from svsk_vllm.format.group_scales import ScaleBits
from svsk_vllm.format.shards import read_json
from tests.support.independent_decoder import decode, read_folder
from tests.support.mutations import Mutation, mutations
from tests.support.tiny_models import (
    EMBEDDING,
    FAMILIES,
    Family,
    default_schemes,
    table_schemes,
    write_dense,
    write_random_svsk,
)

SECONDS = 30
KIBIBYTES = 2**20
MODEL = Family(
    "qwen2", {**FAMILIES["qwen2"].settings, "num_hidden_layers": 1, "intermediate_size": 192}
)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Weights = dict[str, torch.Tensor]
Loader = Callable[[Path], Weights]


@dataclass
class Folders:
    """Two checkpoints of a model from different runs, and a place to damage copies."""

    sound: Path
    other: Path
    work: Path
    counts: Counter[str] = field(default_factory=Counter)


def schemes() -> dict[str, ConfigGroup]:
    """Every kind of linear in one model.

    Scales of one level on q, k, v, and of two on the others.
    """
    changed: dict[str, tuple[int, ScaleBits]] = {
        "default": (64, 6),  # three groups in down_proj: a code of each row's bytes is padding
        "o": (16, 6),
        "gate": (32, 8),
        "up": (32, 8),
    }
    return default_schemes() | {
        key: group.model_copy(
            update={
                "weights": group.weights.model_copy(
                    update={"group_size": changed[key][0], "scale_bits": changed[key][1]}
                )
            }
        )
        for key, group in default_schemes().items()
        if key in changed
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("mutations")
    dense = write_dense(root / "dense", MODEL)
    made = {
        "schemes": schemes() | table_schemes("mixed-int8", "int8"),
        "ignore": (),
        "embedding": EmbeddingArgs(module=EMBEDDING),
    }
    sound = write_random_svsk(dense, root / "sound", shards=3, **made)
    other = write_random_svsk(dense, root / "other", shards=3, seed=1, **made)
    return Folders(sound, other, root / "work")


@pytest.fixture(scope="module")
def vllm_loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Loads a folder as the engine's worker does: the weights by their names in the checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    svsk_vllm.register()
    store = tmp_path_factory.mktemp("store") / "store"

    def load(folder: Path) -> Weights:
        arguments = EngineArgs(
            model=str(folder),
            enforce_eager=True,
            max_model_len=64,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
                initialize_model_parallel(1, 1)
            return unfused(get_model(vllm_config=config), config.model_config.hf_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVSK_KERNEL", "reference")
        patch.setattr(
            torch.accelerator, "empty_cache", lambda: None
        )  # as vLLM's worker does on a CPU
        yield load
        if torch.distributed.is_initialized():
            cleanup_dist_env_and_memory()


def unfused(model: Any, config: Any) -> Weights:
    """Parameters of vLLM's model by their names in the checkpoint."""
    head = config.hidden_size // config.num_attention_heads
    rows = {
        "qkv_proj": [config.num_attention_heads * head, *2 * [config.num_key_value_heads * head]],
        "gate_up_proj": 2 * [config.intermediate_size],
    }
    found = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        parent, _, layer = module.rpartition(".")
        if layer in FUSED:
            parts = parameter.data.split(rows[layer])
            found |= {
                f"{parent}.{part}.{last}": t for part, t in zip(FUSED[layer], parts, strict=True)
            }
        else:
            found[name] = parameter.data[: config.vocab_size]
    return found


def load_with_transformers(folder: Path) -> Weights:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def decoded(folder: Path) -> Weights:
    """The weights a folder stands for, float64, by the decoder written from docs/format.md."""
    config, tensors = read_folder(folder)
    modules = [
        name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")
    ]
    weights = {f"{name}.weight": torch.tensor(decode(config, tensors, name)) for name in modules}
    dense = {
        name: value
        for name, value in tensors.items()
        if name.rpartition(".")[0] not in modules or "bias" in name
    }
    return weights | {name: torch.tensor(value).double() for name, value in dense.items()}


def attempt(load: Loader, folder: Path, before_us: Callable[[Path], object]) -> Weights | None:
    """What a loader loads, or None where it refuses.

    Another error than ours only where it never came to us.
    """
    try:
        return load(folder)
    except SvskFormatError:
        return None
    except Exception as error:
        if not is_ours(error) and not never_ours(before_us, folder):
            raise
        return None


def is_ours(error: Exception) -> bool:
    """An error of ours within vLLM's configuration, which pydantic checks."""
    items = error.errors() if isinstance(error, ValidationError) else []
    return any(isinstance(item.get("ctx", {}).get("error"), SvskFormatError) for item in items)


def never_ours(before_us: Callable[[Path], object], folder: Path) -> bool:
    """Whether a stock library stops at config.json by itself, or is not told whose it is."""
    try:
        before_us(folder)
        declared = read_json(folder / "config.json").get("quantization_config")
    except Exception:
        return True
    return (
        not isinstance(declared, dict)
        or declared.get("quant_method") != "svsk"
        or "load_in_4bit" in declared
    )


def stock_config(folder: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder)


def stock_engine_config(folder: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(folder), dtype="bfloat16", skip_tokenizer_init=True).create_model_config()


def assert_close(found: Weights, expected: Weights, who: str) -> None:
    for name, tensor in expected.items():
        if name in found:
            torch.testing.assert_close(
                found[name].double(), tensor, rtol=2**-7, atol=1e-6, msg=f"{who}: {name}"
            )
    assert found.keys() <= expected.keys() | {"lm_head.weight"}, who


def examine(mutation: Mutation, folders: Folders, load_with_vllm: Loader) -> None:
    """All properties of one damaged copy."""
    shutil.rmtree(folders.work, ignore_errors=True)
    shutil.copytree(folders.sound, folders.work)
    mutation.apply(folders.work, folders.other)
    start = time.monotonic()
    problems = checkpoint_problems(folders.work)
    damage = checkpoint_problems(folders.work, serving=False)
    times = [time.monotonic() - start]
    loaded = {}
    for who, load, before_us in (
        ("transformers", load_with_transformers, stock_config),
        ("vLLM", load_with_vllm, stock_engine_config),
    ):
        start = time.monotonic()
        loaded[who] = attempt(load, folders.work, before_us)
        times.append(time.monotonic() - start)
        refused = damage if who == "transformers" else problems
        assert loaded[who] is None or not refused, f"{who} takes what validate refuses: {refused}"
    assert max(times) < SECONDS
    taken = [who for who, weights in loaded.items() if weights is not None]
    folders.counts[
        f"{mutation.kind}: {'refused' if problems else 'valid, taken by ' + ' and '.join(taken)}"
    ] += 1
    if not taken:
        return
    expected = decoded(folders.work if mutation.changes_values else folders.sound)
    for who, weights in loaded.items():
        if weights is not None:
            assert_close(weights, expected, who)


def test_a_sound_checkpoint_is_taken_by_all(folders: Folders, vllm_loader: Loader) -> None:
    assert checkpoint_problems(folders.sound) == []
    expected = decoded(folders.sound)
    for who, load in (("transformers", load_with_transformers), ("vLLM", vllm_loader)):
        weights = load(folders.sound)
        assert expected.keys() == weights.keys(), who
        assert_close(weights, expected, who)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", [75, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutations(
    folders: Folders, vllm_loader: Loader, capsys: pytest.CaptureFixture[str], examples: int
) -> None:
    folders.counts.clear()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(mutations)
    def examine_one(mutation: Mutation) -> None:
        examine(mutation, folders, vllm_loader)

    examine_one()
    with capsys.disabled():
        print(
            "", *(f"{count:5} {what}" for what, count in sorted(folders.counts.items())), sep="\n"
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < KIBIBYTES
