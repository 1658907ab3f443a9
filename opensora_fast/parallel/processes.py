"""What the processes of a run say to each other, and one that is alone.

Each process, or each group of processes that compute together (see `sequence.py`), trains on micro-batches of its own
with the same weights. Each process owns one shard of the optimizer's state (ZeRO stage 1,
https://arxiv.org/abs/1910.02054). Gradients and weights travel between the devices, over NCCL or, on the CPU, gloo.
Everything else goes from host to host over gloo, what is small as JSON: a host may wait for another as long as it
takes, while NCCL takes ten minutes without an answer for a failure. As the hosts meet in every step when they have
their data, before the devices do, no device waits for another one's data either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.parallel.collectives import all_gather, do_all, naming_the_loss, reduce_scatter
from opensora_fast.parallel.sequence import SequenceGroup


class Processes:
    """The only process of a run: nothing is communicated, nothing copied.

    Args:
        device: where it trains.

    Attributes:
        rank: number of this process, 0 .. world_size - 1; 0 writes the files of the run.
        world_size: number of processes.
        sequence: those that compute each micro-batch together with this one; None if it computes its own.
        replicas: how many micro-batches are computed at a time.
        replica: number of this process's one among them.
        local_world_size: how many of them run on this machine.
    """

    rank = 0
    world_size = 1
    local_world_size = 1
    sequence: SequenceGroup | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def replicas(self) -> int:
        return self.world_size if self.sequence is None else self.world_size // self.sequence.size

    @property
    def replica(self) -> int:
        return self.rank if self.sequence is None else self.rank // self.sequence.size

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in the order of ranks, on every one; each waits for all.

        Args:
            value: of JSON's types; comes back as JSON gives it (a tuple as a list) where there are several processes.
        """
        return [value]

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block while the others wait, then they run it: what rank 0 makes, they find. The block must
        not communicate."""
        yield

    def average(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Begin to average the gradients of all micro-batches. All processes must begin whatever they average or spread
        in the same order, as often.

        Args:
            gradient: [world_size · shard], float32 or bfloat16, on the device. It must stay as it is until the mean is
                there.

        Returns:
            What waits for the mean, on CUDA without keeping the host, and returns this process's shard of it [shard]:
            of one process the gradient itself, otherwise float32.
        """
        return lambda: gradient

    def join_norms(self, norms: list[Tensor]) -> Tensor:
        """The norm [] of a tensor, from the norms [] of its parts, of which each process holds as many, one if it is
        alone; the same bits on every process."""
        (norm,) = norms
        return norm

    def spread(self, flat: Tensor) -> Callable[[], None]:
        """Begin to give every process all shards: `flat` [world_size · shard] has its own at its place, and gets the
        others'. Returns what waits for them, on CUDA without keeping the host."""
        return lambda: None

    def collect(self, shard: Tensor) -> Tensor | None:
        """The flat tensor [world_size · shard] of which each process gives a shard: on rank 0, elsewhere None.

        Of several processes it comes to the host, so that no device has to hold it. If one of them is lost, rank 0
        takes the shards of the others before it says so: each waits until its own has been taken.
        """
        return shard


class JoinedProcesses(Processes):
    """One of several processes; made by `join_processes`.

    Args:
        device: where it trains, one of its own.
        local_world_size: processes on this machine.
        host_group: gloo's, for what hosts say to each other; the default group joins the devices.
        state_group: gloo's, for `collect`, which may be called from another thread than the rest.
        sequence: as in `Processes`.

    Raises (all methods):
        ProcessLostError: another process has ended. It says itself why.
    """

    def __init__(
        self,
        device: torch.device,
        local_world_size: int,
        host_group: dist.ProcessGroup,
        state_group: dist.ProcessGroup,
        sequence: SequenceGroup | None = None,
    ) -> None:
        super().__init__(device)
        self.sequence = sequence
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_world_size = local_world_size
        self._host_group = host_group
        self._state_group = state_group
        self._divisor = torch.full((1,), float(self.replicas), device=device)

    def leave(self) -> None:
        """Give up the groups: nothing can be said to the other processes any more."""
        del self._host_group, self._state_group
        if self.sequence is not None:
            self.sequence.leave()

    def gather(self, value: Any) -> list[Any]:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.empty(self.world_size, dtype=torch.int64)
        with naming_the_loss():
            all_gather(lengths, torch.tensor([len(content)]), group=self._host_group)
        contents = torch.zeros(self.world_size, int(lengths.max()), dtype=torch.uint8)
        own = contents[self.rank].clone()
        own[: len(content)] = content
        with naming_the_loss():
            all_gather(contents.view(-1), own, group=self._host_group)
        return [
            json.loads(row[:length].numpy().tobytes()) for row, length in zip(contents, lengths.tolist(), strict=True)
        ]

    @contextmanager
    def first(self) -> Iterator[None]:
        if self.rank != 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    def average(self, gradient: Tensor) -> Callable[[], Tensor]:
        """The sum is taken in the gradient's own dtype, as Open-Sora's ZeRO does and with half of float32's traffic in
        bfloat16; the division by the number of micro-batches is in float32 and loses nothing more."""
        total = gradient.new_empty(len(gradient) // self.world_size)
        with naming_the_loss():
            work = reduce_scatter(total, gradient)

        def wait() -> Tensor:
            with naming_the_loss():
                work.wait()
            return total / self._divisor

        return wait

    def join_norms(self, norms: list[Tensor]) -> Tensor:
        own = torch.stack(norms)
        every = own.new_empty(self.world_size * len(own))
        with naming_the_loss():
            all_gather(every, own)
        return torch.linalg.vector_norm(every)

    def spread(self, flat: Tensor) -> Callable[[], None]:
        with naming_the_loss():
            work = all_gather(flat, flat.view(self.world_size, -1)[self.rank], async_op=True)

        def wait() -> None:
            with naming_the_loss():
                work.wait()

        return wait

    def collect(self, shard: Tensor) -> Tensor | None:
        if self.rank != 0:
            with naming_the_loss():
                dist.send(shard.cpu(), 0, group=self._state_group)
            return None
        whole = torch.empty(self.world_size, len(shard), dtype=shard.dtype)
        whole[0].copy_(shard)
        do_all(partial(self._receive, whole[rank], rank) for rank in range(1, self.world_size))
        return whole.view(-1)

    def _receive(self, shard: Tensor, rank: int) -> None:
        with naming_the_loss():
            dist.recv(shard, rank, group=self._state_group)
