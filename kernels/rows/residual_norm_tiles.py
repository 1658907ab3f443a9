"""The residual norms, which go over x [N, C] row by row, seen from the host: configurations, tiles and column blocks.

A row of C columns is two blocks: WIDE, the largest power of two below C, and TAIL, the rest rounded up to a power of
two: 1024 + 128 at C = 1152. A single block of 2048 would leave 44 % of the lanes idle. Compiled for sm_90 in bf16 at
C = 1152 with 4 warps and no pipelining (registers a thread; warp instructions a row in the loop), beside what may issue
while the row's bytes move at 4.3 TB/s (an H200 multiprocessor at 1.755 GHz: 496 instructions for each 2304 bytes):

    kernel                                      one block     two blocks    may issue
    modulated_norm forward                       64;   788      48;  592          993
    modulated_norm backward                     128;  1164      72;  764         1490
    gate_residual_modulated_norm forward        124;  1208      79;  852         1986
    gate_residual_modulated_norm backward       216;  1724     128; 1096         2979

Rows go one at a time, as one-dimensional tensors. Tiles of 2, 4 or 8 rows, tried with the same formulas, make Triton
give the two blocks different layouts and pass whole blocks through shared memory: modulated_norm forward, 4 warps, one
row 592 instructions as here, 916 as a tile of one row, 604 a row in tiles of two, 430 in tiles of four with 167
registers; the fused backward in tiles of four spills.

Fewer warps share less work across threads and issue fewer instructions a row, but hold more registers; the backward
needs all of a row's columns spread over the program, since its sums over tokens live in registers. Pipelining (STAGES)
adds a pass through shared memory (1096 → 1392) and takes the loads' latency out of the loop, which otherwise meets it
twice a row with room for only three or four programs on a multiprocessor. A thread must have four bytes to be copied
so: the two bytes of TAIL that each of 128 threads had were waited for in every row. A TAIL of twice the columns, half
of them empty, goes with the rest at 128 registers in place of 122; the fused backward took a fifth less time [H200].

Tiles are as long as fills the multiprocessors best. A row of the fused backward takes 0.4 + 0.27·P µs with P programs
on a multiprocessor (1.3 + 0.22·P with the smaller TAIL), and each program 40 ns of the second step [fitted to 45 shapes
and tiles on an H200; root mean square of what is left 8 %]; one of the fused forward 0.73 + 0.2·P [to 12 shapes in
tiles of up to 32 tokens; 4 %]. Of that forward 1056 programs fit at a time: 1040 of 240p took 79 µs, and of as many
tokens of 144p 1120 programs, 64 of them alone at the end, 88.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..configurations import Configuration, select
from ..launch import ceil_divide, count_multiprocessors
from ..layout import FRAME_TILE_SIZES, PackLayout


def _forward(programs: int, of_four_warps: int) -> dict[str, tuple[Configuration, ...]]:
    return {
        "any": (
            Configuration(programs=programs, STAGES=3, num_warps=2),
            Configuration(programs=programs, STAGES=1, num_warps=2),
            Configuration(programs=programs, STAGES=1, num_warps=1),
            Configuration(programs=of_four_warps, STAGES=1, num_warps=4),
            Configuration(programs=of_four_warps, STAGES=3, num_warps=4),
        ),
        # Not measured. Where a multiprocessor has 100 KB of shared memory, as GeForce's, five programs of the general
        # default fit in place of eight (fused op, float32).
        "any@sm_80": (
            Configuration(programs=of_four_warps, STAGES=1, num_warps=4),
            Configuration(programs=programs, STAGES=3, num_warps=2),
            Configuration(programs=of_four_warps, STAGES=3, num_warps=4),
        ),
    }


# `programs`: so many at least fit on a multiprocessor. `tail_bytes`: of a row's TAIL at least, so that each thread has
# four.
_BACKWARD = {
    "any": (
        Configuration(programs=4, STAGES=3, tail_bytes=512, num_warps=4),
        Configuration(programs=4, STAGES=4, tail_bytes=512, num_warps=4),
        Configuration(programs=3, STAGES=3, tail_bytes=1024, maxnreg=80, num_warps=8),
        Configuration(programs=4, STAGES=3, tail_bytes=0, num_warps=4),
    ),
    # Some builds of the general default take up to 164 registers there, and only three of their programs fit.
    **dict.fromkeys(
        ("any@sm_80", "any@sm_100"),
        (
            Configuration(programs=4, STAGES=3, tail_bytes=512, maxnreg=128, num_warps=4),
            Configuration(programs=3, STAGES=3, tail_bytes=1024, maxnreg=80, num_warps=8),
        ),
    ),
}
OPS = ("modulated_norm", "gate_residual", "gate_residual_modulated_norm")
CONFIGURATIONS = {
    "modulated_norm_forward": _forward(programs=12, of_four_warps=10),
    "gate_residual_forward": _forward(programs=14, of_four_warps=10),
    "gate_residual_modulated_norm_forward": _forward(programs=8, of_four_warps=6),
} | {f"{op}_backward": _BACKWARD for op in OPS}

# What a row takes beside the rows of other programs, and a program beside its rows (in the backward: its sums in the
# second step), in the time that each program on a multiprocessor adds to a row: on an H200 0.2 µs forward and 0.27 µs
# backward, where the choice is within 6 % of the best tiles.
_LATENCY = {"forward": 3.7, "backward": 1.5}
_PROGRAM = {"forward": 0.03, "backward": 0.15}

# What the model builds at hidden size 1152: (op, parts that are present, dtype).
COMPILED = (
    ("modulated_norm", "norm", "bf16"),
    ("gate_residual", "branch gate bias", "bf16"),
    ("gate_residual_modulated_norm", "branch bias norm", "bf16"),
    ("gate_residual_modulated_norm", "branch gate bias norm", "bf16"),
    ("gate_residual_modulated_norm", "branch gate bias norm", "fp16"),
    ("gate_residual_modulated_norm", "branch gate bias norm", "fp32"),
)


def choose_tiles(op: str, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The layout's tables for an op: `frame_tiles` for its forward, `frame_tiles` and `video_tiles` for backward."""
    device = layout.device
    forward, backward = _choose_sizes(op, layout.num_tokens, layout.tile_counts, device.type, device.index)
    return layout.frame_tiles(forward), layout.frame_tiles(backward), layout.video_tiles(backward)


