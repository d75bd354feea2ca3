# SPDX-License-Identifier: Apache-2.0
"""The emulator's instructions one by one, against exact arithmetic and the PTX ISA's layouts."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from svsk_kernel_tools.emulator.code import code_of
from svsk_kernel_tools.emulator.errors import UnsupportedError
from svsk_kernel_tools.emulator.tensor import descriptor_offsets
from tests.kernel_tools.emulator.ptx import apply, kernel, run

GENERATOR = np.random.default_rng(0)
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def words(count: int, width: int) -> torch.Tensor:
    """Random integers with many of the awkward ones."""
    edges = [0, 1, 2, -1, -2, 2 ** (width - 1) - 1, -(2 ** (width - 1)), 31, 32, 33]
    dtype = {16: np.int16, 32: np.int32, 64: np.int64}[width]
    some = GENERATOR.integers(-(2 ** (width - 1)), 2 ** (width - 1), count, dtype=dtype)
    some[: len(edges)] = GENERATOR.permutation(np.array(edges, dtype))
    return torch.from_numpy(some)


def unsigned(tensor: torch.Tensor) -> list[int]:
    width = 8 * tensor.element_size()
    return [int(value) % 2**width for value in tensor]


def wrap(value: int, width: int) -> int:
    return (value + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)


INTEGER_OPERATIONS: dict[str, tuple[int, Callable[..., int]]] = {
    "add.s32": (2, lambda a, b: a + b),
    "add.s64": (2, lambda a, b: a + b),
    "sub.s32": (2, lambda a, b: a - b),
    "mul.lo.s32": (2, lambda a, b: a * b),
    "mul.lo.s64": (2, lambda a, b: a * b),
    "mad.lo.s32": (3, lambda a, b, c: a * b + c),
    "min.s32": (2, min),
    "max.s32": (2, max),
    "min.s16": (2, min),
    "neg.s32": (1, lambda a: -a),
    "and.b32": (2, lambda a, b: a & b),
    "or.b16": (2, lambda a, b: a | b),
    "xor.b64": (2, lambda a, b: a ^ b),
    "not.b32": (1, lambda a: ~a),
    "div.s32": (2, lambda a, b: -1 if b == 0 else int(Fraction(a, b))),
    "rem.s32": (2, lambda a, b: a + b if b == 0 else a - b * int(Fraction(a, b))),
}


@pytest.mark.parametrize("opcode", INTEGER_OPERATIONS)
def test_integer_arithmetic(opcode: str) -> None:
    count, function = INTEGER_OPERATIONS[opcode]
    width = int(opcode[-2:])
    inputs = [words(64, width) for _ in range(count)]
    found = apply(opcode, inputs[0].dtype, *inputs)
    assert found.tolist() == [
        wrap(function(*values), width)
        for values in zip(*map(torch.Tensor.tolist, inputs), strict=True)
    ]


@pytest.mark.parametrize("signed", [True, False])
def test_wide_products(signed: bool) -> None:
    a, b, c = words(64, 32), words(64, 32), words(64, 64)
    letter = "s" if signed else "u"
    pairs = (
        zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        if signed
        else zip(unsigned(a), unsigned(b), unsigned(c), strict=True)
    )
    wanted = [(x * y, x * y + z) for x, y, z in pairs]
    assert apply(f"mul.wide.{letter}32", torch.int64, a, b).tolist() == [
        wrap(x, 64) for x, _ in wanted
    ]
    assert apply(f"mad.wide.{letter}32", torch.int64, a, b, c).tolist() == [
        wrap(x, 64) for _, x in wanted
    ]


@pytest.mark.parametrize("amount", [None, 0, 5, 31, 32, 40])
def test_shifts_saturate(amount: int | None) -> None:
    a = words(64, 32)
    by = torch.tensor([0, 1, 5, 31, 32, 33, 40, 255] * 8, dtype=torch.int32)
    given = by if amount is None else str(amount)
    counts = by.tolist() if amount is None else [amount] * 64
    left = apply("shl.b32", torch.int32, a, given).tolist()
    logical = apply("shr.u32", torch.int32, a, given).tolist()
    arithmetic = apply("shr.s32", torch.int32, a, given).tolist()
    assert left == [
        wrap(value << count, 32) for value, count in zip(a.tolist(), counts, strict=True)
    ]
    assert logical == [
        wrap(value >> count, 32) for value, count in zip(unsigned(a), counts, strict=True)
    ]
    assert arithmetic == [value >> count for value, count in zip(a.tolist(), counts, strict=True)]


@pytest.mark.parametrize(("start", "length"), [(0, 8), (4, 15), (31, 4), (6, 1), (0, 32), (3, 0)])
def test_bit_fields(start: int, length: int) -> None:
    a = words(64, 32)
    plain = [(value >> start) & (2**length - 1) for value in unsigned(a)]
    assert apply("bfe.u32", torch.int32, a, str(start), str(length)).tolist() == [
        wrap(value, 32) for value in plain
    ]
    kept = min(length, 32 - start)  # beyond the last bit, the sign
    signed = [0 if length == 0 else wrap((value >> start) % 2**kept, kept) for value in unsigned(a)]
    assert apply("bfe.s32", torch.int32, a, str(start), str(length)).tolist() == signed


@pytest.mark.parametrize("table", [0xEA, 0x96, 0x00, 0xFF, 0xC0, 0x6A])
def test_lop3(table: int) -> None:
    a, b, c = words(64, 32), words(64, 32), words(64, 32)
    wanted = []
    for x, y, z in zip(unsigned(a), unsigned(b), unsigned(c), strict=True):
        bits = [
            table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1 for i in range(32)
        ]
        wanted.append(wrap(sum(bit << i for i, bit in enumerate(bits)), 32))
    assert apply("lop3.b32", torch.int32, a, b, c, hex(table)).tolist() == wanted


@pytest.mark.parametrize("selector", ["0x5410U", "0x7770U", "0x0123", "0xC9A8", None])
def test_prmt(selector: str | None) -> None:
    a, b, c = words(64, 32), words(64, 32), words(64, 32)
    codes = unsigned(c) if selector is None else [int(selector.rstrip("U"), 16)] * 64
    wanted = []
    for x, y, code in zip(unsigned(a), unsigned(b), codes, strict=True):
        pool, value = (y << 32 | x).to_bytes(8, "little"), 0
        for place in range(4):
            nibble = code >> 4 * place & 15
            byte = pool[nibble & 7]
            value |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * place
        wanted.append(wrap(value, 32))
    assert apply("prmt.b32", torch.int32, a, b, selector or c).tolist() == wanted


def test_comparisons_and_selection() -> None:
    a, b = words(64, 32), words(64, 32)
    b[20:40] = a[20:40]
    tests: dict[str, Callable[[int, int], bool]] = {
        "eq": int.__eq__,
        "ne": int.__ne__,
        "lt": int.__lt__,
        "le": int.__le__,
        "gt": int.__gt__,
        "ge": int.__ge__,
    }
    for name, test in tests.items():
        found = apply(f"setp.{name}.s32", torch.int32, a, b, into="%p1").tolist()
        assert found == [int(test(x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        found = apply(f"setp.{name}.u32", torch.int32, a, b, into="%p1").tolist()
        assert found == [int(test(x, y)) for x, y in zip(unsigned(a), unsigned(b), strict=True)]


def test_integer_conversions() -> None:
    a, small = words(64, 32), words(64, 16)
    assert apply("cvt.s64.s32", torch.int64, a).tolist() == a.tolist()
    assert apply("cvt.u64.u32", torch.int64, a).tolist() == unsigned(a)
    assert apply("cvt.u16.u32", torch.int16, a).tolist() == [
        wrap(value, 16) for value in unsigned(a)
    ]
    assert apply("cvt.u32.u16", torch.int32, small).tolist() == unsigned(small)
    assert apply("cvt.s32.s8", torch.int32, small).tolist() == [
        wrap(value, 8) for value in small.tolist()
    ]


def test_vectors_are_packed_low_half_first() -> None:
    a, out = words(32, 32), torch.zeros(32, dtype=torch.int32)
    text = kernel(
        """
        mad.wide.u32 %rd11, %r1, 4, %rd1;
        mad.wide.u32 %rd12, %r1, 4, %rd2;
        ld.global.b32 { %r2 }, [ %rd11 + 0 ];
        mov.b32 {%rs1, %rs2}, %r2;
        mov.b32 %r3, {%rs2, %rs1};
        { .reg .b32 swapped; mov.b32 swapped, %r3; mov.b32 %r4, swapped; }
        st.global.b32 [ %rd12 + 0 ], { %r4 };
        """,
        params=2,
    )
    run(text, a, out)
    assert out.tolist() == [wrap((value << 16 | value >> 16) % 2**32, 32) for value in unsigned(a)]


@pytest.mark.parametrize(
    ("mode", "by", "control", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 7, 31, lambda lane: 7),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("idx", 9, 31 | 24 << 8, lambda lane: lane & 24 | 1),
        ("down", 3, 7 | 24 << 8, lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
    ],
)
def test_shuffles(mode: str, by: int, control: int, source: Callable[[int], int]) -> None:
    a = words(64, 32)
    found = apply(f"shfl.sync.{mode}.b32", torch.int32, a, str(by), str(control), "-1")
    assert found.tolist() == [
        a[warp + source(lane)].item() for warp in (0, 32) for lane in range(32)
    ]


def test_reductions_of_a_warp() -> None:
    a = words(64, 32)
    for name, function in (("min", min), ("max", max)):
        found = apply(f"redux.sync.{name}.s32", torch.int32, a, "-1").tolist()
        assert found == [function(a[:32].tolist())] * 32 + [function(a[32:].tolist())] * 32


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_fragments(kind: str) -> None:
    """Loads by the rules of the PTX ISA for mma.m16n8k16, element by element."""
    a, b = (torch.randn(shape).to(DTYPES[kind]) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8)
    registers = torch.zeros(32, 10, dtype=torch.int32)
    halves, singles = registers.view(DTYPES[kind]).view(32, 20), registers.view(torch.float32)
    for lane in range(32):
        group, place = lane >> 2, lane & 3
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            halves[lane, i] = a[row, place * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            halves[lane, 8 + i] = b[place * 2 + (i & 1) + (8 if i >= 2 else 0), group]
        for i in range(4):
            singles[lane, 6 + i] = c[group + (8 if i >= 2 else 0), place * 2 + (i & 1)]
    out = torch.zeros(32, 4)
    loads = "\n".join(f"ld.global.b32 {{ %r{10 + i} }}, [ %rd11 + {4 * i} ];" for i in range(10))
    stores = "\n".join(f"st.global.b32 [ %rd12 + {4 * i} ], {{ %r{20 + i} }};" for i in range(4))
    text = f"""
        mad.wide.u32 %rd11, %r1, 40, %rd1;
        mad.wide.u32 %rd12, %r1, 16, %rd2;
        {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{ %r20, %r21, %r22, %r23 }},
            {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }}, {{ %r16, %r17, %r18, %r19 }};
        {stores}
        """
    run(kernel(text, params=2), registers, out)
    wanted = (a.double() @ b.double() + c.double()).float()
    for lane, i in itertools.product(range(32), range(4)):
        assert out[lane, i] == wanted[(lane >> 2) + (8 if i >= 2 else 0), (lane & 3) * 2 + (i & 1)]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed: bool) -> None:
    """Thread 8 i + j points to row j of matrix i.

    Thread t gets elements 2 (t % 4) and on of row t / 4.
    """
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out, back = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(4, 8, 8, dtype=torch.int16)
    turn = ".trans" if transposed else ""
    text = f"""
        mad.wide.u32 %rd11, %r1, 16, %rd1;
        mad.wide.u32 %rd12, %r1, 16, %rd2;
        mad.wide.u32 %rd13, %r1, 16, %rd3;
        ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %rd11 + 0 ];
        mad.lo.s32 %r2, %r1, 16, global_smem;
        st.shared.v4.b32 [%r2], {{ %r10, %r11, %r12, %r13 }};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{turn}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r2];
        st.global.v4.b32 [ %rd12 + 0 ], {{ %r20, %r21, %r22, %r23 }};
        stmatrix.sync.aligned.m8n8.x4{turn}.shared.b16 [%r2+512], {{%r20, %r21, %r22, %r23}};
        bar.sync 0;
        ld.shared.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [%r2+512];
        st.global.v4.b32 [ %rd13 + 0 ], {{ %r10, %r11, %r12, %r13 }};
        """
    run(kernel(text, params=3), matrices, out, back, shared=1024)
    wanted = matrices.mT if transposed else matrices
    pairs = out.view(torch.int16).view(8, 4, 4, 2)  # row, column / 2, matrix, half
    assert torch.equal(pairs.permute(2, 0, 1, 3).reshape(4, 8, 8), wanted)
    assert torch.equal(back, matrices)


def test_descriptors_without_swizzle() -> None:
    """Core matrices of 8 rows of 16 bytes, 128 bytes each, at the descriptor's offsets."""
    start, leading, stride = 2048, 256, 1024
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32
    by_k, by_outer = (
        descriptor_offsets(descriptor, 32, True),
        descriptor_offsets(descriptor, 32, False),
    )
    for outer, k in itertools.product(range(32), range(16)):
        row = outer % 8 * 16 + outer // 8 * stride + k // 8 * leading + k % 8 * 2
        assert by_k[outer, k] == start + row
        column = k % 8 * 16 + k // 8 * leading + outer // 8 * stride + outer % 8 * 2
        assert by_outer[outer, k] == start + column


