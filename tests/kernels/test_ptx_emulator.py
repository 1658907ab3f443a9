"""The emulator computes what PTX says, and finds what would be wrong on a GPU: programs written for the purpose."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptx_emulator.arithmetic import compute, to_bfloat16, typed
from ptx_emulator.counting import CountingMachine, count_shared, counts, programs
from ptx_emulator.machine import EmulationError, Machine, run
from ptx_emulator.matrices import described_addresses, lanes_of_8x8, matrix_of_lanes
from ptx_emulator.program import parse

FOLDER = Path(__file__).parent
WORDS, SIGNED_WORDS = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1)


def emulate(body: str, *tensors: torch.Tensor, threads: int = 64, blocks: int = 1, kind: type = Machine) -> None:
    """Runs a kernel `made_up`, with the addresses of the tensors in %rd0, %rd1, … and the thread in %r0."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 made_up_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [made_up_param_{i}];" for i in range(len(tensors)))
    head = f".visible .entry made_up(\n{parameters}\n)\n.reqntid {threads}\n{{\n.reg .b32 %r<99>;\n"
    text = f"{head}{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    run(parse(text), (blocks, 1, 1), [tensor.data_ptr() for tensor in tensors], tensors, 2048, kind)


def number(name: str, *operands: int) -> int:
    return int(compute(name.split("."), [np.asarray(operand % 2**64, dtype=np.uint64) for operand in operands]))


@given(SIGNED_WORDS, SIGNED_WORDS, st.integers(0, 40))
def test_integers(x, y, by) -> None:
    assert number("add.s32", x, y) == (x + y) % 2**32
    assert number("mul.lo.s32", x, y) == x * y % 2**32
    assert number("mul.wide.s32", x, y) == x * y % 2**64
    assert number("mul.hi.u32", x, y) == (x % 2**32) * (y % 2**32) >> 32
    assert number("mad.wide.s32", x, y, 5) == (x * y + 5) % 2**64
    assert number("setp.lt.s32", x, y) == (x < y)
    assert number("setp.lt.u32", x, y) == (x % 2**32 < y % 2**32)
    assert number("shl.b32", x, by) == (x << by) % 2**32
    assert number("shr.s32", x, by) == (x >> by) % 2**32
    assert number("shr.u32", x, by) == x % 2**32 >> by
    assert number("cvt.s64.s32", x) == x % 2**64
    assert number("selp.b32", x, y, x > y) == (x if x > y else y) % 2**32
    if y:
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert number("div.s32", x, y) == quotient % 2**32
        assert number("rem.s32", x, y) == (x - y * quotient) % 2**32


@given(WORDS, st.integers(0, 31), st.data())
def test_bits_taken_out(word, start, data) -> None:
    length = data.draw(st.integers(1, 32 - start))
    taken = word >> start & (2**length - 1)
    assert number("bfe.u32", word, start, length) == taken
    assert number("bfe.s32", word, start, length) == (taken - (taken >> (length - 1) << length)) % 2**32


