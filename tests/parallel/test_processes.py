"""The place that torchrun gives a process, and what a process that is alone does not do."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import opensora_fast.parallel.processes as processes_module
from opensora_fast.parallel.collectives import ProcessLostError, naming_the_loss
from opensora_fast.parallel.join import Place, join_processes, read_place, take_gpu
from opensora_fast.parallel.processes import JoinedProcesses, Processes
from opensora_fast.parallel.sequence import FrameRange, FrameShare, SequenceGroup

TORCHRUN = {
    "RANK": "13",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "5",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_the_place_is_torchruns():
    assert read_place(TORCHRUN) == Place(rank=13, world_size=16, local_rank=5, local_world_size=8)
    assert read_place({}) == read_place({"WORLD_SIZE": "1"}) == read_place(TORCHRUN | {"WORLD_SIZE": "1"}) == Place()


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "WORLD_SIZE"])
def test_what_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"WORLD_SIZE=16 is set, but not {name}: start .* with torchrun"):
        read_place({key: value for key, value in TORCHRUN.items() if key != name})


def test_what_is_no_number_is_named():
    with pytest.raises(ValueError, match="RANK='x', LOCAL_RANK='-1' is no number"):
        read_place(TORCHRUN | {"RANK": "x", "LOCAL_RANK": "-1"})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="8 processes on this machine, but 4 GPUs.*--nproc-per-node 4"):
        with join_processes("cuda"):
            pass
    assert not dist.is_initialized()


def test_a_process_takes_the_gpu_of_its_number_on_the_machine(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert take_gpu(read_place(TORCHRUN)) == torch.device("cuda", 5)
    assert chosen == [torch.device("cuda", 5)]


def test_a_process_alone_copies_and_communicates_nothing(monkeypatch):
    for name in ("init_process_group", "new_group", "send", "recv"):
        monkeypatch.setattr(dist, name, None)
    for name in ("reduce_scatter", "all_gather"):
        monkeypatch.setattr(processes_module, name, None)
    with join_processes("cpu") as processes:
        assert type(processes) is Processes and (processes.rank, processes.world_size) == (0, 1)
        value, tensor = object(), torch.ones(64)
        assert processes.gather(value) == [value]
        assert processes.average(tensor)() is processes.join_norms([tensor]) is processes.collect(tensor) is tensor
        processes.spread(tensor)()
        with processes.first():
            pass


def test_what_torch_knows_of_a_lost_process_is_told(monkeypatch):
    """Where this machine finds no network no other process has anything to say."""
    with pytest.raises(ProcessLostError, match="cannot be reached; .* NCCL error: unhandled system error"):
        with naming_the_loss():
            raise RuntimeError("NCCL error: unhandled system error")
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for key, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}).items():
        monkeypatch.setenv(key, value)
    soon = partial(dist.init_process_group, timeout=timedelta(seconds=1))
    monkeypatch.setattr(dist, "init_process_group", soon)
    with pytest.raises(ProcessLostError, match="cannot be reached; .* 1/2 clients joined"):
        with join_processes("cpu"):
            pass
    assert not dist.is_initialized()


def share_of(processes):
    """One of two tokens."""
    return FrameShare(processes.sequence, None, (FrameRange(0, 0, 1),), (1, 1), vain=0)


EXCHANGES = {  # of the process of a rank
    "gather": (0, lambda processes: processes.gather(None)),
    "average": (0, lambda processes: processes.average(torch.ones(4))()),
    "join norms": (0, lambda processes: processes.join_norms([torch.ones(())])),
    "spread": (0, lambda processes: processes.spread(torch.ones(4))()),
    "take the shards": (0, lambda processes: processes.collect(torch.ones(2))),
    "give a shard": (1, lambda processes: processes.collect(torch.ones(2))),
    "tell": (0, lambda processes: processes.sequence.tell(None)),
    "share": (0, lambda processes: processes.sequence.share({"x": torch.ones(2)}, processes.device)),
    "give tokens": (0, lambda processes: share_of(processes).give_tokens(torch.ones(1, 2, 8))),
    "take tokens": (0, lambda processes: share_of(processes).take_tokens(torch.ones(2, 1, 8))),
    "gather tokens": (0, lambda processes: share_of(processes).gather(torch.ones(1, 8))),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_lost_process_is_named_whatever_is_exchanged_with_it(monkeypatch, name):
    rank, exchange = EXCHANGES[name]
    count = SimpleNamespace(made=0, lost_at=None)

    def communicate(*arguments, **options):
        count.made += 1
        if count.made == count.lost_at:
            raise RuntimeError("Connection closed by peer")
        return SimpleNamespace(wait=communicate)

    def all_gather(output, tensor, **options):
        output.view(2, -1)[:] = tensor
        return communicate()

    others = ("reduce_scatter_single", "reduce_scatter_tensor", "all_to_all_single", "broadcast", "send", "recv")
    for function in others:
        monkeypatch.setattr(dist, function, communicate, raising=False)
    for function in ("all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, function, all_gather, raising=False)
    for function, number in (("get_rank", rank), ("get_world_size", 2), ("get_global_rank", 0)):
        monkeypatch.setattr(dist, function, lambda *arguments, number=number: number)
    processes = JoinedProcesses(torch.device("cpu"), 2, None, None, SequenceGroup(None, None))
    exchange(processes)
    times = count.made  # with what waits for one that was begun
    assert times > 0
    for number in range(1, times + 1):
        count.made, count.lost_at = 0, number
        with pytest.raises(ProcessLostError, match="Connection closed by peer"):
            exchange(processes)


def find_free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


LEAVE = """
import gc, os
import torch
from opensora_fast.parallel.join import join_processes

gc.disable()
with join_processes("cpu", sequence_size=2) as processes:
    import torch._dynamo  # imports all of torch.distributed
    assert processes.gather(processes.rank) == [0, 1]
    assert processes.sequence.tell([processes.rank]) == [0]
    assert processes.average(torch.ones(4))().tolist() == [2.0, 2.0]
    groups = [processes._host_group, processes._state_group, processes.sequence.host_group]
    assert all(group._get_backend(torch.device("cpu")).options._timeout.days > 1 for group in groups)
    del groups
    cycle = [processes]
    cycle.append(cycle)
    del cycle
threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
print([name for name in threads if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="lists the threads of a process in /proc")
def test_no_thread_of_the_groups_outlives_them():
    """One that frees a tensor while Python ends takes the process down, after all its work is done."""
    port = find_free_port()
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [lines.splitlines()[-1:] for lines in printed] == [["[]"]] * 2, printed
    assert [process.returncode for process in processes] == [0, 0]
