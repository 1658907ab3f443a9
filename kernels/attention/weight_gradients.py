"""Triton kernel for the gradients of a QK-norm's weights, behind a backward pass that leaves parts of G, see there:

    dq_weight = k_weight · Σ G[h]          dk_weight = q_weight · Σ G[h]          sums over the heads h

`rows.tile_sums` adds up the tiles beforehand, with all heads side by side: 36 programs for 16 heads of 72, where the
columns of one head alone would make three.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configurations import CompileCase, Configuration
from ..launch import launch

CONFIGURATION = Configuration(num_warps=4, num_stages=1)


@triton.jit
def weight_gradients(
    sums,  # float32 [H, D]: G of each head
    q_weight,  # [D]
    k_weight,
    q_weight_gradient,  # [D] out
    k_weight_gradient,  # [D] out
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    heads = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    columns = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    within = columns < HEAD_SIZE
    parts = tl.load(sums + heads * HEAD_SIZE + columns, mask=(heads < HEADS) & within, other=0.0)
    total = tl.sum(parts, axis=0)
    for_q = total * tl.load(k_weight + columns, mask=within, other=0.0).to(tl.float32)
    for_k = total * tl.load(q_weight + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(q_weight_gradient + columns, for_q, mask=within)
    tl.store(k_weight_gradient + columns, for_k, mask=within)


def launch_weight_gradients(
    sums: Tensor, q_weight: Tensor, k_weight: Tensor, q_weight_gradient: Tensor, k_weight_gradient: Tensor
) -> None:
    """Fills the gradients of both weights [D] from G of each head, float32 [H, D]. All must be contiguous."""
    heads, head_size = sums.shape
    launch(
        weight_gradients,
        (1,),
        sums,
        (sums, q_weight, k_weight, q_weight_gradient, k_weight_gradient),
        {"HEADS": heads, "HEAD_SIZE": head_size, **CONFIGURATION.launch},
    )


def compile_cases(arch: str) -> list[CompileCase]:
    return [
        CompileCase(
            name="weight_gradients",
            kernel=weight_gradients,
            signature={key: "*bf16" for key in weight_gradients.arg_names if not key.isupper()} | {"sums": "*fp32"},
            constants={"HEADS": 16, "HEAD_SIZE": 72},
            configuration=CONFIGURATION,
            dtype="bf16",
        )
    ]
