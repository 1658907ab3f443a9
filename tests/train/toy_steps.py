"""Steps of a tiny model on random latents and text."""

import math
from functools import partial

import torch
from torch import nn

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.data.batch import Batch
from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.loop import Limits, Trainer
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.master_adamw import MasterAdamW
from opensora_fast.train.step.graphs import StepGraphs
from opensora_fast.train.step.losses import compute_losses

MASKS = {"mask_no": 0.5, "mask_image_head": 0.5}
# (videos, frames, latent height, latent width), in the order of an epoch.
SHAPES = [(2, 1, 6, 8), (1, 4, 6, 8), (2, 3, 4, 4)]
EPOCH = [SHAPES[index] for index in (0, 1, 0, 2, 1, 1, 0, 2, 2, 0)]


def make_model(device="cpu", **keys):
    """Of random weights, none of them zero, in train mode and float32."""
    torch.manual_seed(3)
    model = STDiT2(STDiT2Config.small(**{"class_dropout_prob": 0.4, "hidden_size": 144, **keys}))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return model.train().to(device)


def make_batch(number, shape, model_config, text_length=None):
    """The micro-batch of that number, of latents and text embeddings on the host."""
    generator = torch.Generator().manual_seed(number)
    videos, frames, height, width = shape
    length = text_length or model_config.model_max_length
    real = torch.arange(length) < torch.randint(1, length + 1, (videos, 1), generator=generator)
    text = torch.randn(videos, 1, length, model_config.caption_channels, generator=generator)
    pixels = torch.tensor([[8.0 * height], [8.0 * width]]).expand(2, videos)
    return Batch(
        video=None,
        text=["x"] * videos,
        num_frames=torch.full((videos,), float(frames)),
        height=pixels[0],
        width=pixels[1],
        ar=pixels[1] / pixels[0],
        fps=torch.full((videos,), 24.0),
        bucket=("144p", frames, f"{height}:{width}"),
        rows=tuple(range(videos)),
        index=number,
        epoch=0,
        latents=torch.randn(videos, model_config.in_channels, frames, height, width, generator=generator),
        text_embeddings=text * real[:, None, :, None],
        text_mask=real.long(),
    )


def make_trainer(
    out, steps, tokens=0, record=None, device="cpu", dtype=torch.float32, spoil=None, grad_checkpoint=0, diffusion=None
):
    """A trainer over the micro-batches of `EPOCH`; `tokens` of small steps are replayed.

    spoil: the micro-batch of that number has latents that are not finite.
    """
    device = torch.device(device)
    model = make_model()
    model.set_checkpointing(grad_checkpoint)
    optimizer = MasterAdamW(
        model, dtype=dtype, device=device, lr=1e-2, grad_clip=1.0, backend="auto", processes=Processes(device)
    )
    diffusion = diffusion or IDDPM()

    def list_batches(epoch, consumed):
        for number, shape in list(enumerate(EPOCH))[consumed:]:
            batch = make_batch(number, shape, model.config)
            batch.epoch = epoch
            if number == spoil:
                batch.latents.fill_(math.inf)
            yield batch

    graphs = StepGraphs(model, partial(compute_losses, model, diffusion), tokens, record=record) if tokens else None
    out.mkdir(exist_ok=True)
    return Trainer(
        model=model,
        optimizer=optimizer,
        ema=EMA(optimizer, 0.9),
        diffusion=diffusion,
        masks=MaskGenerator(MASKS),
        inputs=ModelInputs(None, None, device),
        batches=list_batches,
        extra_files=lambda folder: None,
        folder=out,
        replay=lambda checkpoint, step: "the command",
        limits=Limits(steps, 10, 2, 0, 2),
        seed=7,
        data_fingerprint="toy",
        graphs=graphs,
    )
