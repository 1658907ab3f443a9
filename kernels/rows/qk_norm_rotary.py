"""Triton kernels of `qk_norm_rotary`; the formulas are in qk_norm_rotary.

A program takes the queries, then the keys, of ROWS (token, head) pairs of one frame, whose rows of D lie side by side
in memory; all of them turn by the angles of that frame. Backward, with R the rotation, r the reciprocal RMS of the raw
row z (rotation keeps it) and g the gradient of y,

    dz = r · (R⁻¹ (weight · g) - z · r² · mean(R⁻¹ (weight · g) · z))        dweight = Σ g · R(z) · r

Each program writes its part of both sums to a row of its own; the rows are summed afterwards.

Bytes for each token: 8·H·D forward, 12·H·D backward (half precision), the least possible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.rotary_tiles import load_angles, reciprocal_rms_apart, rotate, rotate_back, subtract_along
from ..attention.tiles import (
    column_sums,
    load_head,
    load_weight,
    multiply,
    scale_rows_apart,
    store_head,
    store_vector,
    to_float32,
)
from ..configurations import CompileCase, Configuration, select
from ..launch import ceil_divide, launch
from ..registration import contiguous

CONFIGURATIONS = {
    name: {"any": (Configuration(ROWS=64, num_warps=4, num_stages=1),)}
    for name in ("qk_norm_rotary_forward", "qk_norm_rotary_backward")
}


@triton.jit
def _rows(tiles, position, HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of the program's rows, whether they are inside the tile, and the tile's frame as [1]."""
    BLOCKS: tl.constexpr = (TOKENS * HEADS + ROWS - 1) // ROWS
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program // BLOCKS * 3
    row = (program % BLOCKS).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(tile + 1) * HEADS
    frame = tl.load(position + tl.load(tile + 2))
    return tl.load(tile).to(tl.int64) + row // HEADS, (row % HEADS).to(tl.int64), inside, frame + tl.arange(0, 1)


