"""IDDPM: the losses a video model is trained with, and ancestral sampling with guidance and given frames.

Formulas are those of DDPM (Ho et al. 2020, arXiv:2006.11239), IDDPM (Nichol & Dhariwal 2021, arXiv:2102.09672) and
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); the options and their defaults are Open-Sora's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora_fast.diffusion.guidance import GuidedModel, each_step, encode_with_unconditional
from opensora_fast.diffusion.likelihood import discretized_gaussian_log_likelihood, mean_per_video, normal_kl
from opensora_fast.diffusion.noise import Generators, draw_noise_like
from opensora_fast.diffusion.schedule import Schedule, choose_timesteps, make_betas
from opensora_fast.progress import Progress

Model = Callable[..., Tensor]  # model(x_t [B, C, T, H, W], timestep [B], **model_kwargs) -> [B, C or 2C, T, H, W]


class Prediction(NamedTuple):
    """What the model says about p(x_{t-1} | x_t): everything [B, C, T, H, W] or broadcasting to it."""

    mean: Tensor
    log_variance: Tensor


class IDDPM:
    """Gaussian diffusion over latents, with learned variance.

    Args:
        num_sampling_steps: keep this many evenly spread steps; None keeps all.
        timestep_respacing: the same, spelled out ("100", "10,20", "ddim50", [10, 20]); not both.
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: train on the variational bound alone.
        sigma_small: without learned variance, use the posterior variance instead of beta.
        predict_xstart: the model predicts x_0 instead of the noise.
        learn_sigma: the second half of the model's channels interpolates the log variance (IDDPM equation 15).
        rescale_learned_sigmas: weigh the bound by num_timesteps / 1000.
        diffusion_steps: steps before respacing.
        cfg_scale: classifier-free guidance in `sample`; 1 is no guidance.
        cfg_channel: guide only this many leading channels; None guides all predicted channels.

    Attributes:
        schedule: the coefficient tables (`Schedule`).
        num_timesteps: number of steps after respacing; `t` runs from 0 to num_timesteps - 1.
        timestep_map: for each step the original timestep, which the model is told.
        betas: float32 [num_timesteps] on the CPU.
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
        cfg_channel: int | None = None,
    ) -> None:
        if num_sampling_steps is not None:
            if timestep_respacing is not None:
                raise ValueError("num_sampling_steps and timestep_respacing say the same thing twice; give only one")
            if not 1 <= num_sampling_steps <= diffusion_steps:
                raise ValueError(f"num_sampling_steps must lie in 1..{diffusion_steps}, got {num_sampling_steps}")
            timestep_respacing = str(num_sampling_steps)
        if timestep_respacing is None or timestep_respacing == "":
            timestep_respacing = [diffusion_steps]
        original_betas = make_betas(noise_schedule, diffusion_steps)
        self.schedule = Schedule(original_betas, choose_timesteps(diffusion_steps, timestep_respacing))
        self.num_timesteps = self.schedule.num_timesteps
        self.timestep_map = self.schedule.timestep_map
        self.betas = self.schedule.betas
        self.use_kl = use_kl
        self.sigma_small = sigma_small
        self.predict_xstart = predict_xstart
        self.learn_sigma = learn_sigma
        self.rescale_learned_sigmas = rescale_learned_sigmas
        self.cfg_scale = cfg_scale
        self.cfg_channel = cfg_channel

    # ------------------------------------------------------------------ the forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM equation 4); `t` is int64 [B]."""
        signal = self.schedule.lookup("sqrt_alphas_cumprod", t, x_start)
        spread = self.schedule.lookup("sqrt_one_minus_alphas_cumprod", t, x_start)
        return signal * x_start + spread * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM equations 6 and 7)."""
        weight_start = self.schedule.lookup("posterior_mean_coef1", t, x_t)
        weight_t = self.schedule.lookup("posterior_mean_coef2", t, x_t)
        log_variance = self.schedule.lookup("posterior_log_variance_clipped", t, x_t)
        return weight_start * x_start + weight_t * x_t, log_variance

    # ------------------------------------------------------------------ the model's view

    def predict(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Turn the model's output at `x_t` into p(x_{t-1} | x_t).

        Args:
            model_output: [B, 2C, T, H, W] with learned variance, else [B, C, T, H, W].
            x_t: [B, C, T, H, W].
            t: int64 [B], steps of this (respaced) schedule.
        """
        output, variance_output = self._split_output(model_output, x_t)
        if self.predict_xstart:
            x_start = output
        else:
            x_start = (
                self.schedule.lookup("sqrt_recip_alphas_cumprod", t, x_t) * x_t
                - self.schedule.lookup("sqrt_recipm1_alphas_cumprod", t, x_t) * output
            )
        mean, posterior_log_variance = self.q_posterior(x_start, x_t, t)
        log_beta = self.schedule.lookup("log_betas", t, x_t)
        if variance_output is not None:
            fraction = (variance_output + 1) / 2
            log_variance = fraction * log_beta + (1 - fraction) * posterior_log_variance
        elif self.sigma_small:
            log_variance = posterior_log_variance
        else:
            # Beta itself, except at the last step, where it overstates the noise (as in DDPM's decoder).
            is_last = (t == 0).to(x_t.device).view(log_beta.shape)
            log_variance = torch.where(is_last, posterior_log_variance, log_beta)
        return Prediction(mean, log_variance)

    def p_mean_variance(
        self, model: Model, x_t: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Prediction:
        """Call the model at `x_t` (told the original timesteps) and return p(x_{t-1} | x_t)."""
        model_output = model(x_t, self.schedule.original_timesteps(t), **(model_kwargs or {}))
        return self.predict(model_output, x_t, t)

    def _split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = x_t.shape[1]
        expected = (x_t.shape[0], channels * (2 if self.learn_sigma else 1), *x_t.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"the model returned shape {tuple(model_output.shape)}, but learn_sigma={self.learn_sigma} "
                f"needs {expected} for an input of {tuple(x_t.shape)}"
            )
        if not self.learn_sigma:
            return model_output, None
        return model_output[:, :channels], model_output[:, channels:]

    # ------------------------------------------------------------------ training

    def draw_timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` steps to train at, all alike likely: int64 [count] on the CPU.

        Args:
            count: number of videos.
            generator: a CPU generator; the default one if None.
        """
        return torch.randint(0, self.num_timesteps, (count,), generator=generator, device="cpu")

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
        """Losses as in `training_losses`, at steps `t` from `draw_timesteps`; with `noise`, nothing is drawn."""
        return self.training_losses(model, x, t, model_kwargs, noise, mask, generator=generator)

    def training_losses(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one training step, per video. Never waits for the GPU.

        Args:
            model: called as model(x_t, timestep, **model_kwargs).
            x: latents [B, C, T, H, W].
            t: int64 [B], steps 0 .. num_timesteps - 1, on any device.
            model_kwargs: conditioning; the caller adds `x_mask` himself. Left as it is.
            noise: like x; drawn if None.
            mask: bool [B, T], True for the frames to be noised to `t` and learned; the others are given frames, noised
                to step 0 with the same noise and left out of the loss. None learns all. A video of given frames only
                has loss 0.
            weights: float [num_timesteps], weight of the squared error by step.
            generator: for drawing the noise.

        Returns:
            float tensors [B]: `mse`, the error of the predicted noise (or x_0); `vb`, the variational bound in bits
            per dimension, which trains the variance only (IDDPM section 3.1); `loss`, their sum. Without learned
            variance there is no `vb`; with `use_kl` no `mse`, and `loss` is the bound times num_timesteps.
        """
        self._check_training_arguments(x, t, noise, mask)
        t = t.to(x.device, non_blocking=True)
        if noise is None:
            noise = draw_noise_like(x, generator)
        x_t = self.q_sample(x, t, noise)
        if mask is not None:
            mask = mask.to(device=x.device, dtype=torch.bool, non_blocking=True)
            x_t = torch.where(mask[:, None, :, None, None], x_t, self.q_sample(x, torch.zeros_like(t), noise))

        model_output = model(x_t, self.schedule.original_timesteps(t), **(model_kwargs or {}))
        if self.use_kl:
            bound = self._variational_bound(model_output, x, x_t, t, mask)
            return {"loss": bound * self.num_timesteps, "vb": bound}

        output, variance_output = self._split_output(model_output, x_t)
        target = x if self.predict_xstart else noise
        squared_error = (target - output) ** 2
        if weights is not None:
            squared_error = self.schedule.lookup(weights, t, x) * squared_error
        losses = {"mse": mean_per_video(squared_error, mask)}
        losses["loss"] = losses["mse"]
        if variance_output is not None:
            frozen_mean = torch.cat([output.detach(), variance_output], dim=1)
            losses["vb"] = self._variational_bound(frozen_mean, x, x_t, t, mask)
            if self.rescale_learned_sigmas:
                losses["vb"] = losses["vb"] * (self.num_timesteps / 1000.0)
            losses["loss"] = losses["mse"] + losses["vb"]
        return losses

    def _variational_bound(
        self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The bound's term for step t in bits per dimension (DDPM equation 5): KL for t > 0, likelihood at t = 0."""
        true_mean, true_log_variance = self.q_posterior(x_start, x_t, t)
        prediction = self.predict(model_output, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, prediction.mean, prediction.log_variance)
        log_likelihood = discretized_gaussian_log_likelihood(x_start, prediction.mean, 0.5 * prediction.log_variance)
        bound = torch.where(t == 0, -mean_per_video(log_likelihood, mask), mean_per_video(kl, mask))
        return bound / math.log(2.0)

    def _check_training_arguments(self, x: Tensor, t: Tensor, noise: Tensor | None, mask: Tensor | None) -> None:
        if t.shape != (x.shape[0],):
            raise ValueError(f"t must have one step for each of the {x.shape[0]} videos, got shape {tuple(t.shape)}")
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"t must hold integers, steps 0 to {self.num_timesteps - 1}, got {t.dtype}")
        if noise is not None and noise.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
        if mask is not None and (x.dim() != 5 or mask.shape != (x.shape[0], x.shape[2])):
            raise ValueError(
                f"mask must have shape [B, T] for x of shape [B, C, T, H, W], "
                f"got mask {tuple(mask.shape)} and x {tuple(x.shape)}"
            )

    # ------------------------------------------------------------------ sampling

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        mask: Tensor | None = None,
        *,
        draw_noise: Callable[[Tensor], Tensor] = draw_noise_like,
    ) -> Tensor:
        """Draw x_{t-1} from p(x_{t-1} | x_t).

        With a mask m in [0, 1] a frame is generated from step k = int(m * num_timesteps) on. While t > k it is kept
        as it is and the model is told that it is given. At t = k it is noised to t and takes the step, still marked
        as given. At t < k it is an ordinary frame.

        Args:
            x: x_t, [B, C, T, H, W]. Frames not generated yet hold their given, clean latents.
            t: int64 [B].
            model_kwargs: conditioning; with a mask, `x_mask` (bool [B, T]) is added to a copy of it.
            mask: float [B, T]; 1 generates freely, 0 takes only the very last step, values between edit.
            draw_noise: returns standard normal noise like its argument.
        """
        if mask is not None:
            if mask.shape != (x.shape[0], x.shape[2]):
                raise ValueError(
                    f"mask must have shape {(x.shape[0], x.shape[2])} (videos, frames), got {tuple(mask.shape)}"
                )
            first_step = (mask * self.num_timesteps).to(torch.int)
            step = t.unsqueeze(1)
            noised = self.q_sample(x, t, draw_noise(x))
            x_given = x
            x = torch.where((first_step == step)[:, None, :, None, None], noised, x_given)
            model_kwargs = {**(model_kwargs or {}), "x_mask": first_step > step}

        prediction = self.p_mean_variance(model, x, t, model_kwargs)
        not_last = (t != 0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        sample = prediction.mean + not_last * torch.exp(0.5 * prediction.log_variance) * draw_noise(x)
        if mask is not None:
            sample = torch.where((first_step < step)[:, None, :, None, None], x_given, sample)
        return sample

    @torch.no_grad()
    def sample(
        self,
        model: Model,
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
        """Generate latents for the prompts, with classifier-free guidance.

        Args:
            model: called as model(x [2n, C, T, H, W], timestep [2n], y=[2n, 1, L, Ctext], mask=[n, L], ...): first
                the n conditional, then the n unconditional rows. In evaluation mode, as captions drop in training.
            text_encoder: `encode(prompts)` returns {"y": [n, 1, L, Ctext], "mask": [n, L]}; the unconditional text is
                `text_encoder.null(n)` [n, 1, L, Ctext] where it has that, else the model's `y_embedder.y_embedding`.
            z: starting noise [n, C, T, H, W]; given frames already hold their latents.
            prompts: n texts.
            device: where to sample.
            additional_args: more conditioning for the model, n rows each.
            mask: float [n, T], see `p_sample`; None generates all frames.
            generator: for the noise of every step: one, or one for each prompt. The default one of the device if None.
            progress: True shows a bar; a running `Progress` is advanced by each step.

        Returns:
            Latents [n, C, T, H, W], float32 or wider.
        """
        count = len(prompts)
        if z.shape[0] != count:
            raise ValueError(f"z has {z.shape[0]} rows for {count} prompts; give one row for each prompt")
        x = z.to(device=device, dtype=torch.promote_types(z.dtype, torch.float32))
        mask = None if mask is None else mask.to(x.device)
        model_kwargs = encode_with_unconditional(text_encoder, model, prompts, x.device) | (additional_args or {})
        guided = GuidedModel(model, self.cfg_scale, self.cfg_channel)

        def draw_noise(like: Tensor) -> Tensor:
            if generator is None:
                # Twice the rows, the second half unused: noise for each row that the model sees keeps the random
                # numbers, and so the samples, of Open-Sora for a given seed.
                return draw_noise_like(torch.cat([like, like]))[:count]
            return draw_noise_like(like, generator)

        for step in each_step(range(self.num_timesteps)[::-1], progress):
            t = torch.full((count,), step, dtype=torch.int64, device=x.device)
            x = self.p_sample(guided, x, t, model_kwargs, mask, draw_noise=draw_noise)
        return x
