"""One of several processes that compute a model's outputs and gradients together, and a process alone that does it all.

Started by `test_sequence.py`; what each has computed it writes into a file of a folder.
"""

import multiprocessing
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.parallel.join import join_sequence
from opensora_fast.parallel.sequence import SequenceGroup

CHANNELS, TEXT = 32, 16
SIZES = {  # (videos, frames, rows, columns of the latents), whether some frames are given
    "frames that do not divide evenly": ((2, 3, 5, 6), False),
    "given frames": ((2, 4, 4, 4), True),
    "one frame for all": ((1, 1, 4, 4), False),
    "one token a frame": ((1, 4, 2, 2), False),
    "images": ((3, 1, 4, 6), True),
}
MIXED = ((3, 4, 6), (1, 8, 4), (5, 4, 4), (5, 4, 4))


def make_model() -> STDiT2:
    """float64, no weight zero."""
    torch.manual_seed(0)
    model = STDiT2(
        STDiT2Config(
            hidden_size=96,
            num_heads=4,
            depth=2,
            input_sq_size=512,
            qk_norm=True,
            caption_channels=CHANNELS,
            model_max_length=TEXT,
            class_dropout_prob=0.5,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(0, 0.02)
    return model.double()


def make_conditions(videos: int, frames: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(videos, TEXT, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    return {
        "timestep": torch.arange(videos) * 100.0 + 3,
        "y": torch.randn(videos, 1, TEXT, CHANNELS, generator=generator),
        "mask": mask,
        "num_frames": torch.full((videos,), float(frames)),
        "height": torch.arange(videos) * 16.0 + 64,
        "width": torch.full((videos,), 80.0),
        "ar": torch.full((videos,), 1.2),
        "fps": torch.full((videos,), 24.0),
    }


def compute(model: STDiT2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each case the outputs, flat, and all gradients of the part that this process has computed."""
    results = {}

    def add(name: str, outputs: list[torch.Tensor]) -> None:
        flat = torch.cat([output.flatten() for output in outputs]).double()
        weights = torch.randn(flat.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        model.zero_grad()
        (flat * weights).sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results[name] = flat.detach(), torch.cat([parameter.grad.flatten() for parameter in trained])

    generator = torch.Generator().manual_seed(3)
    for recomputed in (0, 1):
        model.set_checkpointing(recomputed)
        for name, ((videos, frames, rows, columns), given) in SIZES.items():
            x = torch.randn(videos, 4, frames, rows, columns, generator=generator, dtype=torch.float64)
            x_mask = torch.rand(videos, frames, generator=generator) < 0.5 if given else None
            torch.manual_seed(4)  # captions are dropped
            add(f"{name}, {recomputed} recomputed", [model(x, **make_conditions(videos, frames), x_mask=x_mask)])
    model.set_checkpointing(0)
    videos = [torch.randn(4, *size, generator=generator, dtype=torch.float64) for size in MIXED]
    masks = [None, torch.tensor([False]), None, torch.tensor([True, False, True, True, False])]
    torch.manual_seed(4)
    add("mixed", model.forward_packed(videos, **make_conditions(len(MIXED), 1), x_masks=masks))
    return results


def share_turned(group: SequenceGroup) -> torch.Tensor:
    """A matrix of the first process, which has it column by column in memory."""
    tensors = {"turned": torch.arange(6).view(2, 3).T} if group.rank == 0 else None
    return group.share(tensors, torch.device("cpu"))["turned"]


def run(rank: int, world_size: int, folder: str) -> None:
    """Compute in groups of two, then all together."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=2))
    model = make_model()
    for size in (2, world_size):
        group = join_sequence(size)
        model.share_frames(group)
        torch.save(compute(model), Path(folder) / f"{size}-{rank}.pt")
        assert share_turned(group).tolist() == [[0, 3], [1, 4], [2, 5]]
    dist.barrier()
    dist.destroy_process_group()


def run_together(world_size: int, folder: str) -> None:
    """All of them, as forks of this process, which has imported everything once; ends with 1 if one of them fails."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run, args=(rank, world_size, folder), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 100
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    sys.exit(int(any(process.exitcode != 0 for process in processes)))
