"""Small stand-ins for a model and a text encoder."""

import torch


class ToyTextEncoder:
    """Gives fixed embeddings for any prompt."""

    def __init__(self, count: int, length: int = 3, channels: int = 5, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.y = torch.randn(count, 1, length, channels, generator=generator, dtype=dtype)
        self.empty = torch.randn(1, 1, length, channels, generator=generator, dtype=dtype)

    def encode(self, prompts):
        return {"y": self.y, "mask": torch.ones(len(prompts), self.y.shape[2], dtype=torch.int64)}

    def null(self, count):
        return self.empty.repeat(count, 1, 1, 1)


class ToyModel:
    """A smooth function of everything that a model is given, and a record of its calls."""

    def __init__(self, channels: int = 4) -> None:
        generator = torch.Generator().manual_seed(3)
        self.mix = torch.randn(2 * channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
        self.calls = []

    def __call__(self, x, timestep, y, mask=None, x_mask=None, **conditioning):
        self.calls.append({"x": x, "timestep": timestep, "y": y, "mask": mask, "x_mask": x_mask, **conditioning})
        value = torch.einsum("oc,bcthw->bothw", self.mix.to(x.dtype), x)
        value = value + (timestep.to(x.dtype) / 300).sin().view(-1, 1, 1, 1, 1) + y.mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        if x_mask is not None:
            value = value + 0.3 * x_mask[:, None, :, None, None].to(x.dtype)
        return torch.tanh(value)
