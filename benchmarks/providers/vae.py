"""The SD VAE's encoder in the layouts that its convolutions can have, on the same frames."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from opensora_fast.costs.operations import Count

from ..measuring.provider import Bound, Provider, compiled, compiles_on_cuda
from ..measuring.race import relative_check
from ..shapes import Workload

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NORM_ERROR = 1e-5


@dataclass(frozen=True)
class VaeWork:
    """Frames to encode.

    Attributes:
        vae: what encodes them.
        frames: [T, 3, H, W] in [-1, 1], on the device.
        exact: float64, moments [T, 8, H // 8, W // 8].
        limit: relative; twice the error of diffusers' own layout in the same dtype, and what another order of summing
            in its norms may add.
        count: multiplications and additions.
    """

    vae: AutoencoderKL
    frames: Tensor
    exact: Tensor
    limit: float
    count: Count

    @property
    def device(self) -> str:
        return self.frames.device.type

    @classmethod
    @torch.no_grad()
    def draw(cls, vae: AutoencoderKL, workload: Workload) -> VaeWork:
        """Random frames of one video, on the device and in the dtype of the VAE."""
        device = vae.device
        generator = torch.Generator(device).manual_seed(0)
        size = (workload.frames, 3, *workload.pixels)
        frames = (torch.rand(size, generator=generator, device=device) * 2 - 1).to(vae.dtype)
        exact = _moments(copy.deepcopy(vae).double(), frames.double())
        with FlopCounterMode(display=False) as counter:
            eager = _moments(vae, frames)
        error = relative_check(eager, exact, 0.0).error
        return cls(vae, frames, exact, 2.0 * error + NORM_ERROR, Count(float(counter.get_total_flops())))


def _moments(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """Mean and logarithm of the variance of the latents [T, 8, H // 8, W // 8]."""
    return vae.quant_conv(vae.encoder(frames))


def _encode_in(layout: torch.memory_format, compile_it: bool, work: VaeWork) -> Bound:
    vae = copy.deepcopy(work.vae).to(memory_format=layout)
    function = compiled(_moments) if compile_it else _moments
    # The change of layout is in the time: clips come as they are.
    return lambda: function(vae, work.frames.contiguous(memory_format=layout))


VAE_PROVIDERS = (
    Provider("eager", partial(_encode_in, torch.contiguous_format, False)),
    Provider("eager-channels-last", partial(_encode_in, torch.channels_last, False)),
    Provider("compile", partial(_encode_in, torch.contiguous_format, True), compiles_on_cuda),
    Provider("compile-channels-last", partial(_encode_in, torch.channels_last, True), compiles_on_cuda),
)
