"""Small stand-ins for encoders, a model and a sampler."""

import torch
import torch.nn.functional as F
from torch import nn


class PixelEncoder:
    """Latents are 8 times smaller frames: three colors and a zero. Areas of one color come back exactly."""

    out_channels = 4

    def get_latent_size(self, input_size):
        frames, height, width = input_size
        return [frames, height // 8, width // 8]

    def encode(self, video, generator=None):
        height, width = (size // 8 * 8 for size in video.shape[3:])
        small = F.avg_pool3d(video[..., :height, :width], (1, 8, 8))
        return torch.cat([small, torch.zeros_like(small[:, :1])], dim=1)

    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=(1, 8, 8))


class LetterEncoder:
    """A text's embedding is a function of its letters."""

    output_dim = 4
    model_max_length = 3

    def encode(self, texts):
        sums = torch.tensor([[len(text), sum(map(ord, text)) % 97, 1.0, 0.0] for text in texts]) / 50
        return {"y": sums[:, None, None].repeat(1, 1, 3, 1), "mask": torch.ones(len(texts), 3, dtype=torch.int64)}

    def null(self, count):
        return torch.zeros(count, 1, 3, 4)


class ToyModel(nn.Module):
    """Predicts noise that depends on the text; with dropout, so that training mode shows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    @property
    def device(self):
        return self.scale.device

    def forward(self, x, timestep, y, mask=None, x_mask=None, **conditions):
        noise = self.dropout(self.scale * x + y.mean((1, 2, 3)).view(-1, 1, 1, 1, 1))
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)


class RecordingScheduler:
    """Returns the starting latents as they are and keeps what it was called with."""

    num_timesteps = 2

    def __init__(self):
        self.calls = []

    def sample(self, model, text_encoder, z, prompts, device, additional_args=None, mask=None, **options):
        call = {"z": z.clone(), "prompts": prompts, "conditions": additional_args, "mask": mask}
        seeds = [generator.initial_seed() for generator in options["generator"]]
        self.calls.append(call | {"training": model.training, "seeds": seeds})
        return z


def color_clip(*levels, height=16, width=24):
    """A clip [3, T, H, W] whose frames have one gray level each."""
    return torch.tensor(levels).view(1, -1, 1, 1).expand(3, -1, height, width).contiguous()
