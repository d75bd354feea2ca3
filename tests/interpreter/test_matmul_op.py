# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer gets, the custom op, and the tables of configurations."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernels.gpu import matmul_op as dispatch
from svsk_kernels.gpu import tuning
from svsk_kernels.gpu.choice import Choice, Gpu, TuningError, choice_for
from svsk_kernels.gpu.matmul_op import SvskMatmul, gpu_of
from svsk_kernels.gpu.rule import heuristic_choices
from svsk_kernels.gpu.tuning import Entry, choices_for, table_name
from svsk_kernels.layer_kernel import LayerSpec
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup
from tests.interpreter.layers import BOUNDS, activations, make_layer

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=90, processors=132)
A10 = Gpu(name="NVIDIA A10", capability=86, processors=72)
CPU = torch.device("cpu")
FEW = (
    Choice(kernel="decode", max_m=16, step=16),
    Choice(kernel="gemm", max_m=65, step=16),
    Choice(kernel="fold"),
)


@pytest.mark.parametrize("m", [1, 16, 17, 40, 65, 130])
def test_op_takes_any_number_of_tokens(m: int) -> None:
    layer = make_layer(
        256, torch.float16, {"n": 70, "rank": 8}, {"n": 30, "rank": 16, "tile_n": 128}
    )
    x, bias = activations(m, 256, torch.float16), torch.randn(100).half()
    found = layer.matmul(x, layer.tensors, bias)
    assert relative_error(found, layer.expected(x) + bias.double()) < BOUNDS[torch.float16]


def test_op_folds_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choices_for", lambda *_: FEW)
    monkeypatch.setattr(dispatch, "_prepared", {})
    layer = make_layer(160, torch.float16, {"n": 70, "rank": 8}, group_size=32)
    used = []
    monkeypatch.setattr(
        "svsk_kernels.gpu.folded_product.fold_kernel",
        _Spy(used, "svsk_kernels.gpu.folded_product"),
    )
    for m in (65, 66):
        x = activations(m, 160, torch.float16)
        assert (
            relative_error(layer.matmul(x, layer.tensors), layer.expected(x))
            < BOUNDS[torch.float16]
        )
        assert len(used) == m - 65


class _Spy:
    """Notes the launches of the fold kernel, and makes them."""

    def __init__(self, used: list[object], module: str) -> None:
        from svsk_kernels.gpu.fold import fold_kernel

        self.used, self.kernel = used, fold_kernel

    def __getitem__(self, grid: object) -> object:
        self.used.append(grid)
        return self.kernel[grid]


