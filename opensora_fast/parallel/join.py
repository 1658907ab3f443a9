"""Become one of the processes that torchrun has started."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions keep the group that is joined when they are first imported, forever (torch 2.13); here none is yet.
import torch.distributed.nn.functional  # noqa: F401

from opensora_fast.device import choose_device
from opensora_fast.parallel.collectives import naming_the_loss
from opensora_fast.parallel.processes import JoinedProcesses, Processes
from opensora_fast.parallel.sequence import SequenceGroup

# How long hosts wait for each other: longer than encoding the features of a large table takes.
HOST_TIMEOUT = timedelta(days=7)
TORCHRUN = "torchrun --standalone --nproc-per-node N -m opensora_fast train ..."


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, by torchrun's variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that torchrun has given this process; that of the only one if it did not start it.

    Raises:
        ValueError: WORLD_SIZE says that there are several processes, but what belongs to it is missing or no number.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise ValueError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but not {', '.join(missing)}: start several processes "
            f"with {TORCHRUN}, or unset WORLD_SIZE"
        )
    values = {name: environment[name] for name in names}
    if wrong := [f"{name}={value!r}" for name, value in values.items() if not value.isdecimal()]:
        raise ValueError(f"{', '.join(wrong)} is no number: start several processes with {TORCHRUN}")
    return Place(*map(int, values.values()))


def count_replicas(world_size: int, sequence_size: int) -> int:
    """How many micro-batches so many processes compute at a time, `sequence_size` of them each.

    Raises:
        ValueError: they do not form such groups.
    """
    if world_size % sequence_size:
        raise ValueError(
            f"sp_size={sequence_size}: {world_size} {'process does' if world_size == 1 else 'processes do'} not form "
            f"groups of {sequence_size} that share their micro-batches; start a multiple of it with {TORCHRUN}, or set "
            "sp_size=1"
        )
    return world_size // sequence_size


@contextmanager
def join_processes(device_name: str | None, sequence_size: int = 1) -> Iterator[Processes]:
    """The processes of this run, of which torchrun may have started several, connected while the block runs.

    Nobody leaves the block before all have come to its end, or one has failed. Once in the life of several processes:
    torchrun keeps the addresses of the first time.

    Args:
        device_name: "cpu" or "cuda"; None is CUDA where there is one. On CUDA the process takes the GPU of its number
            on this machine.
        sequence_size: so many consecutive processes, which torchrun starts on one machine as far as it can, compute
            each micro-batch together.

    Raises:
        ValueError: torchrun's variables are incomplete, the device is not here, there are more processes than GPUs, or
            they do not form groups of `sequence_size`; ProcessLostError where they do not find each other.
    """
    place = read_place(os.environ)
    count_replicas(place.world_size, sequence_size)
    device = choose_device(device_name)
    if place.world_size == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = take_gpu(place)
    with naming_the_loss():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    processes: JoinedProcesses | None = None
    try:
        with naming_the_loss():
            host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
            state_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
            sequence = join_sequence(sequence_size) if sequence_size > 1 else None
        processes = JoinedProcesses(device, place.local_world_size, host_group, state_group, sequence)
        del host_group, state_group, sequence
        yield processes
        # torchrun ends all processes when one has ended with an error code: only after rank 0 has written everything.
        processes.gather(None)
    except BaseException:
        # NCCL would wait for collectives that this process has begun, and one that has failed never will.
        dist.group.WORLD.abort()
        if processes is not None and processes.sequence is not None:
            processes.sequence.group.abort()
        raise
    finally:
        # The threads of a group end with the last reference to it. One of gloo's that frees a tensor while Python ends
        # aborts the process, so nothing, such as a cycle of objects, may keep a group longer.
        if processes is not None:
            processes.leave()
        dist.destroy_process_group()


def join_sequence(size: int) -> SequenceGroup:
    """The group of this process, among groups of `size` consecutive ones; every process must call it."""
    group, _ = dist.new_subgroups(group_size=size)
    host_group, _ = dist.new_subgroups(group_size=size, backend="gloo", timeout=HOST_TIMEOUT)
    return SequenceGroup(group, host_group)


def take_gpu(place: Place) -> torch.device:
    """Make the GPU of a process's number on its machine the current one. ValueError if there are too few."""
    gpus = torch.cuda.device_count()
    if place.local_world_size > gpus:
        raise ValueError(
            f"{place.local_world_size} processes on this machine, but {gpus} GPUs: each process needs one of its own, "
            f"start torchrun with --nproc-per-node {gpus}"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device
