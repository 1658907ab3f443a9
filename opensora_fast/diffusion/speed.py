"""iddpm-speed (SpeeDiT): training that draws the timesteps itself, more often where the noise level still changes.

After SpeeD (Wang et al. 2024, arXiv:2405.17403); the loss weights are those of P2 (Choi et al. 2022, arXiv:2204.00227)
with gamma = k = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.diffusion.iddpm import IDDPM, Model

FLAT_SLOPE = 5e-5  # the noise level is called constant from the first step at which it rises by less
FAVORED_SLOPE = 1e-4  # steps at which it rises by more are drawn five times as often

# Where the slope passes FAVORED_SLOPE, one last bit of the float32 noise level moves a probability by 1 %. The
# published distribution (1000 linear steps) came from a square root that is not correctly rounded: one bit high here.
PUBLISHED_ONE_BIT_HIGHER = [633, 635, 637, 641, 642, 645, 646]


class SpeeDiffusion(IDDPM):
    """`IDDPM` for training only, with its own distribution of timesteps and weighted squared error.

    Takes the arguments of `IDDPM` except `cfg_channel`.

    Attributes:
        p: float32 [num_timesteps] on the CPU, the probability with which a step is drawn (before mirroring).
        weights: float32 [num_timesteps] on the CPU, 1 / (1 + SNR): the weight of the squared error.
        meaningful_steps: the number of steps until the noise level hardly changes; drawn steps are mirrored around it.
    """

    def __init__(
        self,
        num_sampling_steps: int | None = None,
        timestep_respacing: str | Sequence[int] | None = None,
        noise_schedule: str = "linear",
        use_kl: bool = False,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        learn_sigma: bool = True,
        rescale_learned_sigmas: bool = False,
        diffusion_steps: int = 1000,
        cfg_scale: float = 4.0,
    ) -> None:
        super().__init__(
            num_sampling_steps=num_sampling_steps,
            timestep_respacing=timestep_respacing,
            noise_schedule=noise_schedule,
            use_kl=use_kl,
            sigma_small=sigma_small,
            predict_xstart=predict_xstart,
            learn_sigma=learn_sigma,
            rescale_learned_sigmas=rescale_learned_sigmas,
            diffusion_steps=diffusion_steps,
            cfg_scale=cfg_scale,
        )
        if self.num_timesteps < 2:
            raise ValueError("iddpm-speed needs at least 2 timesteps to tell where the noise level changes, got 1")
        noise_level = self.schedule.sqrt_one_minus_alphas_cumprod.clone()
        if (noise_schedule, diffusion_steps, self.num_timesteps) == ("linear", 1000, 1000):
            published = noise_level[PUBLISHED_ONE_BIT_HIGHER]
            noise_level[PUBLISHED_ONE_BIT_HIGHER] = torch.nextafter(published, torch.ones_like(published))
        slope = torch.gradient(noise_level)[0]
        # argmax gives the first flat step, and 0 if there is none.
        self.meaningful_steps = int((slope < FLAT_SLOPE).int().argmax()) + 1
        # A smooth step from 0.5 to 2.5 at the favored slope.
        self.p = F.normalize(torch.tanh(1e6 * (slope - FAVORED_SLOPE)) + 1.5, p=1, dim=0)
        signal_to_noise = 1.0 / (1 - self.schedule.alphas_cumprod) - 1
        self.weights = 1 / (1 + signal_to_noise)
        self._weights_on: dict[torch.device, Tensor] = {}

    def draw_timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` steps, int64 [count] on the CPU: drawn from `p`, then their mirror images in the same order.

        Args:
            count: number of videos.
            generator: a CPU generator; the default one if None.
        """
        drawn = torch.multinomial(self.p, count // 2 + 1, replacement=True, generator=generator)
        mirrored = torch.where(
            drawn < self.meaningful_steps, self.meaningful_steps - drawn, drawn - self.meaningful_steps
        )
        # Step 0 mirrors to meaningful_steps itself, one too far where no step is flat before the last.
        return torch.cat([drawn, mirrored.clamp(max=self.num_timesteps - 1)])[:count]

    def training_losses(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses as in `IDDPM.training_losses`, at steps drawn here.

        Args:
            t: ignored, the steps come from `draw_timesteps`; may be None.
            generator: a CPU generator for the steps and the noise.
        """
        t = self.draw_timesteps(x.shape[0], generator)
        return self.losses_at(model, x, t, model_kwargs, noise, mask, generator=generator)

    def losses_at(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses as in `IDDPM.training_losses` with weighted squared errors, at steps `t`."""
        if x.device not in self._weights_on:
            self._weights_on[x.device] = self.weights.to(x.device)
        return super().training_losses(
            model, x, t, model_kwargs, noise, mask, weights=self._weights_on[x.device], generator=generator
        )

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """iddpm-speed has no sampler of its own."""
        raise NotImplementedError('iddpm-speed only trains; sample with scheduler type "iddpm" (class IDDPM)')
