"""Triton kernel of cross-attention, forward. The formulas and the public function are in cross_attention.

One program computes ROWS tokens of one head of one video, looping over the text of that video, whose length only the
device knows. There is no QK-norm, so the softmax keeps a running maximum. Short texts have a kernel of their own,
see cross_short_forward.

Per call: 4·L·H·D FLOPs and 4·H·D bytes (half precision) for each video token; the text comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import launch
from .builds import attention_case
from .cross_short_forward import class_of_text, launch_short_forward, short_compile_cases
from .cross_tiles import load_rows_and_text
from .loops import NO_NORM, attend
from .tables import row_tiles
from .tiles import LOG2_E, load_head, store_head

# Of texts of any length; 128 registers a thread: sixteen warps fit on a multiprocessor.
LOOPS = (
    Configuration(ROWS=128, STEP=64, REMAINDER=32, maxnreg=128, num_warps=8, num_stages=2),
    Configuration(ROWS=128, STEP=64, REMAINDER=32, maxnreg=255, num_warps=4, num_stages=2),
    Configuration(ROWS=64, STEP=64, REMAINDER=32, maxnreg=168, num_warps=4, num_stages=2),
    Configuration(ROWS=64, STEP=64, REMAINDER=16, maxnreg=128, num_warps=4, num_stages=2),
)
CONFIGURATIONS = {
    "cross_attention_forward": {
        # Those with `programs`, which fit on a multiprocessor, are of cross_short_forward.
        "text of one tile": (
            Configuration(ROWS=64, programs=3, num_warps=4, num_stages=2),
            Configuration(ROWS=64, programs=2, num_warps=4, num_stages=3),
            Configuration(ROWS=128, programs=2, maxnreg=128, num_warps=8, num_stages=2),
            *LOOPS,
        ),
        "text of two tiles": (Configuration(ROWS=64, programs=2, num_warps=4, num_stages=2),),
        "any": LOOPS,
        "any@sm_80": (
            Configuration(ROWS=128, STEP=64, REMAINDER=16, num_warps=8, num_stages=2),
            Configuration(ROWS=64, STEP=32, REMAINDER=16, maxnreg=255, num_warps=4, num_stages=2),
        ),
        "float32": (Configuration(ROWS=32, STEP=32, REMAINDER=16, maxnreg=255, num_warps=8, num_stages=1),),
    },
}


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    q,  # [N, H, D]
    kv,  # [M, 2, H, D]
    output,  # [N, H, D] out
    log_sums,  # float32 [H, N] out
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
    head, first_token, rest, keys, text_length = load_rows_and_text(
        tiles, kv, text_starts, text_lengths, HEADS, HEAD_SIZE
    )
    rows = tl.arange(0, ROWS)
    inside = rows < rest

    in_tokens = first_token * TOKEN_STRIDE + head * HEAD_SIZE
    result, log_sum = attend(
        load_head(q + in_tokens, rows, inside, TOKEN_STRIDE, HEAD_SIZE),  # [ROWS, D]
        keys,
        keys + HEADS * HEAD_SIZE,
        None,
        False,
        text_length,
        0.0,
        STEP=STEP,
        REMAINDER=REMAINDER,
        NORM=NO_NORM,
        SCALE=LOG2_E / HEAD_SIZE**0.5,
        BOUNDED=False,
        KEY_STRIDE=TEXT_STRIDE,
        VALUE_STRIDE=TEXT_STRIDE,
        HEAD_SIZE=HEAD_SIZE,
    )
    tl.store(log_sums + head * num_tokens + first_token + rows, log_sum, mask=inside)
    store_head(output + in_tokens, result, rows, inside, TOKEN_STRIDE, HEAD_SIZE)


def shape_class(tensor: Tensor) -> str:
    """float32 on a GPU multiplies outside the matrix units, with tiles to suit."""
    return "float32" if tensor.is_cuda and tensor.dtype == torch.float32 else "any"


def launch_forward(
    q: Tensor,
    kv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    text_starts: Tensor,
    text_lengths: Tensor,
    max_length: int,
    runs: list[int],
) -> None:
    """Fills output [N, H, D] and log_sums float32 [H, N]: log2 of the sum of exp2(scores), 0 without text.

    q [N, H, D] and kv [M, 2, H, D] must be contiguous.
    """
    num_tokens, heads, head_size = q.shape
    size = class_of_text(q, max_length) or shape_class(q)
    configuration = select(CONFIGURATIONS, "cross_attention_forward", size, q.device)
    if "programs" in configuration.choices:
        launch_short_forward(q, kv, output, log_sums, text_starts, text_lengths, max_length, runs, configuration)
        return
    tiles = row_tiles(tuple(runs), configuration["ROWS"], q.device)
    launch(
        _forward,
        (tiles.shape[0] * heads,),
        q,
        (
            q,
            kv,
            output,
            log_sums,
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


def compile_cases(arch: str) -> list[CompileCase]:
    short = CONFIGURATIONS["cross_attention_forward"]
    defaults = {1: short["text of one tile"][0], 2: short["text of two tiles"][0]}
    cases = short_compile_cases(defaults) if arch == "sm_90" else []
    for dtype, size in (("bf16", "any"), ("fp16", "any"), ("fp32", "float32")):
        configuration = candidates_of(CONFIGURATIONS, "cross_attention_forward", size, arch)[0]
        work = configuration["ROWS"] * configuration["STEP"]
        cases.append(attention_case("cross_attention_forward", _forward, configuration, dtype, {}, work=work))
    return cases
