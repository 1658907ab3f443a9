"""The whole ST-DiT-2 in every way of `variants.py`, over one set of weights: for training steps and for sampling steps.

All variants are views of the same parameters, so that any number of them fits beside one optimizer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opensora_fast.diffusion.guidance import GuidedModel
from opensora_fast.model import STDiT2
from opensora_fast.model.block import PackContext

from ..measuring.accuracy import OUTPUT, Named, norm, weights_like
from ..measuring.provider import Bound, Provider
from ..measuring.timing import Call
from .blocks import ONE_SHAPE, compile_alone, missing_on
from .graphs import GraphedModel
from .model_work import SEED, Latents, ModelWork
from .open_sora import open_sora_view
from .upstream import UpstreamSTDiT2
from .variants import REFERENCE, VARIANT_OF, VARIANTS, Variant, attention_by

Model = Callable[..., Latents]  # of a batch, or of the videos of a mixed pack


@dataclass(frozen=True)
class BoundModel:
    """A variant of the work's model; called, it computes the work's batch."""

    model: Model
    work: ModelWork

    def __call__(self) -> Latents:
        return self.model(self.work.latents, self.work.timestep, **self.work.conditions)


def model_provider(variant: Variant) -> Provider:
    def prepare(work: ModelWork) -> Bound:
        if variant.graphed:
            return GraphedModel(own_view(work.model, variant), work)
        return BoundModel(view_of(work.model, variant), work)

    def missing(work: ModelWork) -> str:
        one_shape = variant.is_upstream or variant.graphed
        return ONE_SHAPE if one_shape and not work.is_uniform else missing_on(variant, work)

    return Provider(variant.name, prepare, missing, variant.version)


MODEL_PROVIDERS = tuple(model_provider(variant) for variant in VARIANTS)
# Both are eager PyTorch, in our order of operations and in upstream's; recomputed, as the check is not timed.
MODEL_REFERENCES = tuple(model_provider(VARIANT_OF[name]) for name in ("eager-recompute", "upstream"))


def view_of(model: STDiT2, variant: Variant) -> Model:
    """The model computed as the variant does; parameters and modules are shared, `model` itself stays as it is."""
    if variant.installed:
        return open_sora_view(model, variant.flash, bool(variant.recompute))
    if variant.is_upstream:
        view = UpstreamSTDiT2(model.config, flash=variant.flash, checkpointing=bool(variant.recompute), own=model)
        view.train(model.training)
        if variant.compiled:
            for block in view.blocks:
                block.compile(dynamic=False)
        return view
    own = own_view(model, variant)

    def call(latents: Latents, *arguments: Any, **conditions: Any) -> Latents:
        function = own if isinstance(latents, Tensor) else own.forward_packed
        with attention_by(variant.sdpa_order):
            return function(latents, *arguments, **conditions)

    return call


def own_view(model: STDiT2, variant: Variant) -> STDiT2:
    """As `view_of` for this project's order of operations, but for the attention that the variant prefers."""
    own = copy.copy(model)
    own._modules = dict(model._modules)
    own.backends = variant.backends or REFERENCE
    own.checkpointed_blocks = round(variant.recompute * len(model.blocks))
    if variant.compiled:
        _compile_blocks(own, variant)
    return own


def _compile_blocks(own: STDiT2, variant: Variant) -> None:
    """Has a view's blocks computed by one compiled function: one graph, the same for all."""
    function = compile_alone(variant)

    def run_blocks(x: Tensor, context: PackContext) -> Tensor:
        for index, block in enumerate(own.blocks):
            arguments = block, x, context
            if index < own.checkpointed_blocks and torch.is_grad_enabled():
                x = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = function(*arguments)
        return x

    own.run_blocks = run_blocks


def model_results(bound: Bound, work: ModelWork) -> tuple[Named, float]:
    """The output and the gradients of all parameters by name; caption dropout draws the same for everyone."""
    torch.manual_seed(SEED)
    trained = {name: parameter for name, parameter in work.model.named_parameters() if parameter.requires_grad}
    if isinstance(bound, GraphedModel):
        output, weight, gradients = bound.replay()
        outputs, weights = [output], [weight]
    else:
        outputs = _as_list(bound())
        weights = weights_like(outputs)
        gradients = torch.autograd.grad(outputs, list(trained.values()), weights)
    detached = [output.detach() for output in outputs]
    named = dict(zip(trained, gradients, strict=True))
    return {OUTPUT: detached, "gradient of the parameters": named}, norm(weights)


