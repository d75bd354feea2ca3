# SPDX-License-Identifier: Apache-2.0
"""The kernels as compiled for sm_80 and sm_90, run on the CPU, against the reference in float64."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
from typer.testing import CliRunner

from svsk_kernel_tools.bench import cases as bench_cases
from svsk_kernel_tools.bench.correctness import BOUNDS, poisoned, relative_error
from svsk_kernel_tools.bench.layers import BenchLayer, Part, random_layer
from svsk_kernel_tools.emulator import code, driver, sweep
from svsk_kernel_tools.emulator.__main__ import app
from svsk_kernel_tools.emulator.driver import emulated
from svsk_kernel_tools.emulator.errors import RaceError
from svsk_kernel_tools.emulator.machine import Gpu
from svsk_kernels.gpu.choice import Choice, longest_step
from svsk_kernels.gpu.folded_product import fold
from svsk_kernels.gpu.launch import PackedProduct, counters
from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import Codebook

ARCHES = pytest.mark.parametrize("arch", [80, 90])
CPU = torch.device("cpu")
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
BFLOAT, HALF = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A layer, a number of tokens, and the blocks of one kernel."""

    name: str
    m: int
    k: int
    parts: tuple[Part, ...]
    blocks: dict[str, Any] = field(default_factory=dict)
    kernel: str = "decode"
    dtype: torch.dtype = BFLOAT
    codebook: Codebook = "int4"
    group_size: int = 64
    bias: bool = False
    plain: bool = False  # run it without inline PTX too
    row_scaled: bool = False

    def layer(self) -> BenchLayer:
        return random_layer(
            self.k,
            self.dtype,
            CPU,
            self.parts,
            codebook=self.codebook,
            group_size=self.group_size,
            row_scaled=self.row_scaled,
            seed=self.m,
        )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.m * self.k)
        x = torch.randn(self.m, self.k, generator=generator).to(self.dtype)
        n = sum(part.n for part in self.parts)
        return x, torch.randn(n, generator=generator).to(self.dtype) if self.bias else None

    def choice(self, layer: BenchLayer, pdl: bool) -> Choice:
        step = longest_step(self.k, self.group_size, self.row_scaled)
        return Choice(kernel=self.kernel, pdl=pdl, **({"step": step} | self.blocks))


EIGHT, FOUR = Part(128, 16, 8, 64, 256), Part(128, 32, 4, 64, 256)
MIXED = (Part(50, 16, 4, 24, 128), Part(10), Part(60, 24, 8, 32, 96))

CASES = (
    Case("1 token, 8 bits", 1, 512, (EIGHT,), plain=True),
    Case(
        "5 tokens, packed, quad8, split",
        5,
        768,
        (FOUR,),
        {"split_k": 3},
        codebook="quad8",
        plain=True,
    ),
    Case("16 tokens, no sidecar, float16, bias", 16, 512, (Part(128),), dtype=HALF, bias=True),
    Case(
        "17 tokens, float16, split",
        17,
        512,
        (EIGHT,),
        {"block_m": 32, "split_k": 2},
        dtype=HALF,
        plain=True,
    ),
    Case("64 tokens, packed", 64, 512, (FOUR,), {"block_m": 64, "step": 32, "split_k": 2}),
    Case(
        "ragged, groups of 32",
        16,
        288,
        (Part(33, 24, 8, 16, 128),),
        {},
        "decode",
        HALF,
        "quad8",
        32,
        True,
    ),
    Case("odd tiles, packed", 3, 96, (Part(100, 8, 4, 48, 40),), group_size=32),
    Case(
        "parts of different ranks, tiles and bits",
        33,
        512,
        MIXED,
        {"block_m": 32, "split_k": 2},
        bias=True,
    ),
    Case(
        "tiles longer than a job", 17, 4352, (Part(40, 16, 8, 0, 0),), {"block_m": 32, "split_k": 4}
    ),
    Case(
        "rank 160 of 4 bits over the whole matrix, split",
        5,
        512,
        (Part(70, 160, 4, 0, 0),),
        {"split_k": 2},
    ),
    Case(
        "gemm",
        100,
        256,
        (EIGHT,),
        {"block_m": 128, "block_n": 128, "step": 32, "num_warps": 8},
        "gemm",
    ),
    Case(
        "gemm, ragged",
        65,
        288,
        MIXED,
        {"block_m": 64, "block_n": 128},
        "gemm",
        HALF,
        "quad8",
        32,
        True,
        True,
    ),
    Case(
        "row scales, groups of 16, quad8, split",
        5,
        512,
        (EIGHT,),
        {"split_k": 2},
        codebook="quad8",
        group_size=16,
        plain=True,
        row_scaled=True,
    ),
    Case(
        "row scales, ragged, float16",
        17,
        288,
        MIXED,
        {"block_m": 32},
        dtype=HALF,
        group_size=32,
        bias=True,
        plain=True,
        row_scaled=True,
    ),
    Case("row scales, planes share groups", 3, 192, (Part(128),), plain=True, row_scaled=True),
    Case(
        "gemm, row scales",
        65,
        256,
        (EIGHT,),
        {"block_m": 64, "block_n": 128, "step": 32},
        "gemm",
        group_size=16,
        bias=True,
        plain=True,
        row_scaled=True,
    ),
    Case("one level, groups of 16", 3, 256, (Part(128),), group_size=16),
)

