"""Gradient clipping, AdamW, the rounded copy of the weights and their moving average, in one pass over flat tensors.

    g = gradient · min(1, max_norm / (norm + 1e-6))
    m = β₁ · m + (1 - β₁) · g,     v = β₂ · v + (1 - β₂) · g²
    master = master - lr · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)
    working = round(master),       average = decay · average + (1 - decay) · master

Replaces in training: what follows backward, element by element. AdamW is Loshchilov and Hutter's
(https://arxiv.org/abs/1711.05101) without weight decay, as Open-Sora 1.1 trains; the average is its EMA.

Where `norm` is not finite nothing changes, and no number is read back to find out. Limits: gradients and working
weights float32, float16 or bfloat16, all else float32. One program of the Triton kernel takes BLOCK parameters.

Bytes for each parameter with bfloat16 gradients and working weights: 18 read, 18 written; 68 to 72 without fusion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .checks import check_tensor
from .configurations import CompileCase, Configuration, candidates_of, select
from .dispatch import choose_backend
from .launch import ceil_divide, launch

NORM_EPSILON = tl.constexpr(1e-6)  # of torch.nn.utils.clip_grad_norm_

CONFIGURATIONS = {"adamw": {"any": (Configuration(BLOCK=1024, num_warps=4, num_stages=1),)}}


def adamw_reference(
    gradient: Tensor,
    norm: Tensor,
    step: Tensor,
    master: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    working: Tensor | None,
    average: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    max_norm: float | None,
    decay: float,
) -> None:
    finite = torch.isfinite(norm)
    gradient = gradient.to(torch.float32, copy=True)
    if max_norm is not None:
        gradient *= (max_norm / (norm + NORM_EPSILON.value)).clamp(max=1.0)
    torch_adamw(
        [master],
        [gradient],
        [first_moment],
        [second_moment],
        [],
        [step],
        fused=True,
        found_inf=(~finite).float(),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    if working is not None:
        working.copy_(master)
    if average is not None:
        moved = average.mul(decay).add_(master, alpha=1 - decay)
        average.copy_(torch.where(finite, moved, average))


@torch.no_grad()
def adamw(
    gradient: Tensor,
    norm: Tensor,
    step: Tensor,
    master: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    working: Tensor | None = None,
    average: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_norm: float | None = None,
    decay: float = 0.0,
    backend: str = "auto",
) -> None:
    """Takes one step of AdamW without weight decay, in place, unless `norm` is not finite.

    Args:
        gradient: [P], float32, float16 or bfloat16.
        norm: float32 [], the gradient's norm, on the device of all others; see `max_norm`.
        step: float32 [], steps taken before; one more afterwards.
        master: float32 [P], the weights.
        first_moment, second_moment: float32 [P], the running means of the gradient and of its square.
        working: [P] or None; receives the weights, rounded to its dtype.
        average: float32 [P] or None, the moving average of the weights.
        lr: learning rate.
        betas: decay rates of both moments.
        eps: added to the root of the second moment.
        max_norm: the gradient is scaled so that its norm is at most this; None does not clip.
        decay: of `average`.
        backend: "auto", "reference" or "triton"; "auto" is Triton on CUDA.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit, naming the argument.
    """
    check_tensor("adamw", "gradient", gradient, (None,), None)
    size = (gradient.numel(),)
    floats = {"norm": norm, "step": step, "master": master, "first_moment": first_moment}
    floats |= {"second_moment": second_moment, "average": average}
    for name, tensor in {**floats, "working": working}.items():
        if tensor is None:
            continue
        check_tensor("adamw", name, tensor, () if name in ("norm", "step") else size, gradient.device)
        if name in floats and tensor.dtype != torch.float32:
            raise ValueError(f"adamw: {name} is {tensor.dtype}, expected torch.float32")
        if not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} has strides {tensor.stride()}, but it must be contiguous")
    state = gradient.contiguous(), norm, step, master, first_moment, second_moment, working, average
    if choose_backend("adamw", backend, gradient, working) == "reference":
        adamw_reference(*state, lr=lr, betas=betas, eps=eps, max_norm=max_norm, decay=decay)
    else:
        _adamw_op(*state, lr, *betas, eps, max_norm, decay)


@triton.jit
def _adamw(
    gradient,  # [P]
    norm,  # float32 [1]
    corrections,  # float32 [2]: 1 - β₁ᵗ and 1 - β₂ᵗ
    master,  # float32 [P]
    first_moment,  # float32 [P]
    second_moment,  # float32 [P]
    working,  # [P] or None
    average,  # float32 [P] or None
    size,
    lr,
    beta1_rest,  # 1 - β₁
    beta2,
    beta2_rest,  # 1 - β₂
    eps,
    max_norm,  # infinite: no clipping
    decay,
    decay_rest,  # 1 - decay
    BLOCK: tl.constexpr,
):
    measured = tl.load(norm)
    if tl.abs(measured) < float("inf"):  # false for NaN, too
        coefficient = tl.minimum(max_norm / (measured + NORM_EPSILON), 1.0)
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size
        g = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32) * coefficient
        m = tl.load(first_moment + offsets, mask=inside, other=0.0)
        v = tl.load(second_moment + offsets, mask=inside, other=0.0)
        weight = tl.load(master + offsets, mask=inside, other=0.0)
        m += beta1_rest * (g - m)
        v = beta2 * v + beta2_rest * g * g
        root = tl.sqrt_rn(v) / tl.sqrt_rn(tl.load(corrections + 1)) + eps
        weight -= lr / tl.load(corrections) * m / root
        tl.store(first_moment + offsets, m, mask=inside)
        tl.store(second_moment + offsets, v, mask=inside)
        tl.store(master + offsets, weight, mask=inside)
        if working is not None:
            tl.store(working + offsets, weight.to(working.dtype.element_ty), mask=inside)
        if average is not None:
            mean = tl.load(average + offsets, mask=inside, other=0.0)
            tl.store(average + offsets, decay * mean + decay_rest * weight, mask=inside)


@torch.library.custom_op(
    "opensora_fast::adamw",
    mutates_args=("step", "master", "first_moment", "second_moment", "working", "average"),
)
def _adamw_op(
    gradient: Tensor,
    norm: Tensor,
    step: Tensor,
    master: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    working: Tensor | None,
    average: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float | None,
    decay: float,
) -> None:
    configuration = select(CONFIGURATIONS, "adamw", "any", gradient.device)
    # In float64, for 1 - β₂ᵗ is a small difference in the first steps.
    corrections = torch.stack([1 - beta ** (step.double() + 1) for beta in (beta1, beta2)]).float()
    launch(
        _adamw,
        (ceil_divide(gradient.numel(), configuration["BLOCK"]),),
        gradient,
        (
            gradient,
            norm,
            corrections,
            master,
            first_moment,
            second_moment,
            working,
            average,
            gradient.numel(),
            lr,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            float("inf") if max_norm is None else max_norm,
            decay,
            1 - decay,
        ),
        {
            **configuration.launch,
        },
    )
    step += torch.isfinite(norm)


def compile_cases(arch: str) -> list[CompileCase]:
    """Training in bfloat16, and in float32, where the weights are their own masters."""
    configuration = candidates_of(CONFIGURATIONS, "adamw", "any", arch)[0]
    numbers = ("lr", "beta1_rest", "beta2", "beta2_rest", "eps", "max_norm", "decay", "decay_rest")
    state = ("norm", "corrections", "master", "first_moment", "second_moment", "average")
    cases = []
    for dtype in ("bf16", "fp32"):
        signature = {name: "fp32" for name in numbers} | {name: "*fp32" for name in state}
        working = {"working": f"*{dtype}"} if dtype == "bf16" else {}
        cases.append(
            CompileCase(
                name="adamw",
                kernel=_adamw,
                signature=signature | {"gradient": f"*{dtype}", "size": "i32"} | working,
                constants={} if working else {"working": None},
                configuration=configuration,
                dtype=dtype,
                divisible_by_16=("size",),
                unit="element",
                work=configuration["BLOCK"],
            )
        )
    return cases
