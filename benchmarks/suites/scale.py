"""Sizes of the benchmarks on a device: the model of Open-Sora 1.1 on a GPU, a small one that a CPU does in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.model import STDiT2Config

from ..environment import query_gpu
from ..shapes import VIDEO_SIZES, Pack, Workload, fill


@dataclass(frozen=True)
class Scale:
    """What is measured on a device.

    Attributes:
        config: of the model; exact timesteps and angles, so that errors are those of the arithmetic alone.
        tokens: of a filled step, about.
        recompute_above: tokens of a step whose stored activations eager PyTorch cannot hold in the GPU's memory.
        check_bytes: of attention scores in float64; where those of the timed inputs are less, these are compared with
            float64, which spares compilers another shape.
        check_tokens: of the comparison with float64 of smaller inputs else, about.
        headline: a step of each resolution.
        text: mean real tokens of a caption.
        images, long_videos: further workloads.
        mixed: videos of several shapes, for ops and blocks; mixed_steps: for whole steps, of about `tokens` tokens.
        gemm_tokens: rows of the matrix products.
        square: side of the matrix product that gives the device's matrix rate.
        copy_bytes: of the copy that gives its bandwidth.
        seconds: how long samples of ops are taken for each direction.
        step_seconds: likewise of blocks and steps.
    """

    device: str
    dtype: torch.dtype
    config: STDiT2Config
    tokens: int
    recompute_above: int
    check_bytes: float
    check_tokens: int
    headline: tuple[Workload, ...]
    text: int
    images: tuple[Workload, ...]
    long_videos: tuple[Workload, ...]
    mixed: Pack
    mixed_steps: tuple[Pack, ...]
    gemm_tokens: tuple[int, ...]
    square: int
    copy_bytes: int
    seconds: float
    step_seconds: float

    def check_pack(self, pack: Pack) -> Pack:
        """The videos of the comparison with float64: `pack` itself, or fewer and shorter ones."""
        pairs = sum(part.tokens * part.frame_tokens for part in pack.parts)
        scores = torch.float64.itemsize * self.config.num_heads * pairs
        return pack if scores <= self.check_bytes else pack.shortened(self.check_tokens)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


FILL_TOKENS = 32768  # eager PyTorch without recomputation stores 100 GB
# Counted: what eager PyTorch stores per token and layer; weights, gradients, optimizer, average, and what checks leave.
STORED_BYTES, OTHER_BYTES = 110 * 2**10, 20e9


def scale_of(device: str, memory_bytes: float | None = None) -> Scale:
    """The sizes for "cuda" or "cpu".

    Args:
        memory_bytes: of the GPU; None: this machine's, or an H200's where no GPU answers, as in a plan.
    """
    if device == "cuda":
        config = STDiT2Config.xl_2(upstream_rounding=False)
        memory_bytes = memory_bytes or _gpu_memory_bytes() or DATASHEETS["H200"].memory
        return Scale(
            device=device,
            dtype=torch.bfloat16,
            config=config,
            tokens=FILL_TOKENS,
            recompute_above=max(int((memory_bytes - OTHER_BYTES) / (STORED_BYTES * config.depth)), 1),
            check_bytes=6e9,
            check_tokens=8192,
            headline=tuple(fill(name, 16, FILL_TOKENS) for name in VIDEO_SIZES),
            text=120,
            images=tuple(fill(name, 1, FILL_TOKENS) for name in ("256", "512", "1024")),
            long_videos=tuple(
                fill(name, frames, FILL_TOKENS)
                for name in VIDEO_SIZES
                for frames in (1, 32, 64, 128)
                if Workload(name, frames).tokens <= 2 * FILL_TOKENS
            ),
            mixed=Pack(
                "mixed",
                (
                    Workload("144p", 16, 4),
                    Workload("256", 1, 8),
                    Workload("240p", 16, 1),
                    Workload("480p", 1, 3),
                    Workload("360p", 8, 1),
                ),
            ),
            mixed_steps=(
                # As stage 1 mixes them: images and videos of four resolutions.
                Pack(
                    "mixed images and videos",
                    (
                        Workload("144p", 16, 4),
                        Workload("144p", 32, 1),
                        Workload("256", 1, 16),
                        Workload("240p", 16, 1),
                        Workload("512", 1, 4),
                        Workload("1024", 1, 1),
                    ),
                ),
                Pack("mixed videos", (Workload("144p", 16, 5), Workload("144p", 32, 2), Workload("240p", 16, 2))),
            ),
            gemm_tokens=(9216, 16384, 32768, 65536),
            square=8192,
            copy_bytes=4 * 2**30,
            seconds=2.0,
            step_seconds=12.0,
        )
    if device != "cpu":
        raise ValueError(f"device {device!r}: benchmarks run on cuda or cpu")
    return Scale(
        device=device,
        dtype=torch.float32,
        config=STDiT2Config.small(upstream_rounding=False),
        tokens=512,
        recompute_above=10**9,  # no step of these fills a host's memory
        check_bytes=0.0,
        check_tokens=400,
        headline=(Workload("144p", 4, 1), Workload("240p", 1, 1)),
        text=6,
        images=(Workload("256", 1, 1),),
        long_videos=(),
        mixed=Pack("mixed", (Workload("144p", 2, 1), Workload("256", 1, 1))),
        mixed_steps=(Pack("mixed images and videos", (Workload("144p", 2, 1), Workload("256", 1, 1))),),
        gemm_tokens=(512,),
        square=256,
        copy_bytes=2**22,
        seconds=0.2,
        step_seconds=0.6,
    )


@lru_cache(maxsize=1)
def _gpu_memory_bytes() -> float:
    """Of the first GPU, 0 where none answers. Asked without torch, which would take a part of it to answer."""
    mebibytes = query_gpu("memory.total")
    return float(mebibytes) * 2**20 if mebibytes.isdigit() else 0.0
