"""What several processes should compute together, in one and in plain PyTorch."""

from contextlib import closing

import torch

from opensora_fast.diffusion import MaskGenerator
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.inputs.sources import open_clips
from opensora_fast.train.optimizer.master_adamw import BETAS, EPSILON
from opensora_fast.train.parts import build_diffusion, build_model, make_model_config
from opensora_fast.train.step.losses import compute_losses, draw_inputs
from opensora_fast.train.step.randomness import seed_step

CPU = torch.device("cpu")


class OneProcess:
    """The same training in plain PyTorch: micro-batch by micro-batch, their mean gradient and AdamW in float64."""

    def __init__(self, config, world_size, encoders, stack):
        sources = [
            stack.enter_context(closing(open_clips(config, data, encoders, CPU, torch.float32, print)))
            for data in (read_data(config, rank, world_size) for rank in range(world_size))
        ]
        self.batches = [stack.enter_context(closing(source.loader.iterate(0, 0))) for source in sources]
        source = sources[0]
        self.model = build_model(make_model_config(config, **source.model_keys), config.seed, False)
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.weights = {name: value.detach().double() for name, value in trained.items()}
        self.average = {name: value.clone() for name, value in self.weights.items()}
        self.model.to(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
        self.parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=config.lr, betas=BETAS, eps=EPSILON, weight_decay=0.0
        )
        self.config = config
        self.inputs = source.inputs
        self.diffusion = build_diffusion(config)
        self.masks = MaskGenerator(config.mask_ratios)

    def step(self, number):
        """Mean of the losses, and norm of the mean gradient."""
        losses, gradients = [], []
        for rank, batches in enumerate(self.batches):
            seed_step(self.config.seed, number, rank)
            inputs = draw_inputs(self.model, self.diffusion, self.masks, *self.inputs.prepare(next(batches)))
            loss = compute_losses(self.model, self.diffusion, inputs)["loss"]
            gradients.append([gradient.double() for gradient in torch.autograd.grad(loss, self.parameters.values())])
            losses.append(loss.item())
        for weight, *parts in zip(self.weights.values(), *gradients, strict=True):
            weight.grad = sum(parts) / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.parameters[name].copy_(weight)
                self.average[name] = self.config.ema_decay * self.average[name] + (1 - self.config.ema_decay) * weight
        return sum(losses) / len(losses), float(norm)
