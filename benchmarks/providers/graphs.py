"""The whole model as replayed CUDA graphs, as the trainer replays small steps and the sampler the model's calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.cuda_graphs import Recorder
from opensora_fast.model import STDiT2
from opensora_fast.sampling.replayed_model import ReplayedModel
from opensora_fast.train.step.graphs import StepGraphs
from opensora_fast.train.step.losses import LATENTS, TIMESTEPS, compute_losses, draw_inputs

from ..measuring.accuracy import OUTPUT, weights_like
from ..measuring.timing import Call
from .model_work import ModelWork


@dataclass(frozen=True)
class GraphedModel:
    """A way to compute the model, whose results, training steps and calls are those of replayed graphs.

    Attributes:
        model: on the parameters of the work's model.
        work: one batch of videos of one shape.
        record: see `StepGraphs`.
    """

    model: STDiT2
    work: ModelWork
    record: Recorder | None = None

    def replay(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, random weights like it, and the gradients of the parameters of its sum with these weights.

        A step on other latents comes before the capture, so that results of anything but the replay would be wrong.
        """
        work, model = self.work, self.work.model
        latents = work.latents
        inputs = {LATENTS: latents, TIMESTEPS: work.timestep, **work.conditions}
        if model.training and model.y_embedder.dropout_probability > 0:
            inputs["dropped"] = model.y_embedder.draw_dropped(len(latents))
        shape = (len(latents), model.config.out_channels, *latents.shape[2:])
        inputs["weights"] = weights_like([torch.empty(shape, device=latents.device)])[0]

        def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
            latents, timestep, weights = (given.pop(name) for name in (LATENTS, TIMESTEPS, "weights"))
            output = self.model(latents, timestep, **given)
            return {OUTPUT: output, "loss": (output * weights).sum()}

        graphs = self._make_graphs(compute)
        graphs.compute_losses(inputs | {LATENTS: torch.zeros_like(latents)})
        results = graphs.compute_losses(inputs)
        graphs.backward(results)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad(set_to_none=True)
        return results[OUTPUT].clone(), inputs["weights"], gradients

    def make_step(self) -> Call:
        """Forward, loss, backward, optimizer and average of the weights: replayed from the third call on, captured in
        the second, whose peak of memory is therefore that of the graphs too."""
        work, training = self.work, self.work.training
        assert training is not None
        graphs = self._make_graphs(lambda inputs: compute_losses(self.model, work.diffusion, inputs))

        def step() -> None:
            inputs = draw_inputs(work.model, work.diffusion, None, work.latents, work.conditions)
            try:
                graphs.backward(graphs.compute_losses(inputs | {TIMESTEPS: work.timestep}))
            except Exception:  # out of memory: what backward has left must not add to the next provider's
                training.model.zero_grad(set_to_none=True)
                raise
            training.optimizer.step(training.ema)

        return step

    def make_model(self) -> ReplayedModel:
        """The model as a sampler calls it, which drops no captions."""
        model = copy.copy(self.model)
        model.training = False  # of the copy alone: the modules below are shared
        return ReplayedModel(model, 2 * self._count_tokens(), self.record)

    def _count_tokens(self) -> int:
        return self.work.model.get_layout([self.work.latents]).num_tokens

    def _make_graphs(self, compute: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> StepGraphs:
        return StepGraphs(self.work.model, compute, self._count_tokens(), record=self.record)
