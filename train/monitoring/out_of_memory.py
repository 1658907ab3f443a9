"""What a person learns of a step that did not fit into the memory of the GPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

from opensora_fast.cuda_graphs import CaptureError
from opensora_fast.data.batch import Batch
from opensora_fast.out_of_memory import find_out_of_memory, naming_out_of_memory
from opensora_fast.parallel.collectives import ProcessLostError
from opensora_fast.parallel.processes import Processes

# The newest so many allocations and releases are kept: those of several steps of the largest model.
HISTORY_ENTRIES = 100_000
# What stands in memory all through a run, and what to change where it does not fit.
PARTS = {
    "the encoders": "train with features=FOLDER, made on a GPU with more memory; where only encoding needs too much, "
    "lower vae.micro_batch_size",
    "weights, optimizer and average": "start more processes with torchrun, which share out optimizer and average, or "
    "train with features=FOLDER, so that no encoders lie beside them",
}


@contextmanager
def keep_memory_history(wanted: bool) -> Iterator[None]:
    """Have torch keep, during the block, where in the code memory was asked for and released: `write_memory` writes
    it. On a GPU only, see `refuse_history_without_gpu`."""
    if not wanted:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, stacks="python")
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def refuse_history_without_gpu(wanted: bool, device: str) -> None:
    """ValueError where the history of a GPU's memory is wanted on another device."""
    if wanted and device != "cuda":
        raise ValueError(
            f"--memory-history: only of a GPU's memory torch keeps a history, and the device is {device}; leave it "
            "out, or train with --device cuda"
        )


@contextmanager
def explain_out_of_memory(
    batch: Batch, tokens: int, step: int, graphs: bool, folder: Path, processes: Processes, history: bool
) -> Iterator[None]:
    """Take a step during the block: where it does not fit, write what held the memory, and say what to change.

    Args:
        batch, tokens: of the step.
        graphs: whether CUDA graphs take memory, too.
        folder, processes, history: see `write_memory`.

    Raises:
        ValueError: in place of an error that `describe_out_of_memory` describes.
    """
    try:
        yield
    except (RuntimeError, CaptureError, ProcessLostError) as error:  # others have something else to say
        happened = describe_out_of_memory(batch, tokens, step, graphs, error)
        if happened is None:
            raise
        raise ValueError(f"{happened}\n{write_memory(happened, folder, processes, history)}") from error


def explain_parts_out_of_memory(parts: str) -> AbstractContextManager[None]:
    """Put into the GPU's memory, during the block, what stands there all through a run.

    Args:
        parts: what that is, a key of `PARTS`.

    Raises:
        ValueError: with what to change, where it does not fit.
    """
    return naming_out_of_memory(
        f"before the first step, with {parts}: {PARTS[parts]}; `opensora-fast plan` says what a GPU has to hold"
    )


def describe_out_of_memory(batch: Batch, tokens: int, step: int, graphs: bool, error: Exception) -> str | None:
    """What did not fit and what to change, of the batch of a step; None where memory has not run out.

    In the capture of a CUDA graph it may have without a word of it: what the allocator tries last, before it says so,
    can make a capture invalid (https://github.com/pytorch/pytorch/pull/187795).

    Args:
        graphs: CUDA graphs take memory, too.
        error: of the step.
    """
    ran_out = find_out_of_memory(error)
    resolution, frames, _ = batch.bucket
    fixes = [f"lower the batch size of bucket_config[{resolution!r}][{frames}]"]
    fixes.append("recompute activations with grad_checkpoint=True")
    what = "out of GPU memory"
    if isinstance(error, CaptureError):
        what = "out of GPU memory in the capture of a CUDA graph"
        if ran_out is None:
            what = "a CUDA graph could not be captured, as also happens where GPU memory runs out,"
        fixes.insert(0, f"lower cuda_graph_tokens below {tokens}, the tokens of this step")
    elif ran_out is None:
        return None
    elif graphs:
        fixes.append("spare the memory of CUDA graphs with cuda_graph_tokens=0")
    return (
        f"step {step}: {what} with {len(batch)} clips of bucket {batch.bucket}: {', or '.join(fixes)}. "
        f"{ran_out or error.__cause__}"
    )


def write_memory(happened: str, folder: Path, processes: Processes, history: bool) -> str:
    """Write `out_of_memory.txt`, what torch says of the memory it holds, and with the history `out_of_memory.pickle`
    for https://pytorch.org/memory_viz; returns a line that names them.

    To be called while the error is being handled: until then the tensors of the step are there.

    Args:
        happened: stands at the head of the text.
        folder: output folder of the run.
        processes: of the run; each of several writes files of its own, with its rank in their names.
        history: whether `keep_memory_history` is on.
    """
    name = "out_of_memory" if processes.world_size == 1 else f"out_of_memory-rank-{processes.rank}"
    text, pickle = folder / f"{name}.txt", folder / f"{name}.pickle"
    on_gpu = processes.device.type == "cuda"
    try:
        summary = torch.cuda.memory_summary(processes.device) if on_gpu else "(not a GPU: torch keeps no account)"
        text.write_text(f"{happened}\n\n{summary}\n")
        if not history:
            return f"What held the memory: {text}; where it was asked for is kept with --memory-history"
        try:
            torch.cuda.memory._dump_snapshot(str(pickle))
        except OSError:
            with suppress(OSError):
                pickle.unlink()  # none can read a part of it
            raise
    except (OSError, RuntimeError) as error:  # the disk is full, or the GPU answers no more
        return f"What held the memory could not be written: {error}"
    return f"What held the memory: {text}, and where it was asked for: {pickle}, to open at pytorch.org/memory_viz"