def sampling_output(bound: Bound, work: ModelWork) -> tuple[Named, float]:
    """The output of the model as a sampler calls it, without gradients."""
    torch.manual_seed(SEED)
    if not isinstance(bound, GraphedModel):
        with torch.no_grad():
            return {OUTPUT: _as_list(bound())}, 0.0
    conditions = dict(work.conditions)
    if work.model.training and work.model.y_embedder.dropout_probability > 0:
        conditions["dropped"] = work.model.y_embedder.draw_dropped(len(work.latents))  # as the others draw them
    model = bound.make_model()
    # On other latents: results of anything but a replay would be wrong.
    model(torch.zeros_like(work.latents), work.timestep, **conditions)
    return {OUTPUT: [model(work.latents, work.timestep, **conditions)]}, 0.0


def _as_list(latents: Latents) -> list[Tensor]:
    return [latents] if isinstance(latents, Tensor) else latents


def training_call(bound: Bound, work: ModelWork) -> Call:
    """Forward, loss, backward, optimizer and average of the weights; nothing waits for the GPU."""
    if isinstance(bound, GraphedModel):
        return bound.make_step()
    assert isinstance(bound, BoundModel)
    return step_call(bound.model, work, lambda: (work.latents, work.conditions))


def step_call(model: Model, work: ModelWork, encode: Callable[[], tuple[Latents, Mapping[str, Any]]]) -> Call:
    """A training step whose latents and conditions come from `encode`."""
    training = work.training
    assert training is not None

    def step() -> None:
        latents, conditions = encode()
        try:
            compute_losses(model, work, latents, dict(conditions)).mean().backward()
        except Exception:  # out of memory: what backward has left must not add to the next provider's
            training.model.zero_grad(set_to_none=True)
            raise
        training.optimizer.step(training.ema)

    return step


def compute_losses(model: Model, work: ModelWork, latents: Latents, conditions: dict[str, Any]) -> Tensor:
    """The loss of each video, [B]; the model computes the videos of a mixed pack in one pass."""
    diffusion, timestep = work.diffusion, work.timestep
    if isinstance(latents, Tensor):
        return diffusion.training_losses(model, latents, timestep, conditions)["loss"]
    parts = _equal_shapes(latents)
    steps = timestep.to(work.model.device, non_blocking=True).split([len(part) for part in parts])
    noises = [torch.randn_like(part) for part in parts]
    noised = [diffusion.q_sample(*part) for part in zip(parts, steps, noises, strict=True)]
    outputs = model([video for part in noised for video in part], timestep, **conditions)
    losses = []
    for part, step, noise in zip(parts, steps, noises, strict=True):
        output = torch.stack(outputs[: len(part)])
        outputs = outputs[len(part) :]
        known = lambda *arguments, output=output: output  # noqa: E731
        losses.append(diffusion.training_losses(known, part, step, noise=noise)["loss"])
    return torch.cat(losses)


def _equal_shapes(videos: Sequence[Tensor]) -> list[Tensor]:
    """Batches of the videos of one shape that follow each other."""
    return [torch.stack(list(batch)) for _, batch in itertools.groupby(videos, lambda video: video.shape)]


def sampling_call(bound: Bound, work: ModelWork) -> Call:
    """One step of guided sampling: the model on twice the videos, guidance, and the draw of the next latents."""
    model = bound.make_model() if isinstance(bound, GraphedModel) else bound.model
    guided = GuidedModel(model, cfg_scale=7.0)
    videos = work.latents.shape[0]
    steps = torch.full((videos,), work.diffusion.num_timesteps // 2, device=work.latents.device)
    conditions = dict(work.conditions, y=torch.cat([work.conditions["y"]] * 2))

    def step() -> Tensor:
        with torch.no_grad():
            return work.diffusion.p_sample(guided, work.latents, steps, conditions)

    return step
