"""What every sampler needs: classifier-free guidance, the text for it, and a loop over steps with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_fast.progress import Progress


class GuidedModel:
    """A model whose prediction is pushed away from the unconditional one (Ho & Salimans 2022, arXiv:2207.12598).

    Called with n rows, it asks the model for 2n, conditional then unconditional, and returns n: in the first
    `cfg_channel` channels unconditional + cfg_scale * (conditional - unconditional), in the others, the variance among
    them, the conditional output.

    Args:
        model: called as model(x [2n, C, T, H, W], timestep [2n], **model_kwargs).
        cfg_scale: 1 is no guidance.
        cfg_channel: number of guided channels; None guides all C, the predicted noise. (Open-Sora takes half of the
            output for it, which it is not where no variance is predicted.)

    Raises:
        ValueError (of calls): `cfg_channel` is more than C.
    """

    def __init__(self, model: Callable[..., Tensor], cfg_scale: float, cfg_channel: int | None = None) -> None:
        self.model = model
        self.cfg_scale = cfg_scale
        self.cfg_channel = cfg_channel

    def __call__(self, x: Tensor, timestep: Tensor, **model_kwargs: Any) -> Tensor:
        """Guided output [n, C or 2C, T, H, W] for x [n, C, T, H, W]; an `x_mask` has n rows, `y` 2n."""
        if model_kwargs.get("x_mask") is not None:
            model_kwargs["x_mask"] = torch.cat([model_kwargs["x_mask"]] * 2)
        guided_channels = x.shape[1] if self.cfg_channel is None else self.cfg_channel
        if guided_channels > x.shape[1]:
            raise ValueError(f"cfg_channel={guided_channels}: {x.shape[1]} channels can be guided; give fewer, or None")
        output = self.model(torch.cat([x, x]), torch.cat([timestep, timestep]), **model_kwargs)
        conditional, unconditional = output.chunk(2)
        guided = unconditional[:, :guided_channels] + self.cfg_scale * (
            conditional[:, :guided_channels] - unconditional[:, :guided_channels]
        )
        return torch.cat([guided, conditional[:, guided_channels:]], dim=1)


def encode_with_unconditional(
    text_encoder: Any, model: Any, prompts: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Encode n prompts and append the unconditional text: {"y": [2n, 1, L, C], "mask": [n, L], ...}, a new dict.

    The unconditional text is `text_encoder.null(n)` where there is such a method, else the model's buffer
    `y_embedder.y_embedding` [L, C].
    """
    encoded = dict(text_encoder.encode(prompts))
    text = encoded["y"].to(device)
    if hasattr(text_encoder, "null"):
        unconditional = text_encoder.null(len(prompts))
    elif hasattr(model, "y_embedder"):
        unconditional = model.y_embedder.y_embedding[None, None].expand(len(prompts), -1, -1, -1)
    else:
        raise ValueError(
            "guidance needs an unconditional text, but the text encoder has no null(n) and the model no "
            "y_embedder.y_embedding; give one of them"
        )
    unconditional = unconditional.to(device=device, dtype=text.dtype)
    if unconditional.shape != text.shape:
        raise ValueError(
            f"the unconditional text has shape {tuple(unconditional.shape)}, the encoded prompts {tuple(text.shape)}; "
            "both need the model's text length (model_max_length) and channels (caption_channels)"
        )
    encoded["y"] = torch.cat([text, unconditional])
    return encoded


def each_step(steps: Sequence[int], progress: bool | Progress) -> Iterator[int]:
    """Iterate over the steps of a sampler.

    Args:
        steps: what to iterate over.
        progress: True shows a bar, a running `Progress` is advanced by 1 after each step, False shows nothing.
    """
    if progress is True:
        with Progress("sample", total=len(steps), unit="steps") as bar:
            yield from each_step(steps, bar)
        return
    for step in steps:
        yield step
        if progress:
            progress.advance(1)
