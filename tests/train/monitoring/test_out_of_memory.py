"""A step that does not fit into memory leaves a file that says what was there."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from losses import read_losses
from toy_steps import make_batch, make_model, make_trainer

from opensora_fast.cuda_graphs import CaptureError, CudaRecorder
from opensora_fast.diffusion import IDDPM
from opensora_fast.out_of_memory import find_out_of_memory
from opensora_fast.parallel.collectives import ProcessLostError
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.loop import Trainer
from opensora_fast.train.monitoring.out_of_memory import explain_out_of_memory, keep_memory_history, write_memory
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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("inputs.sources.build_encoders", "with the encoders: train with features=FOLDER"),
        ("train.MasterAdamW", "with weights, optimizer and average: start more processes with torchrun"),
    ],
)
def test_what_does_not_fit_before_any_step_is_explained(train, tmp_path, monkeypatch, name, told):
    monkeypatch.setattr(f"opensora_fast.train.{name}", lambda *arguments, **options: fail(*FULL))
    code, _, error = train(tmp_path / "run", "--steps", 3)
    assert code == 1 and f"error: out of GPU memory before the first step, {told}" in error
    assert FULL[1] in error and "Traceback" not in error and "unexpected" not in error


AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # as torch 2.7 raises it
# As PyTorch raises them: class and text.
FULL = torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate more than there is"
NO_ROOM_FOR_THE_GRAPH = AcceleratorError, "CUDA error: out of memory"
NOT_PERMITTED = AcceleratorError, "CUDA error: operation not permitted when stream is capturing"
INVALID = AcceleratorError, "CUDA error: operation failed due to a previous error during capture"


def fail(kind, text):
    raise kind(text)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize(
    ("inside", "at_the_end", "what", "told"),
    [
        (FULL, None, "out of GPU memory in the capture of a CUDA graph", FULL),
        (FULL, INVALID, "out of GPU memory in the capture of a CUDA graph", FULL),
        (None, NO_ROOM_FOR_THE_GRAPH, "out of GPU memory in the capture of a CUDA graph", NO_ROOM_FOR_THE_GRAPH),
        (NOT_PERMITTED, INVALID, "a CUDA graph could not be captured, as also happens where", NOT_PERMITTED),
    ],
    ids=["error of the allocator", "and capture invalid", "no room for the graph", "capture invalid"],
)
def test_memory_that_runs_out_in_a_capture_names_what_to_lower(
    tmp_path, monkeypatch, part, inside, at_the_end, what, told
):
    """In that of a forward pass, or in that of its backward pass, which comes next."""
    captures = []
    place = {"forward": (IDDPM, "losses_at"), "backward": (torch.autograd, "grad")}[part]

    class Capture:
        def __init__(self, graph, **options):
            captures.append(self)
            self.fails = len(captures) == (1 if part == "forward" else 2)

        def __enter__(self):
            if self.fails and inside is not None:
                monkeypatch.setattr(*place, lambda *arguments, **options: fail(*inside))

        def __exit__(self, *error):
            if self.fails and at_the_end is not None:
                fail(*at_the_end)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    out = tmp_path / "run"
    # The first shape that comes again does so in step 3: 2 images of 6 x 8 latents.
    message = rf"^step 3: {what} .*with 2 clips .*: lower cuda_graph_tokens below 24, the tokens of this step, or lower"
    with pytest.raises(ValueError, match=message) as raised:
        make_trainer(out, 9, tokens=10**6, record=CudaRecorder()).run()
    assert told[1] in str(raised.value) and "What held the memory: " in str(raised.value)
    # What those are told who sample, and those who take the graphs by themselves.
    captured = raised.value.__cause__
    assert isinstance(captured, CaptureError) and type(captured.__cause__) is told[0]
    assert str(captured) == f"a CUDA graph could not be captured: lower cuda_graph_tokens, or set it to 0. {told[1]}"
    assert (out / "out_of_memory.txt").read_text().startswith("step 3: ")
    assert [row[0] for row in read_losses(out)] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        (*NO_ROOM_FOR_THE_GRAPH, True),  # when it is launched for the first time
        (RuntimeError, "Triton Error [CUDA]: out of memory", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (RuntimeError, "CUDA error: an illegal memory access was encountered", False),
        (ValueError, "a caption: out of memory", False),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_only_memory_that_runs_out_is_explained(tmp_path, kind, text, found, inside):
    """`inside`: another error came of it."""
    batch = make_batch(0, (2, 1, 6, 8), make_model().config)
    told = re.escape("of a lost process" if inside else text)
    if found:
        told = f"step 5: out of GPU memory with 2 clips .* cuda_graph_tokens=0. {re.escape(text)}"
    with pytest.raises(ValueError if found or inside else kind, match=told):
        with explain_out_of_memory(batch, 24, 5, True, tmp_path, Processes(torch.device("cpu")), False):
            try:
                fail(kind, text)
            except kind as error:
                if inside:
                    raise ProcessLostError("of a lost process") from error
                raise
    assert (tmp_path / "out_of_memory.txt").exists() == found


def test_on_a_gpu_torch_says_what_it_holds(tmp_path, calls):
    line = write_memory("step 9: out of GPU memory", tmp_path, on_gpu(), history=False)
    assert (tmp_path / "out_of_memory.txt").read_text() == "step 9: out of GPU memory\n\nthe summary of cuda:0\n"
    assert str(tmp_path / "out_of_memory.txt") in line and not calls


@pytest.mark.parametrize("rank", [0, 1])
def test_with_the_history_a_snapshot_is_written_by_each_process(tmp_path, calls, rank):
    line = write_memory("step 9", tmp_path, on_gpu(2, rank), history=True)
    snapshot = str(tmp_path / f"out_of_memory-rank-{rank}.pickle")
    assert calls == [snapshot] and snapshot in line and "pytorch.org/memory_viz" in line
    assert f"the summary of cuda:{rank}" in (tmp_path / f"out_of_memory-rank-{rank}.txt").read_text()


def test_files_that_cannot_be_written_are_told(tmp_path, calls):
    line = write_memory("step 9", tmp_path / "gone", on_gpu(), history=True)
    assert "could not be written: " in line and "No such file" in line


def test_a_part_of_a_snapshot_does_not_stay(tmp_path, calls, monkeypatch):
    def fill_disk(path):
        Path(path).write_text("the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fill_disk)
    line = write_memory("step 9", tmp_path, on_gpu(), history=True)
    assert line == "What held the memory could not be written: [Errno 28] No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["out_of_memory.txt"]


def test_a_gpu_that_answers_no_more_is_told(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: fail(*INVALID))
    assert write_memory("step 9", tmp_path, on_gpu(), history=False).endswith(f"could not be written: {INVALID[1]}")


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


@pytest.mark.gpu
def test_memory_that_runs_out_in_a_real_capture_is_found():
    counter = torch.zeros(1, device="cuda")

    def forward():
        counter.add_(1)
        capturing = torch.cuda.is_current_stream_capturing()
        return {"output": torch.empty(1 << 50 if capturing else 1, dtype=torch.uint8, device="cuda")}

    with pytest.raises(CaptureError, match="lower cuda_graph_tokens") as raised:
        CudaRecorder()(forward)
    assert find_out_of_memory(raised.value) is not None
    assert counter.item() == 1  # the GPU goes on
