"""Triton kernels of cross-attention, backward. The formulas and the public function are in cross_attention.

Three kernels, no atomics; for short texts that of cross_short_backward is in place of the first two. With g the
output's gradient, P the probabilities and δ = rowsum(g · output),

    dS = P · (g · Vᵀ - δ)       gradient of the logits
    queries (first): δ and dQ = dS · K / sqrt(D)    one program per tile of video tokens and head
    text (second):   dK = dSᵀ · Q / sqrt(D) and dV = Pᵀ · g over a chunk of a video's tokens: one program per chunk,
                     tile of text and head, writing float32 partial sums
    chunks (third):  adds the partial sums of each text token: see cross_chunks_backward

Per call: 14·L·H·D FLOPs (10 useful) and 12·H·D bytes (half precision) for each video token, and 16·L·H·D bytes for
each chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import ceil_divide, count_multiprocessors, launch
from .builds import attention_case
from .cross_chunks_backward import launch_chunks
from .cross_forward import shape_class
from .cross_short_backward import launch_short_backward, select_short
from .cross_tiles import chunk_length, load_rows_and_text
from .loops import NO_NORM, key_gradient, query_gradient
from .tables import row_tiles, tile_ranges
from .tiles import LOG2_E, load_head, row_products, scale_head, store_column_sums, store_head, zero_head

CONFIGURATIONS = {
    "cross_attention_queries_backward": {
        "any": (
            Configuration(ROWS=64, STEP=64, REMAINDER=32, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=64, REMAINDER=16, num_warps=4, num_stages=2),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),
        ),
        "any@sm_80": (  # with two stages it spills
            Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=3),
            Configuration(ROWS=128, STEP=32, REMAINDER=16, num_warps=8, num_stages=2),
        ),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, num_warps=8, num_stages=1),),
    },
    "cross_attention_text_backward": {
        "any": (
            Configuration(ROWS=64, STEP=64, REMAINDER=32, num_warps=4, num_stages=2),
            Configuration(ROWS=64, STEP=32, REMAINDER=32, num_warps=4, num_stages=3),
            Configuration(ROWS=128, STEP=64, REMAINDER=32, num_warps=8, num_stages=2),
        ),
        "any@sm_80": (Configuration(ROWS=64, STEP=32, REMAINDER=16, num_warps=4, num_stages=2),),
        "float32": (Configuration(ROWS=32, STEP=16, REMAINDER=16, num_warps=8, num_stages=1),),
    },
}
# The sums of a chunk in the kernel of the chunks, in the time of a step of cross_short_backward [counted bytes].
CHUNK_SUMS = 0.1
TEXT_TILE = 64  # ROWS of the text kernel by default in half precision


@triton.jit(do_not_specialize=["num_tokens"])
def _queries(
    q,  # [N, H, D]
    kv,  # [M, 2, H, D]
    output,  # [N, H, D]
    output_gradient,  # [N, H, D]
    log_sums,  # float32 [H, N]
    deltas,  # float32 [H, N] out: δ
    q_gradient,  # [N, H, D] out
    bias_partials,  # float32 [tiles · H, D] out, or None
    tiles,  # int32 [tiles, 4]
    text_starts,  # int32 [B]
    text_lengths,  # int32 [B]
    num_tokens,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
):
    TOKEN_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TEXT_STRIDE: tl.constexpr = 2 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, rest, keys, text_length = load_rows_and_text(
        tiles, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    rows = tl.arange(0, ROWS)
    inside = rows < rest

    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    in_statistics = head * num_tokens + first_token
    g = load_head(output_gradient + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    delta = row_products(load_head(output + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE), g)
    tl.store(deltas + in_statistics + rows, delta, mask=inside)
    sums, _ = query_gradient(
        load_head(q + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE),
        g,
        tl.load(log_sums + in_statistics + rows, mask=inside, other=float("inf")),
        delta,
        keys,
        keys + HEADS * HEAD_SIZE,
        None,
        text_length,
        STEP=STEP,
        REMAINDER=REMAINDER,
        NORM=NO_NORM,
        SCALE=SCALE * LOG2_E,
        KEY_STRIDE=TEXT_STRIDE,
        VALUE_STRIDE=TEXT_STRIDE,
        HEAD_SIZE=HEAD_SIZE,
    )
    scale = tl.where(text_length > 1, SCALE, 0.0)  # a lone key has probability one: nothing moves it
    sums = scale_head(sums, scale)
    store_head(q_gradient + in_tokens, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
    if bias_partials is not None:
        store_column_sums(bias_partials, sums, inside, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_tokens", "chunk_tokens", "max_length"])
def _text(
    q,  # [N, H, D]
    kv,  # [M, 2, H, D]
    output_gradient,  # [N, H, D]
    log_sums,  # float32 [H, N]
    deltas,  # float32 [H, N]
    partials,  # float32 [chunks, max_length, 2, H, D] out
    chunks,  # int32 [chunks, 4], tiles of `chunk_tokens` rows
    text_starts,  # int32 [B]
    text_lengths,  # int32 [B]
    num_tokens,
    chunk_tokens,
    max_length,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
):
    """Grid (chunks · H, tiles of text). Rows of `partials` beyond a video's text are not written."""
    TOKEN_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TEXT_STRIDE: tl.constexpr = 2 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, rest, keys, text_length = load_rows_and_text(
        chunks, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    length = tl.minimum(chunk_tokens, rest)
    first_row = tl.program_id(1) * ROWS
    if first_row >= text_length:
        return

    rows = first_row + tl.arange(0, ROWS)
    inside = rows < text_length
    k = load_head(keys, rows, inside, TEXT_STRIDE, HEAD_SIZE)  # [ROWS, D]
    v = load_head(keys + HEADS * HEAD_SIZE, rows, inside, TEXT_STRIDE, HEAD_SIZE)
    # Offsets within a video may pass 2^31 elements, those within a chunk do not.
    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    in_statistics = head * num_tokens + first_token
    sums = zero_head(ROWS, HEAD_SIZE), zero_head(ROWS, HEAD_SIZE)
    for rest in tl.static_range(2):
        sums = key_gradient(
            sums,
            k,
            v,
            None,
            q + in_tokens,
            output_gradient + in_tokens,
            log_sums + in_statistics,
            deltas + in_statistics,
            length,
            REST=rest,
            STEP=STEP,
            REMAINDER=REMAINDER,
            NORM=NO_NORM,
            SCALE=SCALE * LOG2_E,
            QUERY_STRIDE=TOKEN_STRIDE,
            GRADIENT_STRIDE=TOKEN_STRIDE,
            HEAD_SIZE=HEAD_SIZE,
        )
    key_sums, value_sums = sums
    scale = tl.where(text_length > 1, SCALE, 0.0)
    key_sums = scale_head(key_sums, scale)
    partial = partials + tl.program_id(0).to(tl.int64) // HEADS * max_length * TEXT_STRIDE + head * HEAD_SIZE
    store_head(partial, key_sums, rows, inside, TEXT_STRIDE, HEAD_SIZE)
    store_head(partial + HEADS * HEAD_SIZE, value_sums, rows, inside, TEXT_STRIDE, HEAD_SIZE)


def launch_backward(
    output_gradient: Tensor,
    q: Tensor,
    kv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    q_gradient: Tensor,
    kv_gradient: Tensor,
    wants_bias: bool,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    runs: list[int],
) -> Tensor | None:
    """Fills q_gradient [N, H, D], and in kv_gradient [M, 2, H, D], which holds zeros, the rows of real text.

    All of [N, …] and [M, …] must be contiguous.

    Returns:
        The programs' parts of the gradient of the bias of q, float32 [parts, H·D], if it is wanted.
    """
    _, heads, head_size = q.shape
    runs, width = tuple(runs), 2 * heads * head_size
    chosen = select_short(q, max_length)
    programs, side_by_side = heads, count_multiprocessors(q.device)
    if chosen is None:  # a program for each tile of text, and two on a multiprocessor
        programs, side_by_side = heads * ceil_divide(max(max_length, 1), TEXT_TILE), 2 * side_by_side
    chunk_tokens = chunk_length(runs, programs, side_by_side, CHUNK_SUMS)
    chunks = row_tiles(runs, chunk_tokens, q.device)
    partials = torch.empty(chunks.shape[0], max_length, width, dtype=torch.float32, device=q.device)
    tensors = output_gradient, q, kv, output, log_sums, q_gradient, partials
    text = text_starts, text_lengths, max_length
    if chosen is None:
        bias_partials = _launch_queries_and_text(*tensors, wants_bias, chunks, chunk_tokens, *text, runs)
    else:
        bias_partials = launch_short_backward(*tensors, wants_bias, chunks, chunk_tokens, *text, chosen)
    launch_chunks(partials, kv_gradient, tile_ranges(runs, chunk_tokens, q.device), text_starts, text_lengths)
    return bias_partials


def _launch_queries_and_text(
    output_gradient: Tensor,
    q: Tensor,
    kv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    q_gradient: Tensor,
    partials: Tensor,
    wants_bias: bool,
    chunks: Tensor,
    chunk_tokens: int,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    runs: tuple[int, ...],
) -> Tensor | None:
    """The first two kernels: fills q_gradient and the partial sums of the chunks; returns those of the bias."""
    num_tokens, heads, head_size = q.shape
    deltas = torch.empty(heads, num_tokens, dtype=torch.float32, device=q.device)
    configuration = select(CONFIGURATIONS, "cross_attention_queries_backward", shape_class(q), q.device)
    tiles = row_tiles(runs, configuration["ROWS"], q.device)
    bias_partials = q.new_empty(tiles.shape[0], heads * head_size, dtype=torch.float32) if wants_bias else None
    launch(
        _queries,
        (tiles.shape[0] * heads,),
        q,
        (
            q,
            kv,
            output,
            output_gradient,
            log_sums,
            deltas,
            q_gradient,
            bias_partials,
            tiles,
            text_starts,
            text_lengths,
            num_tokens,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            **configuration.launch,
        },
    )
    configuration = select(CONFIGURATIONS, "cross_attention_text_backward", shape_class(q), q.device)
    launch(
        _text,
        (chunks.shape[0] * heads, ceil_divide(max_length, configuration["ROWS"])),
        q,
        (
            q,
            kv,
            output_gradient,
            log_sums,
            deltas,
            partials,
            chunks,
            text_starts,
            text_lengths,
            num_tokens,
            chunk_tokens,
            max_length,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            **configuration.launch,
        },
    )
    return bias_partials


def compile_cases(arch: str) -> list[CompileCase]:
    cases = []
    for name, kernel in (("cross_attention_queries_backward", _queries), ("cross_attention_text_backward", _text)):
        for dtype, size in (("bf16", "any"), ("fp16", "any"), ("fp32", "float32")):
            configuration = candidates_of(CONFIGURATIONS, name, size, arch)[0]
            work = configuration["ROWS"] * configuration["STEP"]
            cases.append(attention_case(name, kernel, configuration, dtype, {}, work=work))
    return cases
