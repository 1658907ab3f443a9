"""Triton kernel of cross-attention, backward, for short texts: every gradient in one pass over the video's tokens.

One program walks over a chunk of a video's tokens for one head and one tile of KEYS text tokens, which stay on chip:
five matrix products and one exponential for each score, where queries and text apart take seven and two. With the
letters of cross_backward, each step of ROWS tokens gives

    δ = rowsum(g · output)        dQ = dS · K / sqrt(D)        dK += dSᵀ · Q / sqrt(D)        dV += Pᵀ · g

dK and dV of the chunk become float32 partial sums, which the kernel of the chunks adds up; the bias of the queries gets
Σ dQ. The last four columns of the head's tail must be padding.

What a text has beyond the first tile takes one more launch, which adds to the gradient of the queries as the one before
wrote it, rounded to its dtype; its programs have no steps where a text ends before.

Per call: 10·L·H·D FLOPs and 8·H·D bytes (half precision) for each video token, 10·H·D more for each launch after the
first; and 8·L·H·D bytes of sums for each chunk, which its kernel reads again.
"""

from __future__ import annotations

import torch
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
    append_factors,
    append_number,
    dot_rows,
    load_head,
    load_numbers,
    mark_column,
    row_products,
    row_width,
    scale_head,
    set_column,
    store_column_sums,
    store_head,
    to_float32,
    zero_head,
)

# two_passes=1 are the kernels of cross_backward. Sums and scores fill the registers, so that one program of eight
# warps fits on a multiprocessor. With two stages it reads the rows of the next step only when a step is over, with more
# during it.
ONE_PASS = tuple(
    Configuration(ROWS=64, KEYS=128, two_passes=0, num_warps=8, num_stages=num_stages) for num_stages in (3, 4, 2)
)
TWO_PASSES = Configuration(two_passes=1)
CONFIGURATIONS = {
    "cross_attention_short_backward": {
        "text of one tile": (*ONE_PASS, TWO_PASSES),
        "text of two tiles": ONE_PASS[:1],
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
    """For the text tokens from `first_text` on. Rows of `partials` beyond a video's text are not written.

    ADD: to what is in q_gradient, unless the text ends before.
    """
    TOKEN_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TEXT_STRIDE: tl.constexpr = 2 * HEADS * HEAD_SIZE
    SCALE: tl.constexpr = 1.0 / HEAD_SIZE**0.5
    head, first_token, rest, keys, text_length = load_rows_and_text(
        chunks, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    length = tl.minimum(chunk_tokens, rest)
    if ADD:
        length = tl.where(first_text < text_length, length, 0)
    scale = tl.where(text_length > 1, SCALE, 0.0)  # a lone key has probability one: nothing moves it

    text = first_text + tl.arange(0, KEYS)
    real = text < text_length
    k = load_head(keys, text, real, TEXT_STRIDE, HEAD_SIZE)  # [KEYS, D]
    v = load_head(keys + HEADS * HEAD_SIZE, text, real, TEXT_STRIDE, HEAD_SIZE)
    # The matrix units subtract log-sums and δ: queries and g carry them in their padding, keys and values the factors.
    # In the last column are ones, and of the keys what makes the scores beyond the text -inf.
    padded_v = append_factors(v, HEAD_SIZE)
    in_ones = mark_column(row_width(HEAD_SIZE) - 1, HEAD_SIZE)
    padded_k = set_column(append_factors(k, HEAD_SIZE), in_ones, tl.where(real, 0.0, float("-inf"))[:, None])
    # Offsets within a video may pass 2^31 elements, those within a chunk do not.
    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    statistics = log_sums + head * num_tokens + first_token
    key_sums = zero_head(KEYS, HEAD_SIZE)
    value_sums = zero_head(KEYS, HEAD_SIZE)
    bias_sums = zero_head(ROWS, HEAD_SIZE)
    # Those of the next step wait in registers, as float32: they would go to shared memory and back to be laid out.
    rows = tl.arange(0, ROWS)
    outputs = to_float32(load_head(output + in_tokens, rows, rows < length, TOKEN_STRIDE, HEAD_SIZE))
    for start in tl.range(0, length, ROWS):
        # Rows beyond the end are zero in q, g and output, and so in all sums; their probabilities are one.
        rows = start + tl.arange(0, ROWS)
        inside = rows < length
        queries = load_head(q + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
        log_sum = load_numbers(statistics, rows, inside, 0.0)
        padded_queries = append_number(queries, log_sum * (-1.0 / (SCALE * LOG2_E)), HEAD_SIZE)
        padded_queries = set_column(padded_queries, in_ones, 1.0)
        g = load_head(output_gradient + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        padded_g = append_number(g, -row_products(outputs, g), HEAD_SIZE)
        probabilities = tl.exp2(dot_rows(padded_k, padded_queries) * (SCALE * LOG2_E))  # [KEYS, ROWS]
        score_gradient = (dot_rows(padded_v, padded_g) * probabilities).to(k[0].dtype)
        next_rows = rows + ROWS
        outputs = load_head(output + in_tokens, next_rows, next_rows < length, TOKEN_STRIDE, HEAD_SIZE)
        outputs = to_float32(outputs)
        # In this order nothing spills, and the first two products run while the gradient is laid out for the third.
        key_sums = add_product(key_sums, score_gradient, queries)
        value_sums = add_product(value_sums, probabilities.to(g[0].dtype), g)
        sums = add_product(zero_head(ROWS, HEAD_SIZE), tl.trans(score_gradient), k)  # [ROWS, D]
        sums = scale_head(sums, scale)
        bias_sums = bias_sums[0] + sums[0], bias_sums[1] + sums[1]
        if ADD:
            before = to_float32(load_head(q_gradient + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE))
            sums = sums[0] + before[0], sums[1] + before[1]
        store_head(q_gradient + in_tokens, sums, rows, inside, TOKEN_STRIDE, HEAD_SIZE)

    partial = partials + tl.program_id(0).to(tl.int64) // HEADS * max_length * TEXT_STRIDE + head * HEAD_SIZE
    store_head(partial, scale_head(key_sums, scale), text, real, TEXT_STRIDE, HEAD_SIZE)
    store_head(partial + HEADS * HEAD_SIZE, value_sums, text, real, TEXT_STRIDE, HEAD_SIZE)
    if bias_partials is not None:
        store_column_sums(bias_partials, bias_sums, None, HEAD_SIZE)


def launch_short_backward(
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
    configuration: Configuration,
) -> Tensor | None:
    """Fills q_gradient and partials float32 [chunks, max_length, 2·H·D]; returns those of the bias, if wanted."""
    num_tokens, heads, head_size = q.shape
    firsts = range(0, max(max_length, 1), configuration["KEYS"])
    shape = len(firsts), chunks.shape[0], heads * head_size
    bias_partials = q.new_empty(shape, dtype=torch.float32) if wants_bias else None
    for number, first_text in enumerate(firsts):
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
                None if bias_partials is None else bias_partials[number],
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
                **configuration.launch,
            },
        )
    return None if bias_partials is None else bias_partials.flatten(0, 1)


def compile_cases(arch: str) -> list[CompileCase]:
    if arch != "sm_90":
        return []
    configuration = ONE_PASS[0]
    return [
        attention_case(
            "cross_attention_short_backward",
            _backward,
            configuration,
            dtype,
            {"ADD": add},
            work=configuration["ROWS"] * configuration["KEYS"],
            note="further text" if add else "first tile of text",
        )
        for dtype in ("bf16", "fp16")
        for add in (False, True)
    ]
