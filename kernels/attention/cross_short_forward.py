"""Triton kernel of cross-attention, forward, for texts that stay on chip: one or two tiles of KEYS tokens.

One program computes a chunk of a video's tokens for one head. It reads all keys and values of that head once, then
walks over the chunk, ROWS tokens a step, while the queries of the next step are on their way. All scores of a token are
there at once, so that with one tile of text the softmax needs neither a running maximum nor a rescale.

Per call: 4·L·H·D FLOPs and 4·H·D bytes (half precision) for each video token, and for each chunk 4·L·H·D bytes from the
L2 cache. The last column of the head's tail must be padding: see `tiles.has_padding`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration
from ..launch import count_multiprocessors, launch
from .builds import attention_case
from .cross_tiles import chunk_length, load_rows_and_text
from .tables import row_tiles
from .tiles import (
    LOG2_E,
    add_product,
    dot_rows,
    get_column,
    has_padding,
    load_head,
    mark_column,
    row_width,
    scale_rows,
    set_column,
    split_head,
    store_head,
    zero_head,
)

TILE, LONGEST_TEXT = 128, 256  # text tokens: of one tile, and of two, which is what a program's registers hold


def class_of_text(q: Tensor, max_length: int) -> str | None:
    """The shape class of this kernel and its backward for q [N, H, D] and texts of at most `max_length` tokens.

    None where they are not for it: long texts; heads that are wide or without padding; float32 on a GPU, which
    multiplies outside the matrix units; and GPUs other than sm_90, the only one whose matrix units take a tile of text
    from shared memory and leave the sums in registers: elsewhere the backward pass does not fit.
    """
    if max_length > LONGEST_TEXT or not _fits(q.shape[2]):
        return None
    if q.is_cuda and (q.dtype == torch.float32 or not _is_sm_90(q.device)):
        return None
    return "text of one tile" if max_length <= TILE else "text of two tiles"


@lru_cache(maxsize=64)
def _fits(head_size: int) -> bool:
    return has_padding(head_size) and sum(split_head(head_size)) <= 80


@lru_cache(maxsize=64)
def _is_sm_90(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@triton.jit
def _load_text(keys, text, real, TEXT_STRIDE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Keys and values [KEYS, D] of one tile, with a column behind them.

    That of the keys, times the ones behind the queries, makes the scores beyond the text -inf; that of the values are
    ones, which sum the probabilities.
    """
    values = keys + TEXT_STRIDE // 2
    k = load_head(keys, text, real, TEXT_STRIDE, HEAD_SIZE)
    v = load_head(values, text, real, TEXT_STRIDE, HEAD_SIZE)
    behind = mark_column(row_width(HEAD_SIZE) - 1, HEAD_SIZE)
    return set_column(k, behind, tl.where(real, 0.0, float("-inf"))[:, None]), set_column(v, behind, 1.0)


@triton.jit(do_not_specialize=["num_tokens", "chunk_tokens"])
def _forward(
    q,  # [N, H, D]
    kv,  # [M, 2, H, D]
    output,  # [N, H, D] out
    log_sums,  # float32 [H, N] out
    chunks,  # int32 [chunks, 4], tiles of `chunk_tokens` rows
    text_starts,  # int32 [B]
    text_lengths,  # int32 [B]
    num_tokens,
    chunk_tokens,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TEXT_STRIDE: tl.constexpr = 2 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = LOG2_E / HEAD_SIZE**0.5
    head, first_token, rest, keys, text_length = load_rows_and_text(
        chunks, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    length = tl.minimum(chunk_tokens, rest)

    text = tl.arange(0, KEYS)
    real = text < text_length
    k, v = _load_text(keys, text, real, TEXT_STRIDE, HEAD_SIZE)
    if TILES == 2:
        more_real = text + KEYS < text_length
        more_k, more_v = _load_text(keys, text + KEYS, more_real, TEXT_STRIDE, HEAD_SIZE)
    in_ones = mark_column(row_width(HEAD_SIZE) - 1, HEAD_SIZE)
    # Offsets within a video may pass 2^31 elements, those within a chunk do not.
    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    statistics = log_sums + head * num_tokens + first_token
    read = tl.where(text_length > 0, length, 0)  # without text the output is zero, also where a query is not finite
    for start in tl.range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < length
        queries = load_head(q + in_tokens, rows, rows < read, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
        queries = set_column(queries, in_ones, 1.0)
        scores = dot_rows(queries, k)  # [ROWS, KEYS]
        row_max = tl.maximum(tl.max(scores, axis=1) * SCALE, -1e30)  # finite: exp2(-inf - row_max) is then zero
        probabilities = tl.exp2(scores * SCALE - row_max[:, None])
        sums = add_product(zero_head(ROWS, HEAD_SIZE), probabilities.to(v[0].dtype), v)
        if TILES == 2:
            if text_length > KEYS:
                scores = dot_rows(queries, more_k)
                new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE)
                rescale = tl.exp2(row_max - new_max)
                probabilities = tl.exp2(scores * SCALE - new_max[:, None])
                sums = add_product(scale_rows(sums, rescale), probabilities.to(more_v[0].dtype), more_v)
                row_max = new_max
        row_sum = get_column(sums, in_ones)
        row_sum = tl.where(text_length > 0, row_sum, 1.0)  # without text the sums are zero, and so is the output
        log_sum = tl.where(text_length > 0, row_max, 0.0) + tl.log2(row_sum)
        tl.store(statistics + rows, log_sum, mask=inside)
        store_head(output + in_tokens, scale_rows(sums, 1.0 / row_sum), rows, inside, TOKEN_STRIDE, HEAD_SIZE)


def launch_short_forward(
    q: Tensor,
    kv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    runs: list[int],
    configuration: Configuration,
) -> None:
    """As `cross_forward.launch_forward`, for texts that have a `class_of_text`."""
    num_tokens, heads, head_size = q.shape
    runs = tuple(runs)
    chunk_tokens = chunk_length(runs, heads, count_multiprocessors(q.device) * configuration["programs"])
    chunks = row_tiles(runs, chunk_tokens, q.device)
    launch(
        _forward,
        (chunks.shape[0] * heads,),
        q,
        (
            q,
            kv,
            output,
            log_sums,
            chunks,
            text_starts,
            text_lengths,
            num_tokens,
            chunk_tokens,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "KEYS": TILE,
            "TILES": 1 if max_length <= TILE else 2,
            **configuration.launch,
        },
    )


def short_compile_cases(configurations: dict[int, Configuration]) -> list[CompileCase]:
    """Builds for texts of so many tiles."""
    return [
        attention_case(
            "cross_attention_forward",
            _forward,
            configuration,
            dtype,
            {"KEYS": TILE, "TILES": tiles},
            work=configuration["ROWS"] * TILE * tiles,
            note=f"text of {tiles} tile{'s' if tiles > 1 else ''}",
        )
        for tiles, configuration in configurations.items()
        for dtype in ("bf16", "fp16")
    ]
