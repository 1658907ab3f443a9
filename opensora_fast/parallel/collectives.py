"""What torch.distributed does between processes, under names that every torch has, and a lost process by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


class ProcessLostError(ValueError):
    """Another process of the run has ended."""


def reduce_scatter(output: Tensor, tensor: Tensor) -> dist.Work:
    """`output`: this process's part of the sum over all processes."""
    # torch 2.13 has renamed it, and warns of the name before.
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return function(output, tensor, async_op=True)


def all_gather(
    output: Tensor, tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """`output`: the tensors of all processes one behind another."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(output, tensor, group=group, async_op=async_op)


@contextmanager
def naming_the_loss() -> Iterator[None]:
    """ProcessLostError in place of what torch raises where another process cannot be reached. It may be this one that
    cannot reach any, as where NCCL finds no network, and then only torch says why."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "another process of this run has ended or cannot be reached; its own message, or torchrun's, says why; "
            f"torch says here: {error}"
        ) from error


def do_all(jobs: Iterable[Callable[[], Any]]) -> None:
    """Do all of them, and only then raise the ProcessLostError of any: another process waits for each."""
    lost = None
    for job in jobs:
        try:
            job()
        except ProcessLostError as error:
            lost = error
    if lost is not None:
        raise lost
