# SPDX-License-Identifier: Apache-2.0
"""What the emulator catches.

Deliberately broken kernels, by hand in PTX and by taking lines out of compiled ones.
"""

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl

from svsk_kernel_tools.emulator.driver import _bits, emulated
from svsk_kernel_tools.emulator.errors import (
    BarrierError,
    EmulateError,
    MemoryFaultError,
    RaceError,
    UnsupportedError,
)
from svsk_kernel_tools.emulator.machine import ORDERS, Order
from tests.kernel_tools.emulator.ptx import execute, kernel, run

BOTH = pytest.mark.parametrize("late", [False, True])


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    if MASKED:
        tl.store(y + at, value * factor, mask=at < n)
    else:
        tl.store(y + at, value * factor)


@triton.jit
def matmul_kernel(a, b, c, am, ak, bk, bn, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, k, K, num_stages=3):
        left = tl.load(a + rows[:, None] * am + (start + inner)[None, :] * ak)
        right = tl.load(b + (start + inner)[:, None] * bk + columns[None, :] * bn)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


@triton.jit
def split_sum_kernel(
    x, y, partial, counter, PARTS: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """The last program to arrive adds what all have written, in order."""
    at, part = tl.arange(0, BLOCK), tl.program_id(0)
    tl.store(partial + part * BLOCK + at, tl.load(x + part * BLOCK + at))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == LAST:
        total = tl.zeros((BLOCK,), tl.float32)
        for index in range(PARTS):
            total += tl.load(partial + index * BLOCK + at, cache_modifier=".cg")
        tl.store(y + at, total)
        tl.atomic_xchg(counter, 0)


@triton.jit
def first_kernel(x, z, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(z + at, tl.load(x + at) + 1.0)


@triton.jit
def second_kernel(z, y, WAIT: tl.constexpr):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    tl.store(y + at, tl.load(z + at) * 2.0)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_runs_as_triton_launches_it(capability: int) -> None:
    x, y = torch.randn(1000), torch.full((1000,), 7.0)
    with emulated(capability) as gpu:
        scale_kernel[(4,)](x, y, 1000, 2.5, BLOCK=256, MASKED=True)
        scale_kernel[(1,)](
            x[1:], y[1:], 3, -1.0, BLOCK=256, MASKED=True
        )  # an address off 16, compiled for that
    wanted = x * 2.5
    wanted[1:4] = -x[1:4]
    assert torch.equal(y, wanted)
    assert [launch.grid for launch in gpu.launches] == [(4, 1, 1), (1, 1, 1)]
    assert gpu.launches[0].bytes_read == {"x": 4000, "y": 0}
    assert gpu.launches[0].bytes_written == {"x": 0, "y": 4000}


def test_the_driver_is_given_back() -> None:
    before, hooks = (
        triton.runtime.driver._active,
        list(triton.knobs.runtime.kernel_load_start_hook.calls),
    )
    with pytest.raises(ZeroDivisionError), emulated(90):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before
    assert triton.knobs.runtime.kernel_load_start_hook.calls == hooks
    for bad in ({"capability": 100}, {"capability": 75}, {"order": "sideways"}):
        with pytest.raises(EmulateError, match="expected"), emulated(**bad):  # type: ignore[arg-type]
            pass


def test_a_store_out_of_bounds_names_kernel_line_block_and_argument() -> None:
    x, y = torch.randn(1000), torch.zeros(1000)
    with pytest.raises(MemoryFaultError) as caught, emulated(90):
        scale_kernel[(4,)](x, y, 1000, 2.5, BLOCK=256, MASKED=False)
    text = str(caught.value)
    assert re.search(r"scale_kernel: PTX line \d+ \(test_checks\.py:\d+\), CTA \(3, 0, 0\)", text)
    assert re.search(
        r"thread \d+ writes \d+ bytes at 0x[0-9a-f]+, \d+ bytes into the 4000 bytes of y", text
    )


def test_a_view_is_not_the_whole_storage() -> None:
    whole = torch.zeros(2048)
    with pytest.raises(MemoryFaultError, match="reads"), emulated(80):
        scale_kernel[(8,)](whole[:1024], torch.zeros(2048), 2048, 2.0, BLOCK=256, MASKED=True)
    assert not whole.any()


def test_vectors_off_their_alignment() -> None:
    body = "add.s64 %rd3, %rd1, 4; ld.global.v2.b32 { %r2, %r3 }, [ %rd3 + 0 ];"
    with pytest.raises(MemoryFaultError, match=r"8 bytes at .*no multiple"):
        run(kernel(body), torch.zeros(64, dtype=torch.int32))
    body = "ld.shared.v2.b32 { %r2, %r3 }, [global_smem+4];"
    with pytest.raises(MemoryFaultError, match="4 of shared memory, which is no multiple"):
        run(kernel(body), torch.zeros(1), shared=64)


WRITE_OWN = "mad.lo.s32 %r2, %r1, 4, global_smem; st.shared.b32 [%r2], %r1;"
READ_NEXT = """
    xor.b32 %r3, %r1, {distance}; mad.lo.s32 %r4, %r3, 4, global_smem;
    ld.shared.b32 %r5, [%r4];
    mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.b32 [ %rd2 + 0 ], {{ %r5 }};
    """


@pytest.mark.parametrize("distance", [1, 32])
def test_a_missing_barrier(distance: int) -> None:
    """Between threads of one warp, and of two."""
    out, read = torch.zeros(64, dtype=torch.int32), READ_NEXT.format(distance=distance)
    run(kernel(f"{WRITE_OWN} bar.sync 0; {read}", threads=64), out, shared=256)
    assert out.tolist() == [thread ^ distance for thread in range(64)]
    with pytest.raises(RaceError, match="wrote since the last barrier"):
        run(kernel(WRITE_OWN + read, threads=64), out, shared=256)
    again = f"{WRITE_OWN} bar.sync 0; {read} add.s32 %r1, %r1, 1; st.shared.b32 [%r2], %r1;"
    with pytest.raises(RaceError, match="read since the last barrier"):
        run(kernel(again, threads=64), out, shared=256)


def test_a_warp_barrier_orders_one_warp_only() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    text = WRITE_OWN + "bar.warp.sync -1;"
    run(kernel(text + READ_NEXT.format(distance=1), threads=64), out, shared=256)
    assert out.tolist() == [thread ^ 1 for thread in range(64)]
    with pytest.raises(RaceError, match="wrote since the last barrier"):
        run(kernel(text + READ_NEXT.format(distance=32), threads=64), out, shared=256)


def test_several_readers_of_a_byte_are_all_remembered() -> None:
    """Every thread reads word 0; a later write by any one of them meets the others' reads."""
    body = """
        setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [global_smem], %r1; bar.sync 0;
        ld.shared.b32 %r2, [global_smem];
        setp.eq.s32 %p2, %r1, {writer}; mov.b32 %r3, 5; @%p2 st.shared.b32 [global_smem], %r3;
        """
    for writer in (0, 17, 63):
        with pytest.raises(RaceError, match=f"thread {writer} writes byte 0"):
            run(kernel(body.format(writer=writer), threads=64), torch.zeros(1), shared=16)


def test_different_values_to_one_byte() -> None:
    with pytest.raises(RaceError, match="one instruction"):
        run(kernel("st.shared.b32 [global_smem], %r1;"), torch.zeros(1), shared=16)
    run(kernel("mov.b32 %r2, 3; st.shared.b32 [global_smem], %r2;"), torch.zeros(1), shared=16)


def test_shared_memory_has_bounds_and_begins_unwritten() -> None:
    with pytest.raises(MemoryFaultError, match="byte 124 of shared memory, which has 124"):
        run(kernel(WRITE_OWN), torch.zeros(1), shared=124)
    with pytest.raises(
        MemoryFaultError, match="thread 0 reads byte 4 of shared memory, which nobody wrote"
    ):
        run(kernel("ld.shared.b32 %r2, [global_smem+4];"), torch.zeros(1), shared=64)


COPY = """
    mad.wide.u32 %rd3, %r1, 16, %rd1; mad.wide.u32 %rd4, %r1, 16, %rd2;
    mad.lo.s32 %r2, %r1, 16, global_smem;
    setp.lt.s32 %p1, %r1, 20; selp.b32 %r3, 16, 0, %p1;
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r3;
    cp.async.commit_group;
    WAIT
    ld.shared.v4.b32 { %r4, %r5, %r6, %r7 }, [%r2];
    st.global.v4.b32 [ %rd4 + 0 ], { %r4, %r5, %r6, %r7 };
    """


@BOTH
def test_asynchronous_copies(late: bool) -> None:
    """20 threads copy, the others fill with zeros without reading: the source ends there."""
    source, out = (
        torch.randint(-9, 9, (80,), dtype=torch.int32),
        torch.full((128,), 7, dtype=torch.int32),
    )
    run(
        kernel(COPY.replace("WAIT", "cp.async.wait_group 0;"), params=2),
        source,
        out,
        shared=512,
        late=late,
    )
    assert torch.equal(out, torch.cat([source, torch.zeros(48, dtype=torch.int32)]))
    for broken in ("", "cp.async.wait_group 1;", "bar.sync 0;"):
        with pytest.raises(RaceError, match=r"which a cp\.async still writes"):
            run(kernel(COPY.replace("WAIT", broken), params=2), source, out, shared=512, late=late)
    part = COPY.replace("selp.b32 %r3, 16, 0, %p1", "mov.b32 %r3, 4").replace(
        "WAIT", "cp.async.wait_all;"
    )
    run(kernel(part, params=2), torch.cat([source, source]), out, shared=512, late=late)
    assert torch.equal(out.view(-1, 4)[:20, 0], source.view(-1, 4)[:, 0])
    assert not out.view(-1, 4)[:, 1:].any()


def test_threads_that_part_meet_again() -> None:
    """A loop that each thread leaves at its own time, and a barrier behind it."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        mov.b32 %r2, 0; mov.b32 %r3, 0;
        $loop:
        setp.ge.s32 %p1, %r2, %r1;
        @%p1 bra $done;
        add.s32 %r3, %r3, %r2; add.s32 %r2, %r2, 1;
        bra.uni $loop;
        $done:
        bar.sync 0;
        mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.b32 [ %rd2 + 0 ], { %r3 };
        """
    run(kernel(body, threads=64), out)
    assert out.tolist() == [thread * (thread - 1) // 2 for thread in range(64)]


def test_whole_warps_have_to_be_at_instructions_of_warps() -> None:
    skip = "setp.lt.s32 %p1, %r1, 7; @%p1 bra $end; {line} $end:"
    for line in ("bar.sync 0;", "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;"):
        with pytest.raises(BarrierError, match="only some threads of a warp"):
            run(kernel(skip.format(line=line), threads=64), torch.zeros(1))


def test_a_register_without_a_value() -> None:
    with pytest.raises(EmulateError, match="no instruction gave %r7 a value"):
        run(kernel("add.s32 %r2, %r7, %r1;"), torch.zeros(1))


@BOTH
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (64, 32), (128, 64)])
@pytest.mark.parametrize("capability", [80, 90])
def test_matrix_products(capability: int, n: int, k: int, kind: torch.dtype, late: bool) -> None:
    """Either operand with either axis contiguous.

    All swizzles, both directions of ldmatrix and of descriptors.
    """
    for order in range(4):
        a, b = torch.randn(64, 2 * k).to(kind), torch.randn(2 * k, n).to(kind)
        left, right = (
            a if order & 1 else a.mT.contiguous().mT,
            b if order & 2 else b.mT.contiguous().mT,
        )
        c = torch.empty(64, n)
        with emulated(capability, late=late) as gpu:
            matmul_kernel[(1,)](
                left, right, c, *left.stride(), *right.stride(), 2 * k, M=64, N=n, K=k, num_warps=4
            )
        torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
        wanted = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert any(opcode.startswith(wanted) for opcode in gpu.launches[0].instructions)


def _compiled_matmul() -> tuple[Any, dict[str, Any]]:
    """A product for sm_90: A from registers or shared memory, B from shared memory."""
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 32).half(), torch.zeros(64, 32)
    with emulated(90):
        compiled = matmul_kernel[(1,)](
            a, b, c, *a.stride(), *b.stride(), 64, M=64, N=32, K=32, num_warps=4
        )
    constants = compiled.src.signature
    values = dict(
        zip(matmul_kernel.arg_names, (a, b, c, *a.stride(), *b.stride(), 64), strict=False)
    )
    return compiled, {
        name: value for name, value in values.items() if constants[name] != "constexpr"
    }


