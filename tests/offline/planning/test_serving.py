# SPDX-License-Identifier: Apache-2.0
"""What vLLM would refuse is refused before any work, and found in a folder that has it."""

from pathlib import Path
from typing import Any

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline import run
from svsk_offline.calibration import CalibrationSet, load_calibration
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.inspection import serving_note, validate_against_architecture
from svsk_vllm.format import EmbeddingArgs
from tests.support.format_builders import edit_json
from tests.support.tiny_models import (
    EMBEDDING,
    default_schemes,
    scheme,
    table_schemes,
    write_dense,
    write_random_svsk,
)


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as reading weights fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr(run.Run, "_plan", refuse)


def texts(model: Path) -> CalibrationSet:
    return load_calibration("python", ModelSource(model).tokenizer, 4, 32, 0)


@pytest.mark.parametrize(
    ("ignore", "named"),
    [
        ("re:.*k_proj", "model.layers.0.self_attn.k_proj is not quantised"),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate_proj is not quantised"),
        ("re:.*(up|v)_proj", "model.layers.0.self_attn.v_proj is not quantised"),
    ],
)
def test_half_a_fused_layer(
    tmp_path: Path,
    tiny_qwen2: Path,
    tiny_recipe: Recipe,
    nothing_is_computed: None,
    ignore: str,
    named: str,
) -> None:
    recipe = tiny_recipe.override({"ignore": (ignore,)})
    with pytest.raises(
        SvskError, match=r"vLLM fuses them .* Put all of them on the ignore list, or none"
    ) as caught:
        quantize(tiny_qwen2, tmp_path / "out", recipe, calibration=texts(tiny_qwen2))
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_fused_layer_may_be_ignored(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe, nothing_is_computed: None
) -> None:
    recipe = tiny_recipe.override({"ignore": ("re:.*[qkv]_proj", "re:.*layers.1.mlp")})
    with pytest.raises(AssertionError, match="the run has begun"):
        quantize(tiny_qwen2, tmp_path / "out", recipe, calibration=texts(tiny_qwen2))


def test_a_sidecar_that_would_lose_its_rows(
    tmp_path: Path, tiny_recipe: Recipe, nothing_is_computed: None
) -> None:
    """vLLM's loader of Bloom regroups query_key_value by name, and cannot with a sidecar."""
    model = write_dense(tmp_path / "bloom", "bloom")
    calibration = texts(model)
    refusal = r"query_key_value: a sidecar of rank \d+, but BloomForCausalLM"
    with pytest.raises(SvskError, match=refusal):
        quantize(model, tmp_path / "out", tiny_recipe, calibration=calibration)
    messages: list[str] = []
    progress = Progress(message=messages.append)
    # Without a sidecar it is served: a bit budget, which chooses, is one for bases alone.
    recipes = {"uniform": tiny_recipe.override({"sidecar": {"rank": 0}}), "b": load_recipe("best")}
    for out, recipe in recipes.items():
        with pytest.raises(AssertionError, match="the run has begun"):
            quantize(model, tmp_path / out, recipe, calibration=calibration, progress=progress)
    assert any(text.startswith("Bases alone share the bit budget: ") for text in messages)


def test_unknown_to_vllm_is_said_and_done(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe, nothing_is_computed: None
) -> None:
    model = write_dense(tmp_path / "dense", "llama")
    edit_json(
        model / "config.json", lambda config: config.update(architectures=["OwnLlamaForCausalLM"])
    )
    said: list[str] = []
    with pytest.raises(AssertionError, match="the run has begun"):
        quantize(
            model,
            tmp_path / "out",
            tiny_recipe,
            calibration=texts(model),
            progress=Progress(message=said.append),
        )
    assert any("OwnLlamaForCausalLM: vLLM 0." in line for line in said)


def test_validate_finds_what_vllm_refuses(tmp_path: Path, tiny_qwen2: Path) -> None:
    schemes = default_schemes() | {"q": scheme(r"re:.*\.q_proj$", rank=4, group_size=32)}
    folder = write_random_svsk(tiny_qwen2, tmp_path / "groups", schemes=schemes)
    problems = validate_against_architecture(folder)
    assert len(problems) == 2  # one per block
    assert "model.layers.0.self_attn.q_proj: int4 g32" in problems[0]
    schemes = default_schemes() | {"q": scheme(r"re:.*\.q_proj$", rank=4, scale_bits=6)}
    folder = write_random_svsk(tiny_qwen2, tmp_path / "scales", schemes=schemes)
    problems = validate_against_architecture(folder)
    assert len(problems) == 2
    assert "q_proj: int4 g64 with 6-bit scales, " in problems[0]
    folder = write_random_svsk(tiny_qwen2, tmp_path / "half", ignore=("lm_head", "re:.*up_proj"))
    problems = validate_against_architecture(folder)
    assert len(problems) == 2
    assert (
        "model.layers.0.mlp.up_proj is not quantised while model.layers.0.mlp.gate_proj is"
        in problems[0]
    )
    assert serving_note(folder) is None


def test_validate_finds_a_table_whose_dense_weight_vllm_reads(
    tmp_path: Path, tiny_qwen2: Path
) -> None:
    folder = write_random_svsk(
        tiny_qwen2,
        tmp_path / "out",
        schemes=default_schemes() | table_schemes(None, "int8"),
        embedding=EmbeddingArgs(module=EMBEDDING, tied=False),
    )
    assert validate_against_architecture(folder) == []
    edit_json(folder / "config.json", lambda c: c.update(architectures=["ChatGLMModel"]))
    problems = validate_against_architecture(folder)
    assert any("reads its dense weight in ChatGLMModel" in problem for problem in problems)


def test_validate_finds_rows_that_would_be_lost(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "bloom", "bloom")
    folder = write_random_svsk(dense, tmp_path / "out", schemes={"all": scheme("Linear", rank=2)})
    problems = validate_against_architecture(folder)
    assert [problem.partition(":")[0] for problem in problems] == [
        f"transformer.h.{index}.self_attention.query_key_value" for index in range(2)
    ]
    fine = write_random_svsk(dense, tmp_path / "fine", schemes={"all": scheme("Linear")})
    assert validate_against_architecture(fine) == []
