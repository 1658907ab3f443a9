"""The Triton kernels of `gelu_tanh`, forward and backward.

With z = x + bias and u = sqrt(2/π) · (z + 0.044715 · z³), 0.5 · (1 + tanh(u)) is the sigmoid s of 2u, so

    y   = z · s
    d_x = d_y · (s + z · s · (1 - s) · 2 · sqrt(2/π) · (1 + 3 · 0.044715 · z²)),     d_bias = Σ d_x over tokens

which needs one exponential and keeps the relative precision of y for negative z, where 1 + tanh(u) loses it. A program
of the forward takes BLOCK_TOKENS tokens in a block of columns; one of the backward walks a tile of tokens in a block of
columns; its sum for d_bias stays in registers and goes to `partials [1, tiles, K]`, which `sum_tiles` adds up in a
fixed order: no atomics. Bytes for each element in bf16: forward 4, backward 6 and 8/t for the sums of a tile of t
tokens. Autograd keeps x, which the matrix product made.

Letters: N tokens, K channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.tiles import LOG2_E
from ..configurations import CompileCase, Configuration, candidates_of, select
from ..launch import ceil_divide, launch
from ..registration import contiguous
from .tile_sums import launch_sum_tiles

CONFIGURATIONS = {
    "gelu_tanh_forward": {
        "any": (
            Configuration(BLOCK_TOKENS=8, BLOCK_COLUMNS=512, num_warps=4, num_stages=1),
            Configuration(BLOCK_TOKENS=4, BLOCK_COLUMNS=512, num_warps=4, num_stages=1),
            Configuration(BLOCK_TOKENS=4, BLOCK_COLUMNS=512, num_warps=2, num_stages=1),
            Configuration(BLOCK_TOKENS=16, BLOCK_COLUMNS=512, num_warps=8, num_stages=1),
        ),
    },
    "gelu_tanh_backward": {
        "any": (
            Configuration(TILE_TOKENS=64, BLOCK_TOKENS=4, BLOCK_COLUMNS=512, STAGES=2, num_warps=4),
            Configuration(TILE_TOKENS=64, BLOCK_TOKENS=4, BLOCK_COLUMNS=512, STAGES=1, num_warps=4),
            Configuration(TILE_TOKENS=32, BLOCK_TOKENS=4, BLOCK_COLUMNS=512, STAGES=2, num_warps=4),
            Configuration(TILE_TOKENS=64, BLOCK_TOKENS=2, BLOCK_COLUMNS=512, STAGES=3, num_warps=2),
            Configuration(TILE_TOKENS=128, BLOCK_TOKENS=4, BLOCK_COLUMNS=512, STAGES=3, num_warps=4),
        ),
    },
}

_SLOPE = tl.constexpr(1.5957691216057308)  # 2 · sqrt(2/π)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid_of_2u(z):
    """Returns s and 1 - s, the latter as exp(-2u) · s, without the cancellation near s = 1; zero where s is zero."""
    exponent = z * (-LOG2_E * _SLOPE - LOG2_E * _SLOPE * _CUBIC * z * z)
    power = tl.exp2(exponent)
    sigmoid = 1.0 / (1.0 + power)
    return sigmoid, tl.minimum(power, 1e38) * sigmoid  # infinity times zero would be NaN


@triton.jit
def gelu_tanh_forward(
    x,  # [N, K]
    bias,  # [K] or None
    y,  # [N, K] out
    num_tokens,
    K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    columns = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    within = columns < K
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offsets = tokens[:, None] * K + columns[None, :]  # [tokens, columns]
    mask = (tokens < num_tokens)[:, None] & within[None, :]
    z = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    sigmoid, _ = _sigmoid_of_2u(z)
    tl.store(y + offsets, z * sigmoid, mask=mask)


@triton.jit
def gelu_tanh_backward(
    d_y,  # [N, K]
    x,  # [N, K]
    bias,  # [K] or None
    d_x,  # [N, K] out, or None
    partials,  # float32 [1, tiles, K] out, or None
    num_tokens,
    K: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    columns = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    within = columns < K
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    first = tile * TILE_TOKENS
    count = tl.minimum(num_tokens - first, TILE_TOKENS).to(tl.int32)
    added = tl.zeros([BLOCK_COLUMNS], tl.float32)
    if bias is not None:
        added = tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for step in tl.range(0, count, BLOCK_TOKENS, num_stages=STAGES):
        tokens = step + tl.arange(0, BLOCK_TOKENS)
        offsets = (first + tokens)[:, None] * K + columns[None, :]  # [tokens, columns]
        mask = (tokens < count)[:, None] & within[None, :]
        gradient = tl.load(d_y + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        sigmoid, rest = _sigmoid_of_2u(z)
        gradient *= sigmoid + z * sigmoid * rest * (_SLOPE + 3.0 * _SLOPE * _CUBIC * z * z)
        if d_x is not None:
            tl.store(d_x + offsets, gradient, mask=mask)
        sums += gradient
    if partials is not None:
        tl.store(partials + tile * K + columns, tl.sum(sums, axis=0), mask=within)


def launch_forward(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fills y [N, K], contiguous; x [N, K], bias [K]."""
    tokens, channels = x.shape
    configuration = select(CONFIGURATIONS, "gelu_tanh_forward", "any", x.device)
    blocks = ceil_divide(channels, configuration["BLOCK_COLUMNS"])
    launch(
        gelu_tanh_forward,
        (ceil_divide(tokens, configuration["BLOCK_TOKENS"]) * blocks,),
        x,
        (
            *contiguous(x, bias),
            y,
            tokens,
        ),
        {
            "K": channels,
            **configuration.launch,
        },
    )


def launch_backward(d_y: Tensor, x: Tensor, bias: Tensor | None, d_x: Tensor | None, d_bias: Tensor | None) -> None:
    """Fills d_x [N, K] and d_bias [K], contiguous, those that are not None."""
    tokens, channels = x.shape
    configuration = select(CONFIGURATIONS, "gelu_tanh_backward", "any", x.device)
    blocks = ceil_divide(channels, configuration["BLOCK_COLUMNS"])
    tiles = ceil_divide(tokens, configuration["TILE_TOKENS"])
    partials = None if d_bias is None else x.new_empty(1, tiles, channels, dtype=torch.float32)
    launch(
        gelu_tanh_backward,
        (tiles * blocks,),
        x,
        (
            *contiguous(d_y, x, bias),
            d_x,
            partials,
            tokens,
        ),
        {
            "K": channels,
            **configuration.launch,
        },
    )
    if partials is not None:
        launch_sum_tiles(partials, [], d_bias)


def compile_cases(arch: str) -> list[CompileCase]:
    """The MLP of hidden size 1152 (K = 4608) in each dtype, with its bias."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        arguments = {"x": f"*{dtype}", "bias": f"*{dtype}", "num_tokens": "i32"}
        for name, kernel, others in (
            ("gelu_tanh_forward", gelu_tanh_forward, {"y": f"*{dtype}"}),
            ("gelu_tanh_backward", gelu_tanh_backward, {"d_y": f"*{dtype}", "d_x": f"*{dtype}", "partials": "*fp32"}),
        ):
            configuration = candidates_of(CONFIGURATIONS, name, "any", arch)[0]
            cases.append(
                CompileCase(
                    name=name,
                    kernel=kernel,
                    signature=arguments | others,
                    constants={"K": 4608},
                    configuration=configuration,
                    dtype=dtype,
                    note="with bias",
                    unit="element",
                    work=configuration["BLOCK_TOKENS"] * configuration["BLOCK_COLUMNS"],
                )
            )
    return cases
