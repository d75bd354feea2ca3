# SPDX-License-Identifier: Apache-2.0
"""What vLLM fuses, from the table that is shipped; nothing here needs vLLM."""

import pytest

from svsk_vllm.format import ConfigGroup
from svsk_vllm.format.architectures import vllm_class
from tests.support.format_builders import make_group

LAYER = "model.layers.0."


def named(name: str) -> dict[str, list[str]]:
    return {"architectures": [name]}


@pytest.mark.parametrize(
    ("architecture", "linears", "expected"),
    [
        (
            "LlamaForCausalLM",
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            [("q_proj", "k_proj", "v_proj")],
        ),
        (
            "Phi3ForCausalLM",
            ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            [],
        ),  # fused on disk already
        (
            "Glm4ForCausalLM",
            ["q_proj", "k_proj", "gate_up_proj", "down_proj"],
            [("q_proj", "k_proj")],
        ),
        ("ApertusForCausalLM", ["up_proj", "down_proj", "gate_proj"], []),  # its MLP has no gate
        ("Lfm2ForCausalLM", ["w1", "w2", "w3"], [("w1", "w3")]),
        (
            "DeepseekV3ForCausalLM",
            ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
            [("q_a_proj", "kv_a_proj_with_mqa")],
        ),
        (
            "Qwen3_5ForCausalLM",
            ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
            [("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")],
        ),
        (
            "StableLmForCausalLM",
            ["gate_proj", "up_proj"],
            [("gate_proj", "up_proj")],
        ),  # only its loader says so
        ("InternLM2ForCausalLM", ["w1", "w3", "w2", "wqkv"], [("w1", "w3")]),
        (
            "Olmo2ForCausalLM",
            ["q_proj", "k_proj", "v_proj"],
            [("q_proj", "k_proj", "v_proj")],
        ),  # transformers' class
        ("NoSuchForCausalLM", ["gate_proj", "up_proj", "other"], [("gate_proj", "up_proj")]),
    ],
)
def test_fused_sets(architecture: str, linears: list[str], expected: list[tuple[str, ...]]) -> None:
    found = vllm_class(named(architecture)).fused_sets([f"{LAYER}mlp.{name}" for name in linears])
    assert found == [tuple(f"{LAYER}mlp.{name}" for name in members) for members in expected]


def test_sets_stay_within_their_module() -> None:
    names = [
        f"model.layers.{i}.{m}.{p}_proj"
        for i in (0, 11)
        for m in ("self_attn", "cross")
        for p in "qkvo"
    ]
    found = vllm_class(named("LlamaForCausalLM")).fused_sets(names)
    assert [len(members) for members in found] == [3, 3, 3, 3]
    assert all(len({name.rpartition(".")[0] for name in members}) == 1 for members in found)


def test_a_name_that_only_ends_alike_is_another() -> None:
    names = [f"{LAYER}q_proj", f"{LAYER}k_proj", f"{LAYER}index_k_proj", f"{LAYER}xq_proj"]
    assert vllm_class(named("LlamaForCausalLM")).fused_sets(names) == [
        (f"{LAYER}q_proj", f"{LAYER}k_proj")
    ]


def test_overlapping_sets_are_one() -> None:
    """BailingMoeV3 fuses q, k and v, with b where there is one."""
    names = [f"{LAYER}{p}_proj" for p in "qkvb"]
    assert vllm_class(named("BailingMoeV3ForCausalLM")).fused_sets(names) == [tuple(names)]


def schemes(**by_name: ConfigGroup | None) -> dict[str, ConfigGroup | None]:
    return {LAYER + name: scheme for name, scheme in by_name.items()}


def test_problems() -> None:
    llama = vllm_class(named("LlamaForCausalLM"))
    one, other = make_group(rank=4), make_group(rank=8, tile_m=48)
    assert llama.fused_problems(schemes(q_proj=one, k_proj=other, v_proj=one, o_proj=None)) == []
    assert llama.fused_problems(schemes(q_proj=None, k_proj=None, v_proj=None, o_proj=one)) == []
    (half,) = llama.fused_problems(schemes(q_proj=one, k_proj=None, v_proj=one))
    assert "LlamaForCausalLM" in half
    assert f"{LAYER}k_proj is not quantised while {LAYER}q_proj, {LAYER}v_proj are" in half
    assert half.endswith("Put all of them on the ignore list, or none.")
    (groups,) = llama.fused_problems(schemes(gate_proj=one, up_proj=make_group(group_size=32)))
    stored = "with 16-bit scales"
    assert f"{LAYER}gate_proj: int4 g64 {stored}, {LAYER}up_proj: int4 g32 {stored}" in groups
    (codebooks,) = llama.fused_problems(
        schemes(gate_proj=one, up_proj=make_group(codebook="quad8"))
    )
    assert "quad8" in codebooks


def test_support_and_notes() -> None:
    assert vllm_class(named("LlamaForCausalLM")).note() is None
    assert vllm_class(named("Starcoder2ForCausalLM")).support == "transformers"
    assert vllm_class(named("Starcoder2ForCausalLM")).note() is None
    removed = vllm_class(named("PersimmonForCausalLM"))
    assert (
        removed.note()
        == "PersimmonForCausalLM: vLLM 0.25.0 was the last to serve it. transformers can use the"
        " checkpoint."
    )
    unknown = vllm_class(named("NoSuchForCausalLM"))
    assert unknown.support == "unknown"
    assert "NoSuchForCausalLM: vLLM 0." in str(unknown.note())


@pytest.mark.parametrize(
    "config", [{}, {"architectures": None}, {"architectures": []}, {"architectures": [3]}]
)
def test_a_config_that_names_no_class(config: dict[str, object]) -> None:
    assert vllm_class(config, "LlamaForCausalLM").support == "native"
    assert "config.json names no architecture" in str(vllm_class(config).note())
