"""What the providers of the whole model compute: a model with its optimizer, and one batch of random latents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from opensora_fast.diffusion import IDDPM
from opensora_fast.model import STDiT2, STDiT2Config
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.master_adamw import MasterAdamW

from ..shapes import Pack, Workload, text_lengths

TRAINING = "training"  # the direction of the rows
SEED = 0
LEARNING_RATE, EMA_DECAY, GRAD_CLIP = 2e-5, 0.9999, 1.0
FPS = 24.0

SCALARS = ("num_frames", "height", "width", "ar", "fps")  # that describe a video

Latents = Tensor | list[Tensor]


@dataclass(frozen=True)
class Training:
    """A model with random weights and everything that trains it."""

    model: STDiT2
    optimizer: MasterAdamW
    ema: EMA


def make_training(config: STDiT2Config, device: str, dtype: torch.dtype) -> Training:
    """Builds on the device. Weights that begin as zero get small random values: zeros would compute faster."""
    torch.manual_seed(SEED)
    with torch.device(device):
        model = STDiT2(config)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
        model.train()
        optimizer = MasterAdamW(model, dtype=dtype, device=torch.device(device), lr=LEARNING_RATE, grad_clip=GRAD_CLIP)
    return Training(model, optimizer, EMA(optimizer, EMA_DECAY))


@dataclass(frozen=True)
class ModelWork:
    """A model and one batch of latents.

    Attributes:
        latents: float32 [B, 4, T, h, w]; of a mixed pack a list of the videos [4, T, h, w].
        timestep: [B].
        conditions: the model's other arguments, on the host but for the text.
    """

    model: STDiT2
    latents: Latents
    timestep: Tensor
    conditions: dict[str, Tensor]
    training: Training | None = None
    diffusion: IDDPM = field(default_factory=IDDPM)

    @property
    def device(self) -> str:
        return self.model.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def is_uniform(self) -> bool:
        return isinstance(self.latents, Tensor)

    def to(self, dtype: torch.dtype) -> ModelWork:
        """The same model and batch in another dtype; activations are recomputed, so that float64 fits."""
        with torch.device(self.device):
            model = STDiT2(self.model.config).to(dtype)
        model.load_state_dict(self.model.state_dict())
        model.train(self.model.training)
        model.set_checkpointing(True)
        conditions = dict(self.conditions, y=self.conditions["y"].to(dtype))
        latents = self.latents.to(dtype) if self.is_uniform else [video.to(dtype) for video in self.latents]
        return replace(self, model=model, latents=latents, conditions=conditions, training=None)


def make_model_work(model: STDiT2, pack: Workload | Pack, text: int, training: Training | None = None) -> ModelWork:
    """Random videos; `text`: mean tokens of a caption."""
    pack = Pack.of(pack) if isinstance(pack, Workload) else pack
    config, device, videos = model.config, model.device, len(pack.videos)
    generator = torch.Generator(device).manual_seed(SEED)
    parts = []
    for part in pack.parts:
        shape = (part.batch, config.in_channels, *part.latent)
        parts.append(torch.randn(shape, generator=generator, device=device))
    latents = parts[0] if pack.is_uniform else [video for part in parts for video in part]
    length = config.model_max_length
    text_shape = (videos, 1, length, config.caption_channels)
    y = torch.randn(text_shape, generator=generator, device=device).to(model.dtype)
    lengths = torch.tensor(text_lengths(videos, min(text, length)))
    frames, height, width = (
        torch.tensor(sizes, dtype=torch.float32)
        for sizes in zip(*((video.frames, *video.pixels) for video in pack.videos), strict=True)
    )
    conditions = {
        "y": y,
        "mask": (torch.arange(length) < lengths[:, None]).long(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "ar": width / height,
        "fps": torch.full((videos,), FPS),
    }
    timestep = torch.randint(0, 1000, (videos,), generator=torch.Generator().manual_seed(SEED))
    # Open-Sora rounds them to the model's dtype: numbers that bfloat16 has are the same to every provider.
    timestep = timestep.bfloat16().long()
    conditions |= {name: conditions[name].bfloat16().float() for name in SCALARS}
    return ModelWork(model, latents, timestep, conditions, training)