def _choose_sizes(
    op: str, num_tokens: int, programs: tuple[int, ...], device_type: str, device_index: int | None
) -> tuple[int, int]:
    device = torch.device(device_type, device_index)

    def choose(direction: str) -> int:
        side_by_side = select(CONFIGURATIONS, f"{op}_{direction}", "any", device)["programs"]
        return fill_rounds(num_tokens, programs, count_multiprocessors(device), side_by_side, direction)

    return choose("forward"), choose("backward")


# The choice reads a file and asks for the GPU's name, which a compiler cannot trace: it is a constant to it. This mark
# is all that torch.compiler.assume_constant_result sets, but calling that imports the compiler, seconds at every start.
_choose_sizes._dynamo_marked_constant = True


@lru_cache(maxsize=1024)
def fill_rounds(
    num_tokens: int, programs: tuple[int, ...], multiprocessors: int, side_by_side: int, direction: str = "backward"
) -> int:
    """The one of FRAME_TILE_SIZES whose programs should take the least time.

    Args:
        programs: of each size.
        side_by_side: programs that fit on a multiprocessor.
        direction: "forward" or "backward".
    """

    def time(count: int) -> float:
        rounds, rest = divmod(count, multiprocessors * side_by_side)
        row = rounds * (_LATENCY[direction] + side_by_side)
        if rest:
            row += _LATENCY[direction] + ceil_divide(rest, multiprocessors)
        return row * num_tokens / count + _PROGRAM[direction] * count

    return min(zip(FRAME_TILE_SIZES, programs, strict=True), key=lambda choice: time(choice[1]))[0]


@lru_cache(maxsize=64)
def split_columns(channels: int, tail: int = 0) -> dict[str, int]:
    """Returns the constexprs WIDE and TAIL for rows of `channels` columns, 2 or more.

    Args:
        tail: the least columns of TAIL, as far as WIDE has as many; a power of two or 0.
    """
    wide = 1 << ((channels - 1).bit_length() - 1)
    return {"C": channels, "WIDE": wide, "TAIL": max(1 << (channels - wide - 1).bit_length(), min(tail, wide))}
