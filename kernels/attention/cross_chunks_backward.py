"""Triton kernel of cross-attention, backward: adds up what the chunks of a video gave each token of its text.

A video has up to 10^5 tokens for at most a few hundred text tokens: chunks make enough programs to fill the GPU. Here
one program adds up, in float32, COLUMNS numbers of one text token, in the order of the chunks and without atomics.

Per call: 8·L·H·D bytes for each chunk. Letters as in cross_attention.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import ceil_divide, launch

CONFIGURATIONS = {
    "cross_attention_chunks_backward": {
        "any": (Configuration(COLUMNS=256, num_warps=2, num_stages=2),),
    },
}


@triton.jit(do_not_specialize=["max_length"])
def _chunks(
    partials,  # float32 [chunks, max_length, 2, H, D]
    kv_gradient,  # [M, 2, H, D] out
    chunk_ranges,  # int32 [B, 2]
    text_starts,  # int32 [B]
    text_lengths,  # int32 [B]
    max_length,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (B · max_length, blocks of columns); WIDTH = 2·H·D."""
    row = tl.program_id(0) % max_length
    video = tl.program_id(0) // max_length
    if row >= tl.load(text_lengths + video):
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    first_chunk = tl.load(chunk_ranges + video * 2).to(tl.int64)
    pointers = partials + (first_chunk * max_length + row) * WIDTH + columns
    chunk_stride = tl.full([], WIDTH, tl.int64) * max_length
    sums = tl.zeros([COLUMNS], tl.float32)
    for _ in range(tl.load(chunk_ranges + video * 2 + 1)):
        sums += tl.load(pointers, mask=inside, other=0.0)
        pointers += chunk_stride
    token = tl.load(text_starts + video).to(tl.int64) + row
    tl.store(kv_gradient + token * WIDTH + columns, sums.to(kv_gradient.dtype.element_ty), mask=inside)


def launch_chunks(
    partials: Tensor, kv_gradient: Tensor, chunk_ranges: Tensor, text_starts: Tensor, text_lengths: Tensor
) -> None:
    """Writes the rows of real text of kv_gradient [M, 2, H, D] from partials float32 [chunks, L, 2·H·D].

    Args:
        chunk_ranges: int32 [B, 2], the first chunk of each video and how many it has.
    """
    _, max_length, width = partials.shape
    configuration = select(CONFIGURATIONS, "cross_attention_chunks_backward", "any", partials.device)
    launch(
        _chunks,
        (text_lengths.shape[0] * max_length, ceil_divide(width, configuration["COLUMNS"])),
        partials,
        (
            partials,
            kv_gradient,
            chunk_ranges,
            text_starts,
            text_lengths,
            max_length,
        ),
        {
            "WIDTH": width,
            **configuration.launch,
        },
    )


def compile_cases(arch: str) -> list[CompileCase]:
    return [
        CompileCase(
            name="cross_attention_chunks_backward",
            kernel=_chunks,
            signature={"partials": "*fp32", "kv_gradient": f"*{dtype}", "max_length": "i32"}
            | dict.fromkeys(("chunk_ranges", "text_starts", "text_lengths"), "*i32"),
            constants={"WIDTH": 2 * 16 * 72},
            configuration=candidates_of(CONFIGURATIONS, "cross_attention_chunks_backward", "any", arch)[0],
            dtype=dtype,
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
