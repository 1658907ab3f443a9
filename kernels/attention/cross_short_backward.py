"""Triton kernel of cross-attention, backward, for short texts: every gradient in one pass over the video's tokens.

One program walks over a chunk of a video's tokens for one head and one tile of KEYS text tokens, which stay on chip:
five matrix products and one exponential for each score, where queries and text apart take seven and two. With the
letters of cross_backward, each step of ROWS tokens gives

    δ = rowsum(g · output)        dQ = dS · K / sqrt(D)        dK += dSᵀ · Q / sqrt(D)        dV += Pᵀ · g

dK and dV of the chunk become float32 partial sums, which the kernel of the chunks adds up. The bias of the queries gets
Σ dQ = Σ_keys K · rowsum(dSᵀ) / sqrt(D); that row sum is one more column of dSᵀ · Q, as the queries end in a column of
ones, which meets a zero in the keys. The last column of the head's tail must be padding for it.

What a text has beyond the first tile takes one more launch for each `more_keys` tokens, which adds to the gradient of
the queries as the one before wrote it, rounded to its dtype; its programs have nothing to do where a text ends before.

Per call: 10·L·H·D FLOPs and 8·H·D bytes (half precision) for each video token, 10·H·D more for each launch after the
first; and 8·L·H·D bytes of sums for each chunk, which its kernel reads again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, select
from ..launch import launch
from .builds import attention_case
from .cross_short_forward import class_of_text
from .cross_tiles import load_rows_and_text
from .tiles import (
    LOG2_E,
    add_product,
    column_sums,
    dot_rows,
    get_column,
    load_head,
    load_numbers,
    load_weight,
    row_products,
    scale_head,
    set_column,
    store_head,
    store_vector,
    tail_of,
    to_float32,
    zero_head,
)

# `chunks` is what `chunk_length` takes; two_passes=1 are the kernels of cross_backward. Sums and scores fill
# the registers, so that one program of eight warps fits on a multiprocessor. With two stages it reads the rows of the
# next step only when a step is over, with more during it.
ONE_PASS = tuple(
    Configuration(ROWS=64, KEYS=128, more_keys=64, chunks=chunks, two_passes=0, num_warps=8, num_stages=num_stages)
    for num_stages, chunks in ((3, 32), (3, 16), (4, 32), (4, 16), (2, 16))
)
TWO_PASSES = Configuration(two_passes=1)
CONFIGURATIONS = {
    "cross_attention_short_backward": {
        "text of one tile": (*ONE_PASS, TWO_PASSES),
        "text of two tiles": (*ONE_PASS, TWO_PASSES),
    },
}


def select_short(q: Tensor, max_length: int) -> Configuration | None:
    """The configuration of this kernel for q [N, H, D], None where the kernels for texts of any length are to run."""
    size = class_of_text(q, max_length)
    if size is None:
        return None
    configuration = select(CONFIGURATIONS, "cross_attention_short_backward", size, q.device)
    return None if configuration["two_passes"] else configuration


@triton.jit(do_not_specialize=["num_tokens", "chunk_tokens", "max_length", "first_text"])
def _backward(
    q,  # [N, H, D]
    kv,  # [M, 2, H, D]
    output,  # [N, H, D]
    output_gradient,  # [N, H, D]
    log_sums,  # float32 [H, N]
    q_gradient,  # [N, H, D] out
    partials,  # float32 [chunks, max_length, 2, H, D] out
    bias_partials,  # float32 [chunks · H, D] out, or None
    chunks,  # int32 [chunks, 4], tiles of `chunk_tokens` rows
    text_starts,  # int32 [B]
    text_lengths,  # int32 [B]
    num_tokens,
    chunk_tokens,
    max_length,
    first_text,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Rows of `partials` beyond a video's text are not written.

    ADD: to what is in q_gradient and bias_partials, by text tokens from `first_text` on.
    """
    TOKEN_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TEXT_STRIDE: tl.constexpr = 2 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, rest, keys, text_length = load_rows_and_text(
        chunks, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    length = tl.minimum(chunk_tokens, rest)
    if ADD:
        if first_text >= text_length:
            return
    scale = tl.where(text_length > 1, SCALE, 0.0)  # a lone key has probability one: nothing moves it

    text = first_text + tl.arange(0, KEYS)
    real = text < text_length
    k = load_head(keys, text, real, TEXT_STRIDE, HEAD_SIZE)  # [KEYS, D]
    v = load_head(keys + HEADS * HEAD_SIZE, text, real, TEXT_STRIDE, HEAD_SIZE)
    in_ones = (tl.arange(0, tail_of(HEAD_SIZE)) == tail_of(HEAD_SIZE) - 1)[None, :]
    # Offsets within a video may pass 2^31 elements, those within a chunk do not.
    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    statistics = log_sums + head * num_tokens + first_token
    key_sums = zero_head(KEYS, HEAD_SIZE)
    value_sums = zero_head(KEYS, HEAD_SIZE)
    for start in tl.range(0, length, ROWS):
        # Rows beyond the end are zero in q, g and output, and so in all sums; their probabilities are one.
        rows = start + tl.arange(0, ROWS)
        inside = rows < length
        queries = load_head(q + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
        queries = set_column(queries, in_ones, 1.0)
        g = load_head(output_gradient + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        delta = row_products(load_head(output + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE), g)
        log_sum = load_numbers(statistics, rows, inside, 0.0)
        scores = dot_rows(k, queries) * (SCALE * LOG2_E) - log_sum[None, :]  # [KEYS, ROWS]
        probabilities = tl.exp2(tl.where(real[:, None], scores, float("-inf")))
        score_gradient = (dot_rows(v, g) - delta[None, :]) * probabilities
        score_gradient = score_gradient.to(k[0].dtype)
        # In this order nothing spills, and the first two products run while the gradient is laid out for the third.
        key_sums = add_product(key_sums, score_gradient, queries)
        value_sums = add_product(value_sums, probabilities.to(g[0].dtype), g)
        sums = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(score_gradient), k)  # [ROWS, D]
        sums = scale_head(sums, scale)
        if ADD:
            before = to_float32(load_head(q_gradient + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE))
            sums = sums[0] + before[0], sums[1] + before[1]
        store_head(q_gradient + in_tokens, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)

    program = tl.program_id(0).to(tl.int64)
    partial = partials + program // HEADS * max_length * TEXT_STRIDE + head * HEAD_SIZE
    store_head(partial, scale_head(key_sums, scale), text, real, TEXT_STRIDE, HEAD_SIZE)
    store_head(partial + HEADS * HEAD_SIZE, value_sums, text, real, TEXT_STRIDE, HEAD_SIZE)
    if bias_partials is not None:
        along = get_column(key_sums, in_ones) * scale  # [KEYS]
        k = to_float32(load_head(keys, text, real, TEXT_STRIDE, HEAD_SIZE))
        sums = tl.sum(k[0] * along[:, None], axis=0), tl.sum(k[1] * along[:, None], axis=0)
        bias = bias_partials + program * HEAD_SIZE
        if ADD:
            before = column_sums(load_weight(bias, HEAD_SIZE))
            sums = sums[0] + before[0], sums[1] + before[1]
        store_vector(bias, sums, HEAD_SIZE)


def launch_short_backward(
    output_gradient: Tensor,
    q: Tensor,
    kv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    q_gradient: Tensor,
    partials: Tensor,
    bias_partials: Tensor | None,
    chunks: Tensor,
    chunk_tokens: int,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    configuration: Configuration,
) -> None:
    """Fills q_gradient, partials float32 [chunks, max_length, 2·H·D] and bias_partials float32 [chunks · H, D]."""
    num_tokens, heads, head_size = q.shape
    first, more = configuration["KEYS"], configuration["more_keys"]
    for first_text in (0, *range(first, max_length, more)):
        launch(
            _backward,
            (chunks.shape[0] * heads,),
            q,
            (
                q,
                kv,
                output,
                output_gradient,
                log_sums,
                q_gradient,
                partials,
                bias_partials,
                chunks,
                text_starts,
                text_lengths,
                num_tokens,
                chunk_tokens,
                max_length,
                first_text,
            ),
            {
                "HEADS": heads,
                "HEAD_SIZE": head_size,
                "ADD": first_text > 0,
                **configuration.launch | {"KEYS": more if first_text else first},
            },
        )


def compile_cases(arch: str) -> list[CompileCase]:
    if arch != "sm_90":
        return []
    configuration = ONE_PASS[0]
    cases = []
    for dtype, add in (("bf16", False), ("bf16", True), ("fp16", False), ("fp16", True)):
        choices = configuration.choices | ({"KEYS": configuration["more_keys"]} if add else {})
        cases.append(
            attention_case(
                "cross_attention_short_backward",
                _backward,
                Configuration(**choices),
                dtype,
                {"ADD": add},
                work=choices["ROWS"] * choices["KEYS"],
                note="further text" if add else "first tile of text",
            )
        )
    return cases
