"""A tiny op with providers of every character, and rows, for the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_fast.benchmarks.environment import Environment
from opensora_fast.benchmarks.measuring.case import Case, Outcome, make_template
from opensora_fast.benchmarks.measuring.contest import OP_CALLS, Contest, run_contest
from opensora_fast.benchmarks.measuring.provider import Provider, choose_providers, of_function
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.measuring.timing import Sampling
from opensora_fast.benchmarks.rows import Row
from opensora_fast.costs.operations import Count


@dataclass(frozen=True)
class ToyWork:
    """y = a · b."""

    leaves: dict[str, Tensor]
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["a"].dtype

    def to(self, dtype: torch.dtype) -> ToyWork:
        return replace(
            self, leaves={name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        )


def make_toy_work(size: int = 64) -> ToyWork:
    generator = torch.Generator().manual_seed(0)
    return ToyWork({name: torch.randn(size, generator=generator).requires_grad_() for name in ("a", "b")})


def multiply(work: ToyWork) -> Tensor:
    return work.leaves["a"] * work.leaves["b"]


def slightly_wrong(work: ToyWork) -> Tensor:
    return multiply(work) * (1 + 1e-4)


def wrong_backward(work: ToyWork) -> Tensor:
    """Right forward; the gradient of b is lost."""
    return work.leaves["a"] * work.leaves["b"].detach()


def wrong_when_large(work: ToyWork) -> Tensor:
    return multiply(work) if work.leaves["a"].numel() < 64 else multiply(work) + 1


def crash(work: ToyWork) -> Tensor:
    raise RuntimeError("boom\nwith more lines")


def out_of_memory(work: ToyWork) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


TOY_PROVIDERS = (
    Provider("eager", of_function(multiply)),
    Provider("slightly-wrong", of_function(slightly_wrong)),
    Provider("wrong-backward", of_function(wrong_backward)),
    Provider("wrong-when-large", of_function(wrong_when_large)),
    Provider("crash", of_function(crash)),
    Provider("out-of-memory", of_function(out_of_memory)),
    Provider("absent", of_function(crash), missing=lambda work: "absent is not installed"),
    Provider("other", of_function(lambda work: work.leaves["b"] * work.leaves["a"])),
)


def toy_contest(names: Sequence[str], size: int = 64, check_size: int | None = None) -> Contest:
    return Contest(
        template=make_template("op", f"size {size}", op="toy", shape=f"N={size}", tokens=size, dtype="float32"),
        work=make_toy_work(size),
        providers=choose_providers(TOY_PROVIDERS, names),
        references=TOY_PROVIDERS[:1],
        calls=OP_CALLS,
        counts={"forward": Count(64.0, 768.0), "forward+backward": Count(192.0, 1536.0)},
        sampling=Sampling(0.01, min_samples=5),
        check_work=None if check_size is None else make_toy_work(check_size),
        check_name="" if check_size is None else f"size {check_size}",
    )


def toy_case(
    names: Sequence[str], size: int = 64, value: float = 1.0, on_measure: Callable[[], None] = lambda: None
) -> Case:
    def measure(session: Session, chosen: Sequence[str]) -> Outcome:
        on_measure()
        return run_contest(toy_contest(chosen, size), session)

    return Case(toy_contest(names, size).template, tuple(OP_CALLS), tuple(names), value, measure)


ENVIRONMENT = Environment("nvidia-h200", "580.1", "2.11.0", "3.6.0", "3.12.3", "a" * 40, False, "2026-11-22T00:00:00Z")


def make_row(**changes: object) -> Row:
    """A measured row of a GPU; `environment` changes as well by name."""
    environment = {name: changes.pop(name) for name in list(changes) if name in Environment.__dataclass_fields__}
    row = Row(
        level="op",
        workload="240p×16",
        op="modulated_norm",
        direction="forward",
        provider="ours",
        provider_version="0.1.0",
        shape="B=5 T=16 S=405 C=1152",
        tokens=32400,
        dtype="bfloat16",
        status="ok",
        samples=30,
        p20_ms=0.9,
        p50_ms=1.0,
        p80_ms=1.1,
        memory_bytes=2**20,
        flops=1e9,
        bytes=2e9,
        error=1e-3,
        error_limit=4e-3,
        environment=replace(ENVIRONMENT, **environment),
    )
    return replace(row, **changes)
