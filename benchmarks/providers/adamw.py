"""Every implementation of an optimizer step that this machine may have, from the same gradients: what follows backward.

A step takes the gradients as backward leaves them, one tensor for each parameter; it clips them to a global norm, moves
float32 master weights by AdamW without weight decay, rounds them into the working weights and moves their average. In
float32 the weights are their own masters. The flat tensors of `ours` and the lists of the others are the same memory:
each tensor of a list is a part of a flat one, contiguous and aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.adamw import adamw

from opensora_fast import kernels
from opensora_fast.train.optimizer.gradients import measure_norm
from opensora_fast.train.optimizer.master_adamw import BETAS, EPSILON

from ..measuring.provider import (
    Bound,
    Provider,
    compiled,
    compiles_on_cuda,
    needs_cuda,
    needs_module,
    own_version,
    version_of,
)
from .adamw_work import (
    EMA_DECAY,
    LEARNING_RATE,
    MAX_NORM,
    NORM_EPSILON,
    STATE,
    STEPS_BEFORE,
    AdamWWork,
)
from .elementwise import APEX

Tensors = list[Tensor]


# ---- one tensor after another ----


def _prepare_upstream(work: AdamWWork) -> Bound:
    """As Open-Sora 1.1's trainer: ColossalAI's LowLevelZero on one GPU, with AdamW in eager PyTorch, then the average.

    It takes the norm of each gradient by itself and asks the GPU whether to clip.
    """
    lists = _Lists.of(work)
    optimizer = _torch_adamw(lists, foreach=False)

    @torch.no_grad()
    def step() -> Tensor:
        wide = lists.masters[0].dtype
        for master, gradient in zip(lists.masters, lists.gradients, strict=True):
            master.grad = gradient.to(wide, copy=True)
        norm = torch.stack([master.grad.norm() for master in lists.masters]).square().sum().sqrt()
        clip = (norm.item() + NORM_EPSILON) / MAX_NORM
        if clip > 1:
            for master in lists.masters:
                master.grad.mul_(1 / clip)
        optimizer.step()
        for master in lists.masters:
            master.grad = None
        for working, master in zip(lists.working, lists.masters, strict=bool(lists.working)):
            working.copy_(master)
        for average, master in zip(lists.averages, lists.masters, strict=True):
            average.mul_(EMA_DECAY).add_(master, alpha=1 - EMA_DECAY)
        return norm

    return step


# ---- lists of tensors, many in a launch ----


@dataclass(frozen=True)
class _Lists:
    """Gradients and state, one tensor for each parameter; `working` is [] where the masters are the weights."""

    gradients: Tensors
    masters: Tensors
    first_moments: Tensors
    second_moments: Tensors
    averages: Tensors
    working: Tensors

    @staticmethod
    def of(work: AdamWWork) -> _Lists:
        return _Lists(*(list(work.tensors(name).values()) for name in ("gradient", *STATE, "working")))


def _prepare_with(make_optimizer: Callable[[_Lists], Any]) -> Callable[[AdamWWork], Bound]:
    """A step with an optimizer on float32 gradients and masters; all that is around it in launches for all tensors."""

    def prepare(work: AdamWWork) -> Bound:
        lists = _Lists.of(work)
        optimizer = make_optimizer(lists)

        @torch.no_grad()
        def step() -> Tensor:
            # New ones in float32, too: who clips them may not change those of the next step.
            gradients = [torch.empty_like(master) for master in lists.masters]
            torch._foreach_copy_(gradients, lists.gradients)
            for master, gradient in zip(lists.masters, gradients, strict=True):
                master.grad = gradient
            norm = clip_grad_norm_(lists.masters, MAX_NORM, foreach=True)
            optimizer.step()
            for master in lists.masters:
                master.grad = None
            if lists.working:
                torch._foreach_copy_(lists.working, lists.masters)
            torch._foreach_lerp_(lists.averages, lists.masters, 1 - EMA_DECAY)
            return norm

        return step

    return prepare


class _ForeachAdamW:
    """torch.optim.AdamW in launches for all tensors, as it is where nobody asks for more: it counts steps on the host.

    `AdamW.step` refuses a capture then, as its replays would all correct for one count, which is as much work; this
    calls the function below it. Counted on the GPU (`capturable`), two of its divisions are by tensors [] and take a
    launch for each parameter.
    """

    def __init__(self, lists: _Lists):
        self.lists = lists
        self.steps = [torch.tensor(float(STEPS_BEFORE)) for _ in lists.masters]

    def step(self) -> None:
        lists = self.lists
        adamw(
            lists.masters,
            [master.grad for master in lists.masters],
            lists.first_moments,
            lists.second_moments,
            [],
            self.steps,
            foreach=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=LEARNING_RATE,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


def _torch_adamw(lists: _Lists, **implementation: bool) -> torch.optim.AdamW:
    # Steps are counted on the GPU, as a CUDA graph has to; tensor after tensor that would be many small launches more.
    on_gpu = lists.masters[0].is_cuda and any(implementation.values())
    optimizer = torch.optim.AdamW(
        lists.masters,
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=0.0,
        capturable=on_gpu,
        **implementation,
    )
    _fill_state(optimizer, lists, lambda: torch.tensor(float(STEPS_BEFORE), device="cuda" if on_gpu else "cpu"))
    return optimizer


def _apex_adamw(lists: _Lists) -> Any:
    """Its master weights are for float16 only (bfloat16 weights have none), so it gets the masters as weights."""
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(lists.masters, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, adam_w_mode=True, weight_decay=0.0)
    _fill_state(optimizer, lists)
    for group in optimizer.param_groups:
        group["step"] = STEPS_BEFORE
    return optimizer


def _colossalai_adamw(lists: _Lists) -> Any:
    """Open-Sora's optimizer; on a GPU its kernel is that of ColossalAI's FusedAdam."""
    from colossalai.nn.optimizer import HybridAdam

    optimizer = HybridAdam(lists.masters, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, adamw_mode=True)
    _fill_state(optimizer, lists, lambda: STEPS_BEFORE)
    return optimizer


def _fill_state(optimizer: Any, lists: _Lists, make_step: Callable[[], Any] | None = None) -> None:
    """Gives an optimizer the moments; `make_step`: the steps taken before, where it counts those of each tensor."""
    moments = zip(lists.masters, lists.first_moments, lists.second_moments, strict=True)
    for master, first, second in moments:
        optimizer.state[master].update(exp_avg=first, exp_avg_sq=second)
        if make_step is not None:
            optimizer.state[master]["step"] = make_step()


# ---- torch.compile ----


def foreach_step(lists: _Lists, step: Tensor) -> Tensor:
    """A step written as a compiler likes it, without an optimizer object; `step`: float64 [], steps taken before."""
    gradients = [gradient.to(lists.masters[0].dtype) for gradient in lists.gradients]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    for tensors in zip(
        gradients, lists.masters, lists.first_moments, lists.second_moments, lists.averages, strict=True
    ):
        _move(*tensors, norm, step)
    if lists.working:
        torch._foreach_copy_(lists.working, lists.masters)
    step += 1
    return norm


def flat_step(flat: dict[str, Tensor], gradient: Tensor, step: Tensor) -> Tensor:
    """The same on flat tensors, the gradients gathered into one before."""
    gradient = gradient.to(flat["master"].dtype)
    norm = torch.linalg.vector_norm(gradient)
    _move(gradient, *(flat[name] for name in STATE), norm, step)
    if "working" in flat:
        flat["working"].copy_(flat["master"])
    step += 1
    return norm


def _move(
    gradient: Tensor, master: Tensor, first: Tensor, second: Tensor, average: Tensor, norm: Tensor, step: Tensor
) -> None:
    gradient = gradient * (MAX_NORM / (norm + NORM_EPSILON)).clamp(max=1.0)
    # In float64, for 1 - β₂ᵗ is a small difference in the first steps.
    first_correction, second_correction = (1 - beta ** (step + 1) for beta in BETAS)
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient * gradient)
    root = second.sqrt() / second_correction.sqrt().to(second.dtype) + EPSILON
    master.sub_((LEARNING_RATE / first_correction).to(first.dtype) * first / root)
    average.lerp_(master, 1 - EMA_DECAY)


def _steps_before(work: AdamWWork) -> Tensor:
    return torch.tensor(float(STEPS_BEFORE), dtype=torch.float64, device=work.device)


def _prepare_compiled(work: AdamWWork) -> Bound:
    function = torch.no_grad()(compiled(foreach_step))
    lists, step = _Lists.of(work), _steps_before(work)
    return lambda: function(lists, step)


def _prepare_compiled_flat(work: AdamWWork) -> Bound:
    function = torch.no_grad()(compiled(flat_step))
    gradients, step = work.tensors("gradient"), _steps_before(work)

    def call() -> Tensor:
        gradient = work.layout.gather(gradients, work.drawn, torch.device(work.device))
        return function(work.flat, gradient, step)

    return call


# ---- flat tensors ----


def prepare_own(work: AdamWWork, backend: str) -> Bound:
    """As `opensora_fast.train.optimizer.master_adamw` does it in one process."""
    flat, gradients = work.flat, work.tensors("gradient")
    step = torch.tensor(float(STEPS_BEFORE), device=work.device)

    def call() -> Tensor:
        gradient = work.layout.gather(gradients, work.drawn, torch.device(work.device))
        norm = measure_norm(gradient)
        kernels.adamw(
            gradient,
            norm,
            step,
            flat["master"],
            flat["first_moment"],
            flat["second_moment"],
            flat.get("working"),
            flat["average"],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            max_norm=MAX_NORM,
            decay=EMA_DECAY,
            backend=backend,
        )
        return norm

    return call


COLOSSALAI = ("colossalai",)

ADAMW_PROVIDERS = (
    Provider("upstream", _prepare_upstream),
    Provider("eager", lambda work: prepare_own(work, "reference")),
    Provider("foreach", _prepare_with(_ForeachAdamW)),
    Provider("torch-fused", _prepare_with(lambda lists: _torch_adamw(lists, fused=True))),
    Provider("compile", _prepare_compiled, compiles_on_cuda),
    Provider("compile-flat", _prepare_compiled_flat, compiles_on_cuda),
    Provider("apex", _prepare_with(_apex_adamw), needs_module("apex.optimizers", APEX), version_of(APEX)),
    Provider(
        "colossalai",
        _prepare_with(_colossalai_adamw),
        needs_module("colossalai.nn.optimizer", COLOSSALAI),
        version_of(COLOSSALAI),
    ),
    Provider("ours", lambda work: prepare_own(work, "triton"), needs_cuda, own_version),
)
# Both are eager PyTorch; the norm of one flat tensor and that of many norms err differently in float32.
ADAMW_REFERENCES = ADAMW_PROVIDERS[:2]
