"""The losses of a training step: all that is random is drawn first, then they are computed without a draw.

So a step can be computed again, or be a graph that is replayed (see `graphs.py`), with the same random numbers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.diffusion.noise import draw_noise_like
from opensora_fast.model import STDiT2

# The inputs that are not arguments of the model.
LATENTS, NOISE, TIMESTEPS = "latents", "noise", "timesteps"


def draw_inputs(
    model: STDiT2, diffusion: IDDPM, masks: MaskGenerator | None, latents: Tensor, conditions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that a step computes from, drawn from torch's default generators in this order: masks, timesteps,
    noise, dropped captions.

    Args:
        model: in train mode, it drops captions.
        masks: draws the given frames; None for none.
        latents: float32 [B, 4, T, h, w] on the device of the model.
        conditions: the model's other arguments.

    Returns:
        `latents`, `noise` (like them), `timesteps` int64 [B], and the model's other arguments, with `x_mask` bool
        [B, T] if a frame is given, and `dropped` bool [B] where captions may be dropped.
    """
    videos, _, frames = latents.shape[:3]
    inputs = {LATENTS: latents, **conditions}
    if masks is not None:
        drawn = torch.stack([masks.draw(frames) for _ in range(videos)])
        if not drawn.all():  # a batch of noised frames only needs no mask: the model does half the modulation
            inputs["x_mask"] = drawn
    inputs[TIMESTEPS] = diffusion.draw_timesteps(videos)
    inputs[NOISE] = draw_noise_like(latents)
    if model.training and model.y_embedder.dropout_probability > 0:
        inputs["dropped"] = model.y_embedder.draw_dropped(videos)
    return inputs


def compute_losses(model: Callable[..., Tensor], diffusion: IDDPM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`loss` and its parts `mse` and `vb`, each [] (the mean over the videos), from what `draw_inputs` gave."""
    conditions = dict(inputs)
    latents, noise, timesteps = (conditions.pop(name) for name in (LATENTS, NOISE, TIMESTEPS))
    losses = diffusion.losses_at(model, latents, timesteps, conditions, noise=noise, mask=conditions.get("x_mask"))
    return {"loss": losses["loss"].mean(), **{key: losses[key].mean() for key in ("mse", "vb") if key in losses}}
