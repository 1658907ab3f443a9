"""A step that does not fit into memory leaves a file that says what was there."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from losses import read_losses

from opensora_fast.train.loop import Trainer
from opensora_fast.train.monitoring.out_of_memory import keep_memory_history, write_memory
from opensora_fast.train.optimizer.master_adamw import MasterAdamW


@pytest.fixture
def calls(monkeypatch):
    """What torch is asked of a GPU's memory, in its place: of memory on the CPU it keeps no account."""
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"the summary of {device}")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: asked.append(path))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
    return asked


def on_gpu(world_size=1, rank=0):
    return SimpleNamespace(world_size=world_size, rank=rank, device=torch.device("cuda", rank))


@pytest.mark.parametrize("part", ["forward", "optimizer"])
def test_the_message_names_the_file_that_says_more(train, tmp_path, monkeypatch, part):
    """The optimizer gathers the gradients into one tensor, for which there may be no room either."""
    taker, name = {"forward": (Trainer, "compute_losses"), "optimizer": (MasterAdamW, "step")}[part]
    real, calls = getattr(taker, name), []

    def run_out(*arguments):
        calls.append(part)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return real(*arguments)

    monkeypatch.setattr(taker, name, run_out)
    out = tmp_path / "run"
    code, _, error = train(out, "--steps", 3)
    path = out / "out_of_memory.txt"
    assert code == 1 and "error: step 2: out of GPU memory" in error and "Traceback" not in error
    assert f"What held the memory: {path}; where it was asked for is kept with --memory-history" in error
    text = path.read_text()
    assert "step 2: out of GPU memory with" in text and "tried to allocate more than there is" in text
    # The row of step 1 is otherwise written during step 2, between its backward and the optimizer.
    assert [row[0] for row in read_losses(out)] == [1]


def test_on_a_gpu_torch_says_what_it_holds(tmp_path, calls):
    line = write_memory("step 9: out of GPU memory", tmp_path, on_gpu(), history=False)
    assert (tmp_path / "out_of_memory.txt").read_text() == "step 9: out of GPU memory\n\nthe summary of cuda:0\n"
    assert str(tmp_path / "out_of_memory.txt") in line and not calls


def test_with_the_history_a_snapshot_is_written_by_each_process(tmp_path, calls):
    line = write_memory("step 9", tmp_path, on_gpu(2, rank=1), history=True)
    snapshot = str(tmp_path / "out_of_memory-rank-1.pickle")
    assert calls == [snapshot] and snapshot in line and "pytorch.org/memory_viz" in line
    assert "the summary of cuda:1" in (tmp_path / "out_of_memory-rank-1.txt").read_text()


def test_files_that_cannot_be_written_are_told(tmp_path, calls):
    line = write_memory("step 9", tmp_path / "gone", on_gpu(), history=True)
    assert "could not be written: " in line and "No such file" in line


def test_the_history_is_kept_during_the_block_only(calls):
    with keep_memory_history(False):
        assert not calls
    with pytest.raises(ValueError), keep_memory_history(True):
        assert len(calls) == 1 and calls[0]["max_entries"] == 100_000
        raise ValueError
    assert calls[1:] == [{"enabled": None}]


def test_a_history_of_the_memory_of_a_cpu_is_refused(train, tmp_path):
    for dry in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 1, "--memory-history", *dry)
        assert code == 1 and "--memory-history: only of a GPU's memory" in error and "the device is cpu" in error
        assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_a_real_snapshot_says_where_memory_was_asked_for(tmp_path):
    with keep_memory_history(True):
        held = torch.empty(1 << 20, device="cuda")
        try:
            torch.empty(1 << 50, device="cuda")
        except torch.OutOfMemoryError as error:
            write_memory(str(error), tmp_path, on_gpu(), history=True)
    assert "CUDA memory summary" in (tmp_path / "out_of_memory.txt").read_text()
    with (tmp_path / "out_of_memory.pickle").open("rb") as file:
        snapshot = pickle.load(file)  # of this process
    frames = [frame["filename"] for entry in snapshot["device_traces"][0] for frame in entry.get("frames", ())]
    assert any(filename.endswith("test_out_of_memory.py") for filename in frames) and held.is_cuda