TALL: dict[str, Any] = {
    "block_m": 64,
    "block_n": 256,
    "step": 32,
    "num_warps": 8,
    "split_k": 2,
    "join": True,
}
JOINED = (
    Case("256 rows, packed", 70, 512, (Part(200, 32, 4, 64, 256),), TALL, plain=True),
    Case(
        "256 rows, 8 bits, two levels",
        3,
        512,
        (Part(100, 16, 8, 64, 256),),
        TALL,
        codebook="quad8",
        group_size=32,
        bias=True,
        row_scaled=True,
    ),
    Case(
        "128 rows, a whole plane a turn",
        65,
        512,
        (EIGHT,),
        {"block_m": 128, "block_n": 128, "step": 64, "num_warps": 8, "num_stages": 2, "join": True},
        dtype=HALF,
    ),
)
"""In blocks that the rule gives sm_90 alone."""


def run(
    case: Case, arch: int, pdl: bool = False, asm: bool | None = None, **settings: Any
) -> tuple[torch.Tensor, Gpu]:
    """The product, in memory that was filled before."""
    layer, (x, bias) = case.layer(), case.inputs()
    with poisoned(), emulated(arch, **settings) as gpu:
        y = layer.run(x, case.choice(layer, pdl), bias, asm)
    assert counters.busy(CPU) == 0
    return y, gpu


RARE = ("parts of different ranks, tiles and bits", "tiles longer than a job", "gemm, ragged")
"""Executed for sm_80 with all tests only: they are the longest, and sm_90 has them in every run."""


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        pytest.param(
            case,
            arch,
            id=f"{case.name}-{arch}",
            marks=pytest.mark.slow if arch == 80 and case.name in RARE else (),
        )
        for case in (*CASES, *JOINED)
        for arch in ((80, 90) if case in CASES else (90,))
    ],
)
def test_products(case: Case, arch: int) -> None:
    """Near the reference.

    The same bits in any order of blocks, with and without inline PTX and dependent launch.
    """
    pdl = arch >= 90 and case.kernel == "decode"
    y, gpu = run(case, arch, pdl)
    layer, (x, bias) = case.layer(), case.inputs()
    assert relative_error(y, layer.expected(x, bias)) < BOUNDS[case.dtype]
    assert gpu.launches[-1].overlapped == (pdl and layer.sidecar is not None)
    if TRITON >= (3, 7):  # before, Triton left a fence out
        assert not any(launch.remarks for launch in gpu.launches)
    again, _ = run(case, arch, pdl, order="interleaved", seed=case.m, late=True)
    assert torch.equal(again, y)
    if case.plain:
        plain, _ = run(case, arch, False, False, order="backward", late=True)
        assert torch.equal(plain, y)


@ARCHES
def test_a_product_that_was_prepared_takes_other_activations(arch: int) -> None:
    """Its second call goes round Triton's own launch."""
    case = CASES[1]
    layer, (_, bias) = case.layer(), case.inputs()
    bits, pdl = layer.spec.factor_bits, arch >= 90
    product = PackedProduct(
        layer.base,
        layer.sidecar,
        bits,
        case.choice(layer, pdl),
        layer.tiles,
        dtype=case.dtype,
        has_bias=bias is not None,
    )
    generator = torch.Generator().manual_seed(1)
    for m in (case.m, 1, case.m):
        x = torch.randn(m, layer.spec.k, generator=generator).to(case.dtype)
        with poisoned(), emulated(arch):
            y = product(x, layer.base, layer.sidecar, bias)
        assert relative_error(y, layer.expected(x, bias)) < BOUNDS[case.dtype]
    assert counters.busy(CPU) == 0


@ARCHES
def test_split_products_in_every_order(arch: int) -> None:
    wanted, _ = run(CASES[1], arch)
    for order, seed in (("shuffled", 1), ("shuffled", 2), ("interleaved", 3), ("interleaved", 4)):
        assert torch.equal(run(CASES[1], arch, order=order, seed=seed)[0], wanted)