@given(WORDS, WORDS, st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_bytes_exchanged(low, high, choices) -> None:
    selector = sum(choice << 4 * place for place, choice in enumerate(choices))
    both = (high << 32 | low).to_bytes(8, "little")
    assert number("prmt.b32", low, high, selector) == int.from_bytes(bytes(both[i] for i in choices), "little")


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_rounds_as_pytorch_does(values) -> None:
    mine = torch.from_numpy(to_bfloat16(np.array(values, dtype=np.float32)).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(mine, torch.tensor(values).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_a_fused_product_is_rounded_once() -> None:
    x = np.float32(1 + 2**-12)
    bits = [np.asarray(value, dtype=np.float32).view(np.uint32) for value in (x, x, -1)]
    assert typed(compute(("fma", "rn", "f32"), bits), "f32") == np.float32(2**-11 + 2**-24)
    assert typed(compute(("mul", "f32"), bits[:2]), "f32") - np.float32(1) == np.float32(2**-11)


def test_branches_meet_again() -> None:
    output = torch.zeros(64, dtype=torch.int32)
    emulate(
        """
        mov.b32 %r1, 0;
        $L_again:
        add.s32 %r1, %r1, 3;
        setp.lt.s32 %p1, %r1, %r0;
        @%p1 bra $L_again;
        bar.sync 0;
        mad.wide.u32 %rd1, %r0, 4, %rd0;
        st.global.b32 [%rd1], %r1;
        """,
        output,
    )
    assert output.tolist() == [max(3, -(-thread // 3) * 3) for thread in range(64)]


def test_a_way_round_may_lie_behind_the_barrier_at_which_it_ends() -> None:
    """Of a warp only some threads go it; the others wait."""
    output = torch.zeros(64, dtype=torch.int32)
    emulate(
        """
        mov.b32 %r1, 0;
        setp.lt.u32 %p1, %r0, 5;
        @%p1 bra $L_round;
        $L_back:
        bar.sync 0;
        add.s32 %r1, %r1, %r0;
        mad.wide.u32 %rd1, %r0, 4, %rd0;
        st.global.b32 [%rd1], %r1;
        bra.uni $L_end;
        $L_round:
        mov.b32 %r1, 100;
        bra.uni $L_back;
        $L_end:
        """,
        output,
    )
    assert output.tolist() == [thread + (100 if thread < 5 else 0) for thread in range(64)]


@pytest.mark.parametrize("threads", [5, 32])
def test_a_barrier_that_some_never_reach_is_refused(threads) -> None:
    body = f"""
        setp.lt.u32 %p1, %r0, {threads};
        @%p1 bra $L_round;
        bar.sync 0;
        bra.uni $L_end;
        $L_round:
        bar.sync 0;
        $L_end:
        """
    with pytest.raises(EmulationError, match="not all threads of a (warp are here|block reach a barrier)"):
        emulate(body)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_what_another_warp_wrote_takes_a_barrier(barrier) -> None:
    output = torch.zeros(64, dtype=torch.int32)
    body = f"""
        mov.b32 %r1, global_smem;
        shl.b32 %r2, %r0, 2;
        add.s32 %r3, %r1, %r2;
        st.shared.b32 [%r3], %r0;
        {barrier}
        sub.s32 %r4, 252, %r2;
        add.s32 %r4, %r1, %r4;
        ld.shared.b32 %r5, [%r4];
        mad.wide.u32 %rd1, %r0, 4, %rd0;
        st.global.b32 [%rd1], %r5;
        """
    if barrier:
        emulate(body, output)
        assert output.tolist() == list(range(63, -1, -1))
    else:
        with pytest.raises(EmulationError, match=r"made_up, line \d+: a warp reads what another wrote.*: ld.shared"):
            emulate(body, output)


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_group 1;"])
def test_a_copy_must_be_waited_for(wait) -> None:
    source, output = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = f"""
        shl.b32 %r1, %r0, 2;
        mov.b32 %r2, global_smem;
        add.s32 %r2, %r2, %r1;
        cvt.u64.u32 %rd2, %r1;
        add.s64 %rd0, %rd0, %rd2;
        add.s64 %rd1, %rd1, %rd2;
        cp.async.ca.shared.global [%r2 + 0], [%rd0 + 0], 0x4;
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r3, [%r2];
        st.global.b32 [%rd1], %r3;
        """
    if wait.endswith("0;"):
        emulate(body, source, output, threads=32)
        assert output.tolist() == source.tolist()
    else:
        with pytest.raises(EmulationError, match="read before the copy to it has been waited for"):
            emulate(body, source, output, threads=32)


@pytest.mark.parametrize(("instruction", "reason"), [
    ("st.global.b32 [%rd1 + 4], %r0;", "outside the tensors"),
    ("st.global.b32 [%rd1 + 2], %r0;", "no multiple of the 4 bytes"),
    ("ld.shared.b32 %r1, [global_smem+2048];", "outside the block's shared memory"),
    ("popc.b32 %r1, %r0;", "popc"),
])  # fmt: skip
def test_wild_accesses_and_unknown_instructions_are_named(instruction, reason) -> None:
    memory = torch.zeros(200, dtype=torch.int32)
    with pytest.raises(EmulationError, match=f"made_up, line .*{reason}.*{instruction[:9]}"):
        emulate(f"mad.wide.u32 %rd1, %r0, 4, %rd0;\n{instruction}", memory[:64].clone())


# Sixteen by 64 bfloat16 (rows of 128 bytes, exchanged in groups) times the same, transposed.
PRODUCT = """
    mov.b32 %r1, global_smem;
    shl.b32 %r2, %r0, 4;
    and.b32 %r3, %r0, 56;
    shl.b32 %r3, %r3, 1;
    xor.b32 %r3, %r2, %r3;
    add.s32 %r4, %r1, %r3;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd2, %rd0, %rd2;
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2];
    st.shared.v4.b32 [%r4], {%r5, %r6, %r7, %r8};
    FENCE
    BARRIER
    shr.u32 %r9, %r1, 4;
    cvt.u64.u32 %rd3, %r9;
    or.b64 %rd3, %rd3, 4611686293305294848;
    mov.b32 %r10, 0f00000000;
    mov.b32 %r11, 0f00000000;
    mov.b32 %r12, 0f00000000;
    mov.b32 %r13, 0f00000000;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, {%r5,%r6,%r7,%r8}, %rd3, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    WAIT
    shl.b32 %r2, %r0, 4;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd2, %rd1, %rd2;
    st.global.v4.b32 [%rd2], {%r10, %r11, %r12, %r13};
"""
SYNCHRONIZED = {
    "FENCE": "fence.proxy.async.shared::cta;",
    "BARRIER": "bar.sync 0;",
    "WAIT": "wgmma.wait_group.sync.aligned 0;",
}


@pytest.mark.parametrize(("missing", "reason"), [
    (None, ""),
    ("FENCE", "no fence has made visible"),
    ("BARRIER", "a warp reads what another wrote"),
    ("WAIT", "used before it has been waited for"),
])  # fmt: skip
def test_a_product_of_the_matrix_units(missing, reason) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 64, generator=generator).to(torch.bfloat16)  # 128 threads, 8 numbers each
    output = torch.zeros(128, 4)
    body = PRODUCT
    for name, instruction in SYNCHRONIZED.items():
        body = body.replace(name, "" if name == missing else instruction)
    if missing:
        with pytest.raises(EmulationError, match=reason):
            emulate(body, rows, output, threads=128)
        return
    emulate(body, rows, output, threads=128)
    # A thread's registers of the first factor are what it loaded: eight numbers, two in each register, at the rows
    # lane / 4 (+ 8) and columns lane % 4 · 2 (+ 8). The second factor is that of the first 16 columns and 8 rows.
    loaded, first = rows.flatten().view(4, 32, 4, 2).double(), torch.zeros(4, 16, 16, dtype=torch.float64)
    for lane in range(32):
        for register in range(4):
            row, column = lane // 4 + register % 2 * 8, lane % 4 * 2 + register // 2 * 8
            first[:, row, column : column + 2] = loaded[:, lane, register]
    product = first @ rows[:8, :16].double().T
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        expected = torch.cat([product[:, row, column : column + 2], product[:, row + 8, column : column + 2]], dim=1)
        torch.testing.assert_close(output.view(4, 32, 4)[:, lane].double(), expected, rtol=1e-5, atol=1e-5)


def test_matrices_of_lanes() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(1, 8, 8)
    lanes = lanes_of_8x8(matrix, transposed=False)
    assert lanes[0, 5] == (matrix[0, 1, 3].astype(np.uint32) << 16 | matrix[0, 1, 2])
    turned = lanes_of_8x8(matrix, transposed=True)
    assert turned[0, 5] == (matrix[0, 3, 1].astype(np.uint32) << 16 | matrix[0, 2, 1])
    for registers, transposed in ((lanes, False), (turned, True)):
        assert np.array_equal(matrix_of_lanes(registers, transposed), matrix)


@pytest.mark.parametrize(("mode", "width"), [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("along_rows", [False, True])
def test_described_elements_lie_apart(mode, width, along_rows) -> None:
    """Every element has a place of its own, in rows of `width` bytes whose 16 bytes are exchanged as in memory."""
    group = 8 * width
    descriptor = np.array([1024 // 16 | group // 16 << 16 | group // 16 << 32 | mode << 62], dtype=np.uint64)
    if along_rows:
        descriptor |= np.uint64((64 * 2 // width) * group // 16 << 32) & ~np.uint64(group // 16 << 32)
    addresses = described_addresses(descriptor, 64, along_rows)[0]
    assert len(np.unique(addresses)) == addresses.size
    assert addresses.min() >= 1024 and (addresses % 2 == 0).all()


@pytest.mark.parametrize(
    ("stride", "size", "wavefronts"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (2, 2, 1), (8, 8, 2), (16, 16, 4), (32, 16, 8), (128, 16, 32)],
)
def test_accesses_of_one_bank_follow_each_other(stride, size, wavefronts) -> None:
    addresses = 1024 + stride * np.arange(32)[None]
    assert count_shared(addresses, size) == wavefronts
    assert count_shared(np.where(np.arange(32) < 0, addresses, -1), size) == 0


COUNTED = """
    .loc 1 7 3 // kernel.py:7:3 @[ other.py:2:1 ]
    cvt.u64.u32 %rd8, %r0;
    mad.lo.u64 %rd9, %rd8, 48, %rd0;
    ld.global.b32 %r1, [%rd9];
    .loc 1 8 3 // kernel.py:8:3
    mad.lo.u32 %r2, %r0, 8, global_smem;
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
"""


def test_counts_belong_to_lines_of_the_source() -> None:
    programs.clear(), counts.clear()
    # Not at the beginning of a line of the host's memory, but of its storage.
    emulate(COUNTED, torch.zeros(64 * 12 + 3, dtype=torch.int32), blocks=3, kind=CountingMachine)
    of_load, of_store = counts["made_up", ("kernel.py:7", "other.py:2")], counts["made_up", ("kernel.py:8",)]
    assert programs == {"made_up": 3}
    # 32 lanes 48 bytes apart touch 12 lines; four-byte words 8 bytes apart lie in every second bank.
    assert of_load == {"issue": 3 * 2 * 3, "lines": 3 * 2 * 12}
    # The return is no instruction that is executed, and has the last line before it.
    assert of_store == {"issue": 3 * 2 * 4, "shared": 3 * 2 * (2 + 1), "barriers": 3 * 2}


def test_a_copy_of_nothing_touches_no_line() -> None:
    """Masked loads become such copies; they fill shared memory with zeros."""
    programs.clear(), counts.clear()
    body = """
        mad.lo.u32 %r1, %r0, 4, global_smem;
        mad.wide.u32 %rd1, %r0, 128, %rd0;
        setp.lt.u32 %p1, %r0, 5;
        selp.b32 %r2, 4, 0, %p1;
        cp.async.ca.shared.global [%r1 + 0], [%rd1 + 0], 0x4, %r2;
        cp.async.commit_group;
        cp.async.wait_group 0;
        """
    emulate(body, torch.zeros(5 * 32, dtype=torch.int32), threads=32, kind=CountingMachine)
    (found,) = counts.values()
    assert (found["shared"], found["lines"]) == (1, 5)


def test_counts_of_a_product() -> None:
    """Its second factor of 8 rows of 16 is read from shared memory, two wavefronts of 128 bytes; the first is not."""
    programs.clear(), counts.clear()
    body = PRODUCT
    for name, instruction in SYNCHRONIZED.items():
        body = body.replace(name, instruction)
    emulate(body, torch.zeros(16, 64).bfloat16(), torch.zeros(128, 4), threads=128, kind=CountingMachine)
    (found,) = counts.values()  # no line of a source is named
    # 128 threads store 16 bytes each, exchanged so that no bank is asked twice.
    assert found["shared"] == 128 * 16 / 128 + 2
    assert found["matrix"] == 2 * 64 * 8 * 16 / 4096
    assert found["lines"] == 2 * 128 * 16 / 128


def count(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    command = [sys.executable, "-m", "ptx_emulator.counting", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_counts_both_directions_of_an_op() -> None:
    process = count("gelu_tanh", "1x2x4", "--lines", "1")
    assert process.returncode == 0, process.stderr
    for kernel in ("gelu_tanh_forward", "gelu_tanh_backward"):
        head, columns, total, line = re.search(rf"^{kernel}: .*\n(?:.*\n){{2}}.*$", process.stdout, re.M)[
            0
        ].splitlines()
        assert columns.split() == ["issue", "shared", "lines"]
        assert total.endswith("  all") and "gelu_tanh.py:" in line
        # Eight tokens of 4 · 1152 halves are 72 lines, read and written once at least.
        assert int(total.split()[2]) * int(re.search(r"one of (\d+) programs", head)[1]) >= 8 * 72 * 2


@pytest.mark.parametrize("size", ["16x9", "16x9xa", "0x9x16"])
def test_the_command_refuses_what_is_no_size(size) -> None:
    process = count("gelu_tanh", size)
    assert process.returncode == 2 and "give three numbers" in process.stderr
