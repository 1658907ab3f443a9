"""DPM-Solver++(2M): a draft in about 20 steps instead of 100, without noise along the way and without frame masks.

After Lu et al. 2022 (arXiv:2211.01095), algorithm 2, over uniformly spaced times. Notation: x_t = alpha_t x_0 +
sigma_t noise, lambda_t = log(alpha_t / sigma_t). Time runs from 1 (noise) to 1/N, N the number of diffusion steps, and
log alpha is interpolated linearly between the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_fast.diffusion.guidance import GuidedModel, each_step, encode_with_unconditional
from opensora_fast.diffusion.noise import Generators
from opensora_fast.diffusion.schedule import make_betas
from opensora_fast.progress import Progress

DIFFUSION_STEPS = 1000
NO_GIVEN_FRAMES = 'dpm-solver cannot keep or edit frames; use scheduler type "iddpm" for references and loops'
FEW_STEPS = 10  # below this the last step is of first order, for stability


class DPMSolver:
    """Sampler for a model trained with `IDDPM` (linear schedule, 1000 steps, noise prediction).

    Args:
        num_sampling_steps: model evaluations, at least 2.
        cfg_scale: classifier-free guidance, of all channels.
    """

    def __init__(self, num_sampling_steps: int = 20, cfg_scale: float = 4.0) -> None:
        if num_sampling_steps < 2:
            raise ValueError(f"num_sampling_steps of dpm-solver must be at least 2, got {num_sampling_steps}")
        self.num_timesteps = num_sampling_steps
        self.cfg_scale = cfg_scale
        betas = make_betas("linear", DIFFUSION_STEPS).numpy()
        self.times = np.linspace(1.0, 1.0 / DIFFUSION_STEPS, num_sampling_steps + 1)
        log_alphas = 0.5 * np.cumsum(np.log(1.0 - betas))
        log_alpha = np.interp(self.times, np.arange(1, DIFFUSION_STEPS + 1) / DIFFUSION_STEPS, log_alphas)
        self.alphas = np.exp(log_alpha)
        self.sigmas = np.sqrt(-np.expm1(2.0 * log_alpha))
        self.lambdas = np.log(self.alphas / self.sigmas)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[..., Tensor],
        text_encoder: Any,
        z: Tensor,
        prompts: Sequence[str],
        device: torch.device | str,
        additional_args: dict[str, Any] | None = None,
        mask: Tensor | None = None,
        *,
        generator: Generators = None,
        progress: bool | Progress = True,
    ) -> Tensor:
        """Generate latents for the prompts; arguments as in `IDDPM.sample`, but the model is told fractional timesteps.

        It draws no noise: the result is a function of z, and `generator` is not used.

        Raises:
            ValueError: with a mask that gives or edits frames, which this solver cannot do.
        """
        if len(prompts) != z.shape[0]:
            raise ValueError(f"z has {z.shape[0]} rows for {len(prompts)} prompts; give one row for each prompt")
        if mask is not None and not bool((mask == 1).all()):
            raise ValueError(NO_GIVEN_FRAMES)
        x = z.to(device=device, dtype=torch.promote_types(z.dtype, torch.float32))
        model_kwargs = encode_with_unconditional(text_encoder, model, prompts, x.device) | (additional_args or {})
        guided = GuidedModel(model, self.cfg_scale)

        previous_x_start = None
        for step in each_step(range(self.num_timesteps), progress):
            timestep = float((self.times[step] - 1.0 / DIFFUSION_STEPS) * 1000.0)
            t = torch.full((len(prompts),), timestep, dtype=torch.float32, device=x.device)
            noise = guided(x, t, **model_kwargs)[:, : x.shape[1]]
            x_start = (x - float(self.sigmas[step]) * noise) / float(self.alphas[step])
            is_low_order_end = step == self.num_timesteps - 1 and self.num_timesteps < FEW_STEPS
            x = self._advance(x, x_start, None if is_low_order_end else previous_x_start, step)
            previous_x_start = x_start
        return x

    def _advance(self, x: Tensor, x_start: Tensor, previous_x_start: Tensor | None, step: int) -> Tensor:
        """From time `step` to the next: second order with the x_0 of the step before, else first order."""
        width = self.lambdas[step + 1] - self.lambdas[step]
        estimate = x_start
        if previous_x_start is not None:
            previous_width = self.lambdas[step] - self.lambdas[step - 1]
            estimate = x_start + float(0.5 * width / previous_width) * (x_start - previous_x_start)
        keep = float(self.sigmas[step + 1] / self.sigmas[step])
        return keep * x - float(self.alphas[step + 1] * np.expm1(-width)) * estimate