@ARCHES
@pytest.mark.parametrize(
    ("parts", "codebook", "row_scaled"),
    [
        ((Part(100, 32, 4, 48, 128),), "quad8", False),
        ((Part(130, 24, 8, 64, 96),), "int4", False),
        ((Part(70, 132, 4, 0, 0),), "int4", False),
        ((Part(128),), "quad8", False),
        ((Part(100, 24, 8, 64, 96),), "quad8", True),
    ],
)
def test_fold(parts: tuple[Part, ...], codebook: Codebook, row_scaled: bool, arch: int) -> None:
    layer = random_layer(
        288, BFLOAT, CPU, parts, codebook=codebook, group_size=32, row_scaled=row_scaled
    )
    rows = slice(64, parts[0].n)
    with poisoned(), emulated(arch, order="shuffled"):
        found = fold(layer.base, layer.sidecar, layer.spec.factor_bits, BFLOAT, rows)
        plain = fold(layer.base, layer.sidecar, layer.spec.factor_bits, BFLOAT, rows, asm=False)
    assert (
        relative_error(found, naive_matmul(torch.eye(288), layer.linears[0]).T[rows])
        < BOUNDS[BFLOAT]
    )
    assert torch.equal(found, plain)


@ARCHES
@pytest.mark.parametrize("split", [1, 3])
def test_every_code_is_read_once(split: int, arch: int) -> None:
    case = Case("", 16, 768, (EIGHT,), {"split_k": split})
    launch = run(case, arch)[1].launches[-1]
    # rows are stored in multiples of 256, and those beyond the layer's 128 are left alone
    assert launch.bytes_read["words"] == case.layer().base.words[: EIGHT.n].nbytes
    assert launch.bytes_written["words"] == 0
    assert launch.bytes_written["y"] == 16 * 128 * 2


@ARCHES
def test_the_tensor_cores_of_the_target_do_the_work(arch: int) -> None:
    counts = run(CASES[0], arch)[1].launches[-1].instructions
    found = {opcode.split(".")[0] for opcode in counts} & {"mma", "wgmma"}
    assert "wgmma" in found if arch == 90 else found == {"mma"}


def broken(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str], only: str = "decode_kernel"
) -> None:
    """Have the kernels executed with changed PTX."""

    def code_of(text: str) -> code.Code:
        changed = change(text) if f".entry {only}(" in text else text
        assert changed != text or f".entry {only}(" not in text
        return code.code_of(changed)

    monkeypatch.setattr(driver, "code_of", code_of)


@ARCHES
@pytest.mark.parametrize("late", [False, True])
def test_copies_have_to_be_waited_for(
    arch: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, lambda text: re.sub(r"(cp\.async\.wait_group\s+)[1-9]", r"\g<1>15", text))
    with pytest.raises(RaceError, match=r"decode_kernel.*which a cp\.async still writes"):
        run(CASES[0], arch, late=late)


@ARCHES
def test_barriers_are_needed(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of them there is an error, or nothing depended on it."""
    case = CASES[0]
    wanted = run(case, arch)[0]
    kernels: list[str] = []
    broken(monkeypatch, lambda text: kernels.append(text) or text + "\n")
    run(case, arch)
    places = [match.start() for match in re.finditer(r"bar\.sync\s+0;", kernels[0])]
    caught = 0
    for place in places:
        broken(monkeypatch, lambda text, place=place: text[:place] + "//" + text[place:])
        try:
            found = run(case, arch)[0]
        except RaceError:
            caught += 1
        else:
            assert torch.equal(found, wanted)
    counters.reset(CPU)
    assert caught > len(places) / 2


@pytest.mark.parametrize("late", [False, True])
def test_wgmma_needs_its_fences_and_waits(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"):
        broken(monkeypatch, lambda text, line=line: text.replace(line, f"// {line}"))
        with pytest.raises(RaceError, match=r"decode_kernel.*wgmma"):
            run(CASES[0], 90, late=late)


def test_decode_has_to_wait_for_z(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda text: re.sub(r"griddepcontrol\.wait\s*;", "", text))
    assert run(CASES[0], 90, pdl=True)[0].isnan().any()


def test_the_command_tells_good_from_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench_cases.Case("small", 128, (Part(32, 8, 8, 32, 64),), (2,))
    monkeypatch.setattr(sweep, "cases_for", lambda interpreted, quick: (small,))
    good = CliRunner().invoke(app, ["--arch", "80", "--quick"])
    assert good.exit_code == 0
    assert "1 passed, 0 failed" in good.stdout
    broken(monkeypatch, lambda text: text.replace("bar.sync", "// bar.sync"))
    bad = CliRunner().invoke(app, ["--arch", "80", "--quick"])
    assert bad.exit_code == 1
    assert re.search(r"FAIL.*small, sm_80, M = 2, decode: decode_kernel: PTX line \d+", bad.stdout)
    assert "0 passed, 1 failed" in bad.stdout
    assert CliRunner().invoke(app, ["--arch", "100"]).exit_code == 2
