"""Sizes of the benchmarks on a device: the model of Open-Sora 1.1 on a GPU, a small one that a CPU does in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from opensora_fast.costs.hardware import DATASHEETS, MIB, Gpu, recognize_gpu
from opensora_fast.costs.memory import usable_memory
from opensora_fast.model import STDiT2Config

from ..environment import query_gpu
from ..providers.variants import RECOMPUTING
from ..shapes import VIDEO_SIZES, Pack, Workload, fill


@dataclass(frozen=True)
class Scale:
    """What is measured on a device.

    Attributes:
        config: of the model; exact timesteps and angles, so that errors are those of the arithmetic alone.
        tokens: of a filled step, about.
        gpu: whose rates estimates are for; None: a CPU.
        step_memory: bytes for the activations that a training step stores.
        check_bytes: of attention scores in float64; where those of the timed inputs are less, these are compared with
            float64, which spares compilers another shape.
        check_tokens: of the comparison with float64 of smaller inputs else, about.
        headline: about `tokens` tokens of each resolution, for ops and blocks.
        steps: the same for training steps, of fewer videos where torch.compile could not store the activations of all:
            who stores and who recomputes is compared on the same videos.
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
    gpu: Gpu | None
    step_memory: float
    check_bytes: float
    check_tokens: int
    headline: tuple[Workload, ...]
    steps: tuple[Workload, ...]
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

    def most_tokens(self, *providers: str, beside: float = 0.0) -> int:
        """Of a step that stores the activations of all these of "eager", "compile" and "ours" at once.

        Args:
            beside: bytes that something else takes of the memory.
        """
        stored = sum(STORED_BYTES[provider] for provider in providers) * self.config.depth
        return max(int(min((self.step_memory - beside) / stored, MOST_TOKENS)), 1)

    def least_recomputing(self, provider: str, tokens: int) -> str:
        """The variant of "compile" or "ours" that recomputes as few blocks as the memory allows: "ours-recompute-half".

        While backward is in a recomputed block, that one's activations are there too.
        """
        if tokens <= self.most_tokens(provider):
            return provider
        stored, stream = STORED_BYTES[provider], 2 * self.config.hidden_size
        for name, share in RECOMPUTING.items():
            recomputed = round(share * self.config.depth)
            blocks = (self.config.depth - recomputed + 1) * stored + recomputed * stream
            if tokens * blocks <= self.step_memory:
                return provider + name
        return f"{provider}-recompute"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


FILL_TOKENS = 32768
MOST_TOKENS = 10**9
# Stored for each token and layer, counted in bfloat16: what autograd keeps of a block by eager PyTorch in upstream's
# order of operations (in ours 93 where an RMS norm is one op, as on a GPU), by torch.compile's choice (2.11), and by
# ours as `costs/memory.py` has it.
STORED_BYTES = {"eager": 105 * 2**10, "compile": 82 * 2**10, "ours": 63 * 2**10}
# Weights, gradients, optimizer, average, and the exact gradients that checks hold.
OTHER_BYTES = 20e9


def scale_of(device: str, gpu: Gpu | None = None) -> Scale:
    """The sizes for "cuda" or "cpu".

    Args:
        gpu: None: this machine's, or an H200 where no GPU answers, as in a plan.
    """
    if device == "cuda":
        return _scale_of_gpu(gpu or _own_gpu() or DATASHEETS["H200"])
    if device == "cpu":
        return _scale_of_cpu()
    raise ValueError(f"device {device!r}: benchmarks run on cuda or cpu")


def _scale_of_gpu(gpu: Gpu) -> Scale:
    config = STDiT2Config.xl_2(upstream_rounding=False)
    step_memory = max(usable_memory(gpu.memory) - OTHER_BYTES, 1.0)
    step_tokens = min(FILL_TOKENS, int(step_memory / (STORED_BYTES["compile"] * config.depth)))
    return Scale(
        device="cuda",
        dtype=torch.bfloat16,
        config=config,
        tokens=FILL_TOKENS,
        gpu=gpu,
        step_memory=step_memory,
        check_bytes=6e9,
        check_tokens=8192,
        headline=tuple(fill(name, 16, FILL_TOKENS) for name in VIDEO_SIZES),
        steps=tuple(fill(name, 16, step_tokens) for name in VIDEO_SIZES),
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


def _scale_of_cpu() -> Scale:
    headline = (Workload("144p", 4, 1), Workload("240p", 1, 1))
    return Scale(
        device="cpu",
        dtype=torch.float32,
        config=STDiT2Config.small(upstream_rounding=False),
        tokens=512,
        gpu=None,
        step_memory=math.inf,  # no step of these fills a host's memory
        check_bytes=0.0,
        check_tokens=400,
        headline=headline,
        steps=headline,
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
def _own_gpu() -> Gpu | None:
    """The first GPU, None where none answers. Asked without torch, which would take a part of its memory to answer.

    Its memory is what it says; its rates are its datasheet's, or an H200's where nobody knows them.
    """
    name, _, mebibytes = query_gpu("name", "memory.total").rpartition(", ")
    if not mebibytes.isdigit():
        return None
    return replace(recognize_gpu(name) or DATASHEETS["H200"], memory=int(mebibytes) * MIB)
