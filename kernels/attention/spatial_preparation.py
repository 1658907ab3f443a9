"""Triton kernel that prepares keys and values for spatial attention in frames too long to norm keys on their way.

    prepared keys = k · r_k, rounded to the input's dtype; r_k is the reciprocal RMS, which the forward pass keeps in
    statistics[2]

Where `loops.is_folded`, keys and values are copied as padded rows with factors beside each head: all keys,
then all values, each as `tiles.padded_rows` finds them. Otherwise keys alone are prepared, [N, H, D].

One program prepares ROWS tokens of one head. It runs before the forward pass, and again before the backward pass, which
takes less memory than keeping its rows.

Bytes for each token (half precision): 4·H·D read, 4·H·row_width written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import ceil_divide, launch
from .loops import NORM_DONE, is_folded
from .tiles import (
    append_factors,
    load_head,
    padded_rows,
    reciprocal_rms,
    row_width,
    scale_rows,
    store_head,
    to_float32,
)

CONFIGURATIONS = {
    "spatial_attention_preparation": {
        "any": (Configuration(ROWS=64, num_warps=4, num_stages=1), Configuration(ROWS=128, num_warps=4, num_stages=1)),
    },
}


@triton.jit
def padded_values(prepared, head, num_tokens, first_token, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """`padded_rows` of the values, which lie behind those of the keys."""
    size = num_tokens.to(tl.int64) * (HEADS * row_width(HEAD_SIZE))
    return padded_rows(prepared + size, head, num_tokens, first_token, HEADS, HEAD_SIZE)


@triton.jit
def place_of_keys_and_values(
    qkv, prepared, head, num_tokens, first_token, NORM: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    """(keys, values): where one head's rows begin, from `first_token` (int64) on, as `load_head` takes them.

    With NORM_DONE the keys are the prepared ones; where `is_folded`, both are pairs of pointers to prepared rows.
    """
    if is_folded(NORM, HEAD_SIZE):
        keys = padded_rows(prepared, head, num_tokens, first_token, HEADS, HEAD_SIZE)
        values = padded_values(prepared, head, num_tokens, first_token, HEADS, HEAD_SIZE)
    else:
        frame = qkv + first_token * (3 * HEADS * HEAD_SIZE) + head * HEAD_SIZE
        keys = frame + HEADS * HEAD_SIZE
        if NORM == NORM_DONE:
            keys = prepared + first_token * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
        values = frame + 2 * HEADS * HEAD_SIZE
    return keys, values


@triton.jit(do_not_specialize=["num_tokens"])
def _prepare(
    qkv,  # [N, 3, H, D]
    prepared,  # out, as `launch_preparation` says
    statistics,  # float32 [3, H, N] out: the last of the three; or None
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    FOLDED: tl.constexpr = is_folded(NORM_DONE, HEAD_SIZE)
    OUTPUT_STRIDE: tl.constexpr = HEADS * HEAD_SIZE
    TOKEN_STRIDE: tl.constexpr = 3 * HEADS * HEAD_SIZE
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    token = program // HEADS * ROWS
    rows = tl.arange(0, ROWS)
    inside = rows < num_tokens - token
    keys = qkv + token * TOKEN_STRIDE + (HEADS + head) * HEAD_SIZE
    k = load_head(keys, rows, inside, TOKEN_STRIDE, HEAD_SIZE)  # [ROWS, D]
    factors = reciprocal_rms(k, eps, HEAD_SIZE)
    if statistics is not None:
        tl.store(statistics + (2 * HEADS + head) * num_tokens + token + rows, factors, mask=inside)
    normed = scale_rows(to_float32(k), factors)
    if FOLDED:
        normed = append_factors(normed, HEAD_SIZE)
        places = padded_rows(prepared, head, num_tokens, token, HEADS, HEAD_SIZE)
        store_head(places, normed, rows, inside, None, HEAD_SIZE, FOLDED)
        v = load_head(keys + OUTPUT_STRIDE, rows, inside, TOKEN_STRIDE, HEAD_SIZE)
        places = padded_values(prepared, head, num_tokens, token, HEADS, HEAD_SIZE)
        store_head(places, append_factors(v, HEAD_SIZE), rows, inside, None, HEAD_SIZE, FOLDED)
    else:
        place = prepared + token * OUTPUT_STRIDE + head * HEAD_SIZE
        store_head(place, normed, rows, inside, OUTPUT_STRIDE, HEAD_SIZE)


def launch_preparation(qkv: Tensor, statistics: Tensor | None, eps: float) -> Tensor:
    """Returns what is prepared, in the dtype of qkv [N, 3, H, D]; fills statistics[2] (float32 [3, H, N]), if given.

    Where `is_folded` that is [2, N · H · row_width], the padded rows of keys and of values, else the keys [N, H, D].
    """
    num_tokens, _, heads, head_size = qkv.shape
    folded = is_folded(NORM_DONE, head_size)
    sizes = (2, num_tokens * heads * row_width(head_size)) if folded else (num_tokens, heads, head_size)
    prepared = qkv.new_empty(sizes)
    configuration = select(CONFIGURATIONS, "spatial_attention_preparation", "any", qkv.device)
    launch(
        _prepare,
        (ceil_divide(num_tokens, configuration["ROWS"]) * heads,),
        qkv,
        (
            qkv,
            prepared,
            statistics,
            num_tokens,
            eps,
        ),
        {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            **configuration.launch,
        },
    )
    return prepared


def compile_cases(arch: str) -> list[CompileCase]:
    configuration = candidates_of(CONFIGURATIONS, "spatial_attention_preparation", "any", arch)[0]
    return [
        CompileCase(
            name="spatial_attention_preparation",
            kernel=_prepare,
            signature=dict.fromkeys(("qkv", "prepared"), f"*{dtype}")
            | {"statistics": "*fp32", "num_tokens": "i32", "eps": "fp32"},
            constants={"HEADS": 16, "HEAD_SIZE": 72} | ({"statistics": None} if note else {}),
            configuration=configuration,
            dtype=dtype,
            unit="element",
            work=configuration["ROWS"] * 72,
            note=note,
        )
        for note in ("", "backward")
        for dtype in ("bf16", "fp16", "fp32")
    ]
