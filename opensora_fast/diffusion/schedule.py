"""Noise schedules: which noise levels a diffusion process passes through, and the coefficients that follow from them.

Notation of DDPM (Ho et al. 2020, arXiv:2006.11239) and IDDPM (Nichol & Dhariwal 2021, arXiv:2102.09672):
beta_t is the variance added at step t, alpha_t = 1 - beta_t, and alpha_bar_t their cumulative product. Step 0 is the
least noisy one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")


def make_betas(noise_schedule: str, steps: int) -> Tensor:
    """Betas of a named schedule, float64 [steps] on the CPU.

    "linear" is DDPM's 1e-4 to 0.02 at 1000 steps, scaled so that other step counts end at the same noise level;
    "squaredcos_cap_v2" is the cosine schedule of IDDPM (equation 17), each beta at most 0.999.

    Raises:
        ValueError: an unknown name, or a step count for which a beta would not lie between 0 and 1.
    """
    if steps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, got {steps}")
    if noise_schedule == "linear":
        scale = 1000 / steps
        betas = torch.linspace(scale * 0.0001, scale * 0.02, steps, dtype=torch.float64, device="cpu")
    elif noise_schedule == "squaredcos_cap_v2":
        edges = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
        betas = [min(1 - edges[i + 1] / edges[i], 0.999) for i in range(steps)]
        betas = torch.tensor(betas, dtype=torch.float64, device="cpu")
    else:
        raise ValueError(f"noise_schedule {noise_schedule!r} is unknown; use one of {', '.join(NOISE_SCHEDULES)}")
    if betas.max() >= 1:
        raise ValueError(
            f"diffusion_steps={steps} is too few for the {noise_schedule} schedule: a beta would be {betas.max():.3g}, "
            "but must stay below 1; use more steps"
        )
    return betas


def choose_timesteps(steps: int, respacing: str | Sequence[int]) -> list[int]:
    """Choose which of `steps` timesteps a shorter schedule keeps, in ascending order.

    The steps are cut into as many sections of (nearly) equal length as there are counts, and each section keeps its
    count of them, evenly spread from its first to its last step ("100", "10,20" or [10, 20]). "ddimN" keeps every k-th
    step, for the smallest k that leaves exactly N (Song et al. 2020, arXiv:2010.02502). A count of 1 keeps the first,
    that is the least noisy, step of its section.

    Raises:
        ValueError: a malformed string, a count below 0, a section that is too short, or an N that no stride gives.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = _parse_count(respacing[len("ddim") :], respacing)
        for stride in range(1, max(steps, 2)):
            kept = range(0, steps, stride)
            if len(kept) == count:
                return list(kept)
        raise ValueError(f"timestep_respacing {respacing!r}: no integer stride keeps {count} of {steps} steps")

    parts = respacing.split(",") if isinstance(respacing, str) else respacing
    counts = [_parse_count(part, respacing) for part in parts]
    if not counts or sum(counts) == 0:
        raise ValueError(f"timestep_respacing {respacing!r} keeps no step; give at least one count above 0")
    shortest, longer = divmod(steps, len(counts))
    kept, start = set(), 0
    for index, count in enumerate(counts):
        length = shortest + (1 if index < longer else 0)
        if count > length:
            raise ValueError(
                f"timestep_respacing {respacing!r}: section {index} has {length} steps, {count} cannot be kept of them"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The position is summed, not multiplied, so that rounding falls as in the schedules of released models.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return sorted(kept)


def _parse_count(text: str | int, respacing: object) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError(
            f'timestep_respacing {respacing!r}: {text!r} is not a step count; write e.g. "100", "10,20" or "ddim50"'
        )
    return count


def _rounded(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    # float32 square roots and logarithms differ by a last bit from one CPU to the next; correctly rounded ones do not.
    return function(values.double()).float()


class Schedule:
    """The coefficients of one (possibly respaced) diffusion process, as float32 tables over its steps.

    The original schedule is computed in float64. The respaced betas are then rounded to float32 and every table is
    derived from them in float32: that is the process which Open-Sora's weights were trained with. Exact tables would
    differ by up to 1e-3 (relative) at the least noisy steps, where 1 - alpha_bar loses its digits, and the losses with
    them.

    Attributes:
        num_timesteps: number of steps kept, n.
        timestep_map: for each step the original timestep, which is what the model is told.
        betas: float32 [n] on the CPU; likewise every name in `TABLES`.
    """

    TABLES = (
        "betas",
        "log_betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    )

    def __init__(self, original_betas: Tensor, timesteps: Sequence[int]) -> None:
        """Keep `timesteps` (ascending) of the process with `original_betas` (float64 [original steps])."""
        self.timestep_map = list(timesteps)
        self.num_timesteps = len(self.timestep_map)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

        # A kept step must take over the noise of the dropped ones before it: 1 - alpha_bar_t / alpha_bar_previous.
        kept = torch.cumprod(1.0 - original_betas, dim=0)[self.timestep_map]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        betas = (1 - kept / before).float()

        one = torch.ones(1, device="cpu")
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = torch.cat([one, alphas_cumprod[:-1]])
        self.betas = betas
        self.log_betas = _rounded(torch.log, betas)
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = alphas_cumprod_prev
        # q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), DDPM equation 4; and x_0 from x_t and the noise.
        self.sqrt_alphas_cumprod = _rounded(torch.sqrt, alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = _rounded(torch.sqrt, 1.0 - alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = _rounded(torch.sqrt, 1.0 / alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = _rounded(torch.sqrt, 1.0 / alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0), DDPM equations 6 and 7.
        self.posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        self.posterior_mean_coef1 = betas * _rounded(torch.sqrt, alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        root_alphas = _rounded(torch.sqrt, alphas)
        self.posterior_mean_coef2 = (1.0 - alphas_cumprod_prev) * root_alphas / (1.0 - alphas_cumprod)
        # The variance is 0 at step 0, so its logarithm there is that of step 1; a single step falls back to its beta.
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else betas
        self.posterior_log_variance_clipped = _rounded(torch.log, torch.cat([first, self.posterior_variance[1:]]))

    def lookup(self, table: str | Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Values of a table at steps `t`, ready to be multiplied with `like`.

        Args:
            table: a name in `TABLES`, or a float tensor [n] on the CPU.
            t: int64 [B], on any device.
            like: [B, ...].

        Returns:
            [B, 1, ...] with as many dimensions as `like`, on its device, float32.
        """
        values = self._table(table, t.device) if isinstance(table, str) else table.to(t.device, non_blocking=True)
        return values[t].to(like.device, non_blocking=True).view(-1, *[1] * (like.dim() - 1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The original timesteps of steps `t` (int64 [B]), on the same device and of the same dtype."""
        return self._table("timestep_map", t.device)[t].to(t.dtype)

    def _table(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._on_device:
            self._on_device[key] = torch.as_tensor(getattr(self, name), device=device)
        return self._on_device[key]
