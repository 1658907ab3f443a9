"""Become one of the processes that torchrun has started."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from opensora_fast.device import choose_device
from opensora_fast.parallel.processes import JoinedProcesses, Processes

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


@contextmanager
def join_processes(device_name: str | None) -> Iterator[Processes]:
    """The processes of this run, of which torchrun may have started several, connected while the block runs.

    Nobody leaves the block before all have come to its end, or one has failed. Once in the life of several processes:
    torchrun keeps the addresses of the first time.

    Args:
        device_name: "cpu" or "cuda"; None is CUDA where there is one. On CUDA the process takes the GPU of its number
            on this machine.

    Raises:
        ValueError: torchrun's variables are incomplete, the device is not here, or there are more processes than GPUs.
    """
    place = read_place(os.environ)
    device = choose_device(device_name)
    if place.world_size == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = take_gpu(place)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    try:
        host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        processes = JoinedProcesses(device, place.local_world_size, host_group)
        yield processes
        # torchrun ends all processes when one has ended with an error code: only after rank 0 has written everything.
        processes.gather(None)
    finally:
        dist.destroy_process_group()


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