def test_op_and_its_fake_agree() -> None:
    layer = make_layer(64, torch.float16, {"n": 40, "rank": 4})
    x = activations(3, 128, torch.float16)[:, ::2]  # not contiguous
    assert relative_error(layer.matmul(x, layer.tensors), layer.expected(x)) < BOUNDS[torch.float16]
    side = [value for name, value in layer.tensors.items() if name.startswith("sidecar_")]
    base = (layer.tensors["words"], layer.tensors["scale"], None)
    arguments = (x, *base, None, side, layer.matmul.code)
    torch.library.opcheck(
        torch.ops.svsk.matmul.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert layer.matmul(x[:0], layer.tensors).shape == (0, 40)


def test_warm_up_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choices_for", lambda *_: FEW)
    monkeypatch.setattr(dispatch, "_warmed", set())
    layer = make_layer(64, torch.float16, {"n": 40, "rank": 4})
    seen: list[int] = []
    monkeypatch.setattr(SvskMatmul, "__call__", lambda self, x, *_: seen.append(x.shape[0]))
    every = [1, 16, 17, 65, 66]
    layer.matmul.warm_up(layer.tensors)
    assert seen == every
    make_layer(64, torch.float16, {"n": 40, "rank": 4}).matmul.warm_up(layer.tensors)
    assert seen == every  # such a layer was run before
    layer.matmul.warm_up(layer.tensors, torch.zeros(40, dtype=torch.float16))
    assert len(seen) == 3 * len(every)  # with a bias, and without for ranks that do not add it
    other = make_layer(64, torch.float16, {"n": 40, "rank": 24})
    other.matmul.warm_up(other.tensors)
    assert len(seen) == 4 * len(every)


def test_refusals_say_why() -> None:
    assert SvskMatmul.can_implement(LayerSpec(64, 64, 64, "int4", torch.float16), CPU) == (True, "")
    for spec, reason in (
        (LayerSpec(64, 64, 64, "int4", torch.float32), "activations are torch.float32"),
        (LayerSpec(64, 128, 128, "int4", torch.float16), "groups of 128"),
        (LayerSpec(64, 40, 32, "int4", torch.float16), "40 columns per rank"),
    ):
        works, why = SvskMatmul.can_implement(spec, CPU)
        assert not works
        assert reason in why


@pytest.mark.parametrize(
    ("slots", "bits", "works"), [(4095, 8, True), (4096, 8, False), (4096, 4, True)]
)
def test_a_sidecar_that_32_bits_do_not_address_is_refused(
    slots: int, bits: Literal[4, 8], works: bool
) -> None:
    """U of 512 ranks in 16 tiles, 64 rows to a slot: 2**19 bytes a slot."""
    bounds = tuple(range(0, 17 * 64, 64))
    plan = SidecarPlan(slots * 64, (Bundle(bounds, (SlotGroup(slots, 64, 512, 0),)),))
    spec = LayerSpec(slots * 64, 1024, 64, "int4", torch.float16, plan, bits)
    found, why = SvskMatmul.can_implement(spec, CPU)
    assert found == works
    assert why == "" or "takes 2147483648 bytes, the kernels address 2147483647" in why


@pytest.mark.parametrize(
    ("n", "k"), [(6144, 2560), (2560, 9728), (19456, 2560), (1280, 8192), (960, 576), (64, 32)]
)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("gpu", [H100, A10], ids=lambda gpu: gpu.name)
def test_rule_gives_valid_choices(gpu: Gpu, n: int, k: int, group_size: int) -> None:
    choices = heuristic_choices(gpu, n, k, group_size)
    Entry(n=n, k=k, group_size=group_size, choices=choices)  # raises if they do not fit the layer
    assert choices[0].pdl == (gpu is H100)
    assert choice_for(choices, 1).block_m == 16
    assert choice_for(choices, 100_000).split_k == 1  # counters would not suffice


def test_few_rows_are_split_and_many_are_not() -> None:
    assert heuristic_choices(H100, 1280, 8192, 64)[0].split_k > 1
    assert heuristic_choices(H100, 19456, 2560, 64)[0].split_k == 1


def test_measured_tables_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [
        {"kernel": "decode", "max_m": 8, "block_m": 16, "step": 32, "split_k": 2},
        {"kernel": "fold"},
    ]
    table = {
        "device": H100.name,
        "triton": "3.6.0",
        "entries": [{"n": 64, "k": 256, "group_size": 64, "choices": choices}],
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / table_name(H100.name)).write_text(json.dumps(table))
    monkeypatch.setattr(tuning.resources, "files", lambda _: tmp_path)
    tuning.load_table.cache_clear()
    choices_for.cache_clear()
    try:
        assert choices_for(H100, 64, 256, 64)[0] == Choice(**choices[0])
        assert choices_for(H100, 64, 512, 64) == heuristic_choices(H100, 64, 512, 64)
        tuning.load_table.cache_clear()
        table["entries"][0]["choices"][0]["step"] = 24
        (tmp_path / "configs" / table_name(H100.name)).write_text(json.dumps(table))
        with pytest.raises(
            TuningError,
            match=r"hbm3\.json: not a valid table of kernel configurations: step 24: kernels",
        ):
            tuning.load_table(H100.name)
    finally:
        tuning.load_table.cache_clear()
        choices_for.cache_clear()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"kernel": "decode", "max_m": 16}], "rising numbers, and null last"),
        (
            [
                {"kernel": "decode", "max_m": 32},
                {"kernel": "gemm", "max_m": 16},
                {"kernel": "fold"},
            ],
            "rising numbers",
        ),
        (
            [{"kernel": "decode", "step": 64}],
            "step 64 must divide 16: the plane 16, or with scales of one level the group 64",
        ),
        ([{"kernel": "decode", "step": 24}], "step 24: kernels are compiled for 16, 32, 64 only"),
        ([{"kernel": "fold", "max_m": 0}], "max_m 0: expected a number of tokens, or null"),
        ([{"kernel": "gemm", "split_k": 2, "step": 16}], "only decode splits"),
        ([{"kernel": "decode", "step": 16, "block": 1}], "unexpected keyword argument .block."),
    ],
)
def test_bad_entries_are_refused(choices: list[dict[str, object]], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        Entry.of({"n": 64, "k": 576, "group_size": 64, "choices": choices})


def test_bad_tables_are_refused() -> None:
    with pytest.raises(TuningError, match="group_size 48: expected one of"):
        Entry.of({"n": 64, "k": 576, "group_size": 48, "choices": [{"kernel": "fold"}]})
    table = {"device": "", "triton": "", "schema_version": 2}
    with pytest.raises(TuningError, match="schema_version 2: this package reads 1"):
        tuning.TuningTable.from_json(json.dumps(table))
    with pytest.raises(TuningError, match="holds a list, expected a table of entries"):
        tuning.TuningTable.from_json("[]")
    with pytest.raises(
        TuningError, match=r"not JSON \(.*\), expected what svsk_kernel_tools wrote"
    ):
        tuning.TuningTable.from_json("{")


def test_the_interpreter_stands_for_a_small_gpu() -> None:
    assert gpu_of(CPU).processors == 4