@BOTH
def test_every_line_that_orders_a_product_is_needed(late: bool) -> None:
    compiled, arguments = _compiled_matmul()
    ptx, shared = str(compiled.asm["ptx"]), compiled.metadata.shared

    def launch(text: str) -> None:
        with emulated(90, late=late) as gpu:
            execute(gpu, text, (1, 1, 1), arguments, shared_bytes=shared)

    launch(ptx)
    assert torch.allclose(
        arguments["c"], arguments["a"].float() @ arguments["b"].float(), atol=1e-2
    )
    for line in (
        "wgmma.fence.sync.aligned;",
        "cp.async.wait_group",
        "wgmma.wait_group.sync.aligned",
    ):
        assert line in ptx
        with pytest.raises(RaceError):
            launch(re.sub(rf"{re.escape(line)}[^\n]*\n", "\n", ptx))
    with pytest.raises(RaceError, match="since the last barrier"):
        launch(ptx.replace("bar.sync", "// bar.sync"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_to_arrive_adds_in_every_order(order: Order, seed: int) -> None:
    x, y = torch.randn(7, 256), torch.zeros(256)
    partial, counter = torch.full((7, 256), float("nan")), torch.zeros(1, dtype=torch.int32)
    with emulated(80, order=order, seed=seed):
        split_sum_kernel[(7,)](x, y, partial, counter, PARTS=7, BLOCK=256, LAST=6)
    wanted = torch.zeros(256)
    for row in x:
        wanted += row
    assert torch.equal(y, wanted)
    assert not counter.any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_wrong_counter(order: Order) -> None:
    """Somebody adds who has not heard of all the others.

    Their sums are not there yet, or nothing orders them.
    """
    x, y, partial = torch.randn(7, 256), torch.zeros(256), torch.full((7, 256), float("nan"))
    try:
        with emulated(80, order=order, seed=3):
            split_sum_kernel[(7,)](
                x, y, partial, torch.zeros(1, dtype=torch.int32), PARTS=7, BLOCK=256, LAST=5
            )
    except RaceError as error:
        assert "wrote in the same launch, and nothing orders them" in str(error)  # noqa: PT017
    else:
        assert y.isnan().all()


def test_a_count_that_says_too_much() -> None:
    """Without a barrier before it, an atomic speaks for its own thread only; relaxed, for none."""
    x, y, partial, counter = (
        torch.randn(7, 256),
        torch.zeros(256),
        torch.zeros(7, 256),
        torch.zeros(1, dtype=torch.int32),
    )
    with emulated(80):
        compiled = split_sum_kernel[(7,)](x, y, partial, counter, PARTS=7, BLOCK=256, LAST=6)
    ptx, shared = str(compiled.asm["ptx"]), compiled.metadata.shared
    before, atomic, after = ptx.partition("atom.global.gpu.acq_rel.add")
    for broken in (
        before.replace("bar.sync", "// bar.sync") + atomic + after,
        ptx.replace("acq_rel", "relaxed"),
    ):
        tensors = {"x": x, "y": y, "partial": partial, "counter": counter.zero_()}
        with (
            pytest.raises(RaceError, match=r"of block \d+ wrote in the same launch"),
            emulated(80) as gpu,
        ):
            execute(gpu, broken, (7, 1, 1), tensors, shared_bytes=shared)


def test_threads_of_a_block_meet_in_global_memory_only_over_a_barrier() -> None:
    body = """
        mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.b32 [ %rd2 + 0 ], { %r1 };
        WAIT xor.b32 %r2, %r1, 33; mad.wide.u32 %rd3, %r2, 4, %rd1;
        ld.global.b32 { %r3 }, [ %rd3 + 0 ];
        bar.sync 0; st.global.b32 [ %rd2 + 0 ], { %r3 };
        """
    out = torch.full((64,), -1, dtype=torch.int32)
    run(kernel(body.replace("WAIT", "bar.sync 0;"), threads=64), out)
    assert out.tolist() == [thread ^ 33 for thread in range(64)]
    with pytest.raises(
        RaceError, match="thread 0 reads global memory that thread 33 of block 0 wrote"
    ):
        run(kernel(body.replace("WAIT", ""), threads=64), out)


def test_dependent_launch_begins_before_and_waits() -> None:
    x, z, y = torch.randn(512), torch.full((512,), float("nan")), torch.zeros(512)
    with emulated(90) as gpu:
        first_kernel[(4,)](x, z, EARLY=True)
        assert z.isnan().all()  # held back
        second_kernel[(4,)](z, y, WAIT=True, launch_pdl=True)
    assert torch.equal(y, (x + 1) * 2)
    assert [launch.kernel for launch in gpu.launches] == ["first_kernel", "second_kernel"]
    assert [launch.overlapped for launch in gpu.launches] == [False, True]


@pytest.mark.parametrize(
    ("early", "wait", "pdl"), [(True, False, True), (True, False, False), (False, False, True)]
)
def test_a_missing_wait_shows_only_where_kernels_overlap(
    early: bool, wait: bool, pdl: bool
) -> None:
    x, z, y = torch.randn(512), torch.full((512,), float("nan")), torch.zeros(512)
    with emulated(90):
        first_kernel[(4,)](x, z, EARLY=early)
        second_kernel[(4,)](z, y, WAIT=wait, launch_pdl=pdl)
    assert bool(y.isnan().all()) == (early and pdl)


def test_flush_and_the_end_run_what_is_held() -> None:
    x, z = torch.randn(512), torch.zeros(512)
    with emulated(90) as gpu:
        first_kernel[(4,)](x, z, EARLY=True)
        gpu.flush()
        assert torch.equal(z, x + 1)
        first_kernel[(4,)](z, z, EARLY=True)
        assert torch.equal(z, x + 1)
    assert torch.equal(z, x + 1 + 1)


def test_arguments_that_are_not_emulated_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="argument a: type nvTmaDesc is not emulated"):
        _bits("a", "nvTmaDesc", object())
