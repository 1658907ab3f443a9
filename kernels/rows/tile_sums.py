"""Second step of the sums over tokens: adds up what the programs of a backward kernel left, in fixed order.

    by_row[s][r] = Σ partials[s, tile]   over the tiles whose frame reads row r of the modulation tables
    total        = Σ partials[last, tile]   over all tiles

Sums are float32; no atomics, so two runs give equal bits. Bytes: the partials once, which the first step wrote a moment
ago and the L2 cache mostly still holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration
from ..launch import ceil_divide, launch

# 32 columns of float32 are one cache line. With 8 warps, to add up what each of them has takes 640 wavefronts of shared
# memory in place of 188 [counted].
CONFIGURATION = Configuration(BLOCK_TILES=128, BLOCK_COLUMNS=32, num_warps=4, num_stages=1)


@triton.jit
def _add_up(
    pointers,  # float32 [columns] of the first tile
    within,  # bool [columns]
    tiles,
    frame_rows,
    row,
    start,
    stop,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums [columns] over the tiles from start to stop: those of a row, or with -1 for it all of them."""
    sums = tl.zeros([16, within.shape[0]], tl.float32)
    for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
        tile = block + tl.arange(0, BLOCK)
        wanted = tile < stop
        if tiles is not None:
            asked = wanted & (row >= 0)
            frame = tl.load(tiles + 3 * tile + 2, mask=asked, other=0)
            wanted = wanted & ((row < 0) | (tl.load(frame_rows + frame, mask=asked, other=-1) == row))
        offsets = tile.to(tl.int64) * C
        mask = wanted[:, None] & within[None, :]
        added = tl.load(pointers[None, :] + offsets[:, None], mask=mask, other=0.0)
        # What a thread has of a column is added up at once, so that its registers are free for loads.
        sums += tl.sum(tl.reshape(added, [BLOCK // 16, 16, within.shape[0]]), axis=0)
    return tl.sum(sums, axis=0)


# Nothing is gained by knowing that these are 1 or multiples of 16, and each would be a build of its own.
@triton.jit(do_not_specialize=["num_tiles", "num_rows", "num_videos"])
def sum_tiles(
    partials,  # float32 [sums, tiles, C]
    tiles,  # int32 [tiles, 3] or None: their third column is the frame
    frame_rows,  # int32 [F] or None
    video_tiles,  # int32 [B+1] or None: first tile of each video
    first_sum,  # [R, C] out, or None
    second_sum,  # [R, C] out, or None
    third_sum,  # [R, C] out, or None
    total,  # [C] out, or None
    num_tiles,
    num_rows,
    num_videos,
    C: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Grid: the blocks of columns of each row of each sum, then those of the total. Row r belongs to video r mod B."""
    blocks: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    columns = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    index, row = tl.program_id(0) // blocks // num_rows, tl.program_id(0) // blocks % num_rows
    within = columns < C
    is_total = index == ROW_SUMS
    start, stop = 0, num_tiles
    if video_tiles is not None:
        video = row % num_videos
        start = tl.where(is_total, 0, tl.load(video_tiles + video))
        stop = tl.where(is_total, num_tiles, tl.load(video_tiles + video + 1))
    pointers = partials + (index * num_tiles).to(tl.int64) * C + columns
    wanted = tl.where(is_total, -1, row)
    # Long sums have too few programs to hide a wait for memory: many tiles in flight. Short ones have many, and would
    # leave most of a large block empty.
    if stop - start > BLOCK_TILES:
        result = _add_up(pointers, within, tiles, frame_rows, wanted, start, stop, C, BLOCK_TILES, STAGES=3)
    else:
        result = _add_up(pointers, within, tiles, frame_rows, wanted, start, stop, C, BLOCK_TILES // 2, STAGES=1)
    place = row.to(tl.int64) * C + columns
    if first_sum is not None:
        tl.store(first_sum + place, result, mask=within & (index == 0))
    if second_sum is not None:
        tl.store(second_sum + place, result, mask=within & (index == 1))
    if third_sum is not None:
        tl.store(third_sum + place, result, mask=within & (index == 2))
    if total is not None:
        tl.store(total + columns, result, mask=within & is_total)


def launch_sum_tiles(
    partials: Tensor,
    by_row: Sequence[Tensor],
    total: Tensor | None,
    tiles: Tensor | None = None,
    frame_rows: Tensor | None = None,
    video_tiles: Tensor | None = None,
) -> None:
    """Adds up `partials` float32 [len(by_row) (+ 1), tiles, C] into `by_row`, each [R, C], and `total` [C] or None.

    The tables of the layout say which tile belongs to which row; without them there is one row.
    """
    _, num_tiles, channels = partials.shape
    rows = by_row[0].shape[0] if by_row else 1
    if video_tiles is not None and rows == video_tiles.shape[0] - 1:
        tiles = frame_rows = None  # all tiles of a video belong to its one row
    outputs = [*by_row, None, None, None][:3]
    launch(
        sum_tiles,
        ((rows * len(by_row) + (total is not None)) * ceil_divide(channels, CONFIGURATION["BLOCK_COLUMNS"]),),
        partials,
        (
            partials,
            tiles,
            frame_rows,
            video_tiles,
            *outputs,
            total,
            num_tiles,
            rows,
            1 if video_tiles is None else video_tiles.shape[0] - 1,
        ),
        {
            "C": channels,
            "ROW_SUMS": len(by_row),
            **CONFIGURATION.launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    """The sums of the backward of the fused norm (three tables, a bias), of tanh-GELU and of attention (biases, and for
    the weights of QK-norms)."""
    types = {"partials": "*fp32", "num_tiles": "i32", "num_rows": "i32", "num_videos": "i32", "total": "*bf16"}
    tables = {"tiles": "*i32", "frame_rows": "*i32", "video_tiles": "*i32"}
    outputs = {"first_sum": "*bf16", "second_sum": "*bf16", "third_sum": "*bf16"}

    def case(signature: dict[str, str], constants: dict, note: str) -> CompileCase:
        return CompileCase(
            name="sum_tiles",
            kernel=sum_tiles,
            signature=signature,
            constants=constants,
            configuration=CONFIGURATION,
            dtype="bf16",
            note=note,
        )

    return [
        case({**types, **tables, **outputs}, {"C": 1152, "ROW_SUMS": 3}, "shift, scale, gate and bias"),
        case(types, dict.fromkeys((*tables, *outputs)) | {"C": 4608, "ROW_SUMS": 0}, "bias"),
        case(types | outputs, dict.fromkeys((*tables, "total")) | {"C": 1152, "ROW_SUMS": 3}, "bias of qkv"),
        case(
            types | outputs | {"total": "*fp32"},
            dict.fromkeys(tables) | {"C": 1152, "ROW_SUMS": 3},
            "bias of qkv, weights of QK-norms",
        ),
    ]