@triton.jit
def _forward(
    q,
    k,
    q_weight,  # [D] or None
    k_weight,
    cos,  # float32 [T, D/2] or None
    sin,
    tiles,  # int32 [tiles, 3]
    position,  # int32 [F]
    q_output,  # [N, H, D]
    k_output,
    eps,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, head, inside, frame = _rows(tiles, position, HEADS, TOKENS, ROWS)
    source = token * TOKEN_STRIDE + head * HEAD_STRIDE
    target = token * HEADS + head
    if cos is not None:
        angles = load_angles(cos, sin, frame, HEAD_SIZE)  # [1, D/2]
    for keys in tl.static_range(2):
        z = to_float32(load_head(k if keys else q, source, inside, 1, HEAD_SIZE))  # [ROWS, D]
        y = z
        if cos is not None:
            y = rotate(z, angles)
        if q_weight is not None:
            y = scale_rows_apart(y, reciprocal_rms_apart(z, eps, HEAD_SIZE))
            y = multiply(y, load_weight(k_weight if keys else q_weight, HEAD_SIZE))
        store_head(k_output if keys else q_output, y, target, inside, HEAD_SIZE, HEAD_SIZE)


@triton.jit
def _backward(
    q_output_gradient,  # [N, H, D]
    k_output_gradient,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    tiles,
    position,
    q_gradient,  # [N, H, D] out
    k_gradient,
    partials,  # float32 [2, programs, D] out, or None
    eps,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, head, inside, frame = _rows(tiles, position, HEADS, TOKENS, ROWS)
    source = token * TOKEN_STRIDE + head * HEAD_STRIDE
    target = token * HEADS + head
    if cos is not None:
        angles = load_angles(cos, sin, frame, HEAD_SIZE)  # [1, D/2]
    for keys in tl.static_range(2):
        g = load_head(k_output_gradient if keys else q_output_gradient, target, inside, HEAD_SIZE, HEAD_SIZE)
        g = to_float32(g)  # [ROWS, D]
        if q_weight is not None:
            z = to_float32(load_head(k if keys else q, source, inside, 1, HEAD_SIZE))
            reciprocal = reciprocal_rms_apart(z, eps, HEAD_SIZE)
            g = scale_rows_apart(g, reciprocal)
            if partials is not None:
                products = z
                if cos is not None:
                    products = rotate(z, angles)
                products = multiply(products, g)
                part = partials + (keys * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * HEAD_SIZE
                store_vector(part, column_sums(products), HEAD_SIZE)
            g = multiply(g, load_weight(k_weight if keys else q_weight, HEAD_SIZE))
        if cos is not None:
            g = rotate_back(g, angles)
        if q_weight is not None:
            g = subtract_along(g, z, reciprocal, HEAD_SIZE)
        store_head(k_gradient if keys else q_gradient, g, target, inside, HEAD_SIZE, HEAD_SIZE)


def _in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with equal strides that sixteen-byte loads can follow; copies only where they have none."""
    strides = q.stride()
    if strides != k.stride() or strides[2] != 1 or strides[0] % 8 or strides[1] % 8:
        return q.contiguous(), k.contiguous()
    return q, k


def _sizes(q: Tensor, tokens: int) -> dict[str, int]:
    _, heads, head_size = q.shape
    return {
        "TOKEN_STRIDE": q.stride(0),
        "HEAD_STRIDE": q.stride(1),
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "TOKENS": tokens,
    }


def launch_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    tiles: Tensor,
    tile_tokens: int,
    position: Tensor,
    q_output: Tensor,
    k_output: Tensor,
    eps: float,
) -> None:
    """Writes the contiguous outputs [N, H, D]. `tiles` are `layout.frame_tiles(tile_tokens)`."""
    q, k = _in_place(q, k)
    configuration = select(CONFIGURATIONS, "qk_norm_rotary_forward", "any", q.device)
    blocks = ceil_divide(tile_tokens * q.shape[1], configuration["ROWS"])
    launch(
        _forward,
        (tiles.shape[0] * blocks,),
        q,
        (
            q,
            k,
            *contiguous(q_weight, k_weight, cos, sin),
            tiles,
            position,
            q_output,
            k_output,
            eps,
        ),
        {
            **_sizes(q, tile_tokens),
            **configuration.launch,
        },
    )


def launch_backward(
    q_output_gradient: Tensor,
    k_output_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    tiles: Tensor,
    tile_tokens: int,
    position: Tensor,
    q_gradient: Tensor,
    k_gradient: Tensor,
    eps: float,
    wants_weights: bool,
) -> Tensor | None:
    """Writes the contiguous gradients [N, H, D] of q and k; returns those of the weights, float32 [2, D], if wanted."""
    q, k = _in_place(q, k)
    configuration = select(CONFIGURATIONS, "qk_norm_rotary_backward", "any", q.device)
    programs = tiles.shape[0] * ceil_divide(tile_tokens * q.shape[1], configuration["ROWS"])
    partials = None
    if wants_weights:
        partials = torch.empty(2, programs, q.shape[2], dtype=torch.float32, device=q.device)
    launch(
        _backward,
        (programs,),
        q,
        (
            q_output_gradient.contiguous(),
            k_output_gradient.contiguous(),
            q,
            k,
            *contiguous(q_weight, k_weight, cos, sin),
            tiles,
            position,
            q_gradient,
            k_gradient,
            partials,
            eps,
        ),
        {
            **_sizes(q, tile_tokens),
            **configuration.launch,
        },
    )
    return None if partials is None else partials.sum(dim=1)


def compile_cases(arch: str) -> list[CompileCase]:
    return [_compile_case(name, kernel) for name, kernel in (("forward", _forward), ("backward", _backward))]


def _compile_case(direction: str, kernel: object) -> CompileCase:
    """q and k as views of qkv at 16 heads."""
    name = f"qk_norm_rotary_{direction}"
    outputs = {
        "forward": {"q_output": "*bf16", "k_output": "*bf16"},
        "backward": {"partials": "*fp32"}
        | dict.fromkeys(("q_output_gradient", "k_output_gradient", "q_gradient", "k_gradient"), "*bf16"),
    }
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=dict.fromkeys(("q", "k", "q_weight", "k_weight"), "*bf16")
        | {"cos": "*fp32", "sin": "*fp32", "tiles": "*i32", "position": "*i32", "eps": "fp32"}
        | outputs[direction],
        constants={"TOKEN_STRIDE": 3456, "HEAD_STRIDE": 72, "HEADS": 16, "HEAD_SIZE": 72, "TOKENS": 16},
        configuration=CONFIGURATIONS[name]["any"][0],
        dtype="bf16",
    )
