"""Names for what a training step does, for those who watch one.

Neither of the two tools sees what the other is told: Nsight Systems shows NVTX ranges, torch's profiler what
`record_function` names (unless every op becomes a range of NVTX, as with `emit_nvtx`). So a range is both, under one
name: of NVTX always on a GPU, as nobody can know whether Nsight listens, and a call that none hears costs next to
nothing; of the other only while a profiler runs, as it costs about twenty microseconds either way.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """Give what the block does on the host, and launches from there, a name. NVTX is asked for on a GPU only: torch
    for CPUs has none."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