@pytest.mark.parametrize(("mode", "width"), [(1, 128), (2, 64), (3, 32)])
def test_swizzled_descriptors_permute_16_byte_pieces(mode: int, width: int) -> None:
    descriptor = 1024 >> 4 | 8 * width >> 4 << 32 | mode << 62
    found = descriptor_offsets(descriptor, 16, True) - 1024
    for row, k in itertools.product(range(16), range(16)):
        line = row * width // 128
        piece = (row * width % 128 + 2 * k) // 16 ^ line % 8 & (width // 16 - 1)
        assert found[row, k] == line * 128 + piece * 16 + 2 * k % 16


def test_a_descriptor_with_unknown_fields_is_refused() -> None:
    for bit in (14, 46, 49, 52):
        with pytest.raises(UnsupportedError, match="unknown bits"):
            descriptor_offsets(1 << bit | 1 << 62, 8, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sin.approx.f32 %r2, %r1;", "sin.approx.f32"),
        ("add.sat.s32 %r2, %r1, %r1;", "add.sat.s32"),
        ("bar.sync 1;", "barrier 0"),
        ("tcgen05.wait::ld.sync.aligned;", "tcgen05"),
        ("ld.global.v8.b32 { %r2 }, [ %rd1 + 0 ];", "ld.global.v8"),
        (
            (
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r2 }, { %r2 }, { %r2 }, {"
                " %r2 };"
            ),
            "m16n8k8",
        ),
        ("ld.local.b32 { %r2 }, [ %rd1 + 0 ];", "ld.local"),
        ("mov.u32 %r2, %clock;", "%clock"),
        ("add.s32 %r2, %r1, %r900;", "%r900"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(line: str, message: str) -> None:
    text = kernel(line)
    number = text.split("\n").index(line) + 1
    with pytest.raises(UnsupportedError, match=rf"PTX line {number}.*") as caught:
        code_of(text)
    assert message in str(caught.value)


def test_instructions_and_bytes_are_counted() -> None:
    a: Any = torch.arange(64, dtype=torch.int32)
    body = """
        mad.wide.u32 %rd11, %r1, 4, %rd1;
        ld.global.b32 { %r2 }, [ %rd11 + 0 ];
        setp.lt.s32 %p1, %r1, 8;
        @%p1 st.global.b32 [ %rd11 + 0 ], { %r2 };
        @%p1 bra $end;
        add.s32 %r2, %r2, 1;
        $end:
        """
    launch = run(kernel(body, threads=64), a).launches[0]
    assert launch.bytes_read == {"a": 256}
    assert launch.bytes_written == {"a": 32}
    assert launch.instructions["ld.global.b32"] == 2
    assert launch.instructions["add.s32"] == 2
    assert launch.instructions["ret"] == 2
