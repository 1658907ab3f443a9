"""The SD VAE and T5 of the real sizes, random weights: training steps that encode their clips and captions themselves,
and the VAE alone, in the layouts that its convolutions can have.

Open-Sora's published speeds include both. Encoders of random weights take as long as trained ones.
"""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from opensora_fast.costs.operations import Count
from opensora_fast.encoders.t5 import T5Encoder
from opensora_fast.encoders.vae import VideoAutoencoderKL

from ..measuring.case import Case, Outcome, make_template
from ..measuring.contest import run_contest
from ..measuring.provider import Bound, Provider, choose_providers
from ..measuring.race import Check, Entry, relative_check, run_race
from ..measuring.session import Session
from ..measuring.timing import Call, Sampling
from ..providers.model_work import TRAINING, ModelWork
from ..providers.models import BoundModel, step_call
from ..providers.vae import VAE_PROVIDERS, VaeWork
from ..shapes import Pack, Workload, text_lengths
from .models import by_importance, count_step, model_contest, model_sampling, model_template, shared_training
from .scale import Scale

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

VALUE = 560.0
ENCODER_BYTES = 10e9
MICRO_BATCH = 4  # frames at a time, as Open-Sora's configurations say
NEEDED = ("diffusers", "transformers")


@dataclass(frozen=True)
class EncoderSizes:
    """Arguments of `AutoencoderKL` and `T5Config`."""

    vae: Mapping[str, Any]
    t5: Mapping[str, Any]


def sizes_of(scale: Scale) -> EncoderSizes:
    """The real sizes on a GPU (83.7 M and 4.76 G parameters), tiny ones on the CPU."""
    is_gpu = scale.device == "cuda"
    return EncoderSizes(
        vae={
            "block_out_channels": (128, 256, 512, 512) if is_gpu else (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2 if is_gpu else 1,
            "norm_num_groups": 32 if is_gpu else 4,
            "latent_channels": 4,
        },
        t5={
            "vocab_size": 32128 if is_gpu else 384,
            "d_model": scale.config.caption_channels,
            "d_kv": 64 if is_gpu else 8,
            "d_ff": 10240 if is_gpu else 32,
            "num_layers": 24 if is_gpu else 1,
            "num_heads": 64 if is_gpu else 2,
            "feed_forward_proj": "gated-gelu",
        },
    )


@dataclass(frozen=True)
class Encoders:
    video: VideoAutoencoderKL
    text: T5Encoder


def build_vae(scale: Scale) -> AutoencoderKL:
    """The VAE on the device, in its dtype."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    with torch.device(scale.device):
        return AutoencoderKL(**sizes_of(scale).vae).to(scale.dtype)


def build_encoders(scale: Scale) -> Encoders:
    """Both encoders on the device; T5's tokenizer is that of bytes, which needs no file."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    vae = build_vae(scale)
    with torch.device(scale.device):
        t5 = T5EncoderModel(T5Config(**sizes_of(scale).t5)).to(scale.dtype)
    text = T5Encoder(t5, ByT5Tokenizer(), scale.config.model_max_length, clean_captions=False)
    return Encoders(VideoAutoencoderKL(vae, MICRO_BATCH), text)


def list_cases(scale: Scale) -> list[Case]:
    """The first headline workload, and what the VAE alone takes for it."""
    workload = by_importance(scale.steps)[0]
    return [step_case(scale, workload), vae_case(scale, workload)]


def step_case(scale: Scale, workload: Workload) -> Case:
    """A training step that encodes."""
    fits = workload.tokens <= scale.most_tokens("eager", beside=ENCODER_BYTES)
    names = ("upstream", "upstream-flash", "eager" if fits else "eager-recompute", "ours")
    template = model_template(scale, "step", Pack.of(workload), op="with encoders")

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        training = shared_training(scale, session)
        contest = model_contest(
            scale, template, Pack.of(workload), training, names, model_sampling(scale, session, 6.0)
        )
        if lacking:
            reason = f"{lacking[0]} is not installed"
            providers = [_without(provider, reason) for provider in contest.providers]
            return run_contest(replace(contest, providers=providers), session)
        encode = make_encode(scale, workload, build_encoders(scale))
        with FlopCounterMode(display=False) as counter:
            encode()
        count = count_step(scale, Pack.of(workload), training) + Count(float(counter.get_total_flops()))

        def make_call(bound: Bound, work: ModelWork) -> Call:
            assert isinstance(bound, BoundModel)

            def inputs() -> tuple[Tensor, dict[str, Any]]:
                latents, encoded = encode()
                return latents, work.conditions | encoded

            return step_call(bound.model, work, inputs)

        return run_contest(replace(contest, calls={TRAINING: make_call}, counts={TRAINING: count}), session)

    return Case(template, (TRAINING,), names, VALUE, measure)


def _without(provider: Provider, reason: str) -> Provider:
    return replace(provider, missing=lambda work: reason)


def make_encode(scale: Scale, workload: Workload, encoders: Encoders) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """A call that encodes a batch of random clips, in host memory, and captions: (latents float32, text and mask)."""
    generator = torch.Generator().manual_seed(0)
    height, width = workload.pixels
    video = torch.rand(workload.batch, 3, workload.frames, height, width, generator=generator) * 2 - 1
    if scale.device == "cuda":
        video = video.pin_memory()
    letters = string.ascii_lowercase + " "
    captions = []
    for length in text_lengths(workload.batch, scale.text):
        # One token for each letter, and one for the end.
        picked = torch.randint(len(letters), (max(length - 1, 1),), generator=generator)
        captions.append("".join(letters[index] for index in picked.tolist()))

    @torch.no_grad()
    def encode() -> tuple[Tensor, dict[str, Tensor]]:
        latents = encoders.video.encode(video.to(scale.device, non_blocking=True)).float()
        return latents, dict(encoders.text.encode(captions))

    return encode


# ---- the VAE alone ----


def vae_case(scale: Scale, workload: Workload) -> Case:
    """A micro-batch of frames, as the VAE is given them in training."""
    part = Workload(workload.resolution, MICRO_BATCH)
    height, width = part.pixels
    template = make_template(
        "op",
        part.name,
        op="vae_encode",
        shape=f"{MICRO_BATCH} frames of {height} x {width}",
        tokens=part.tokens,
        dtype=scale.dtype_name,
    )

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        lacking = "" if importlib.util.find_spec("diffusers") else "diffusers is not installed"
        work = None if lacking else VaeWork.draw(build_vae(scale), part)
        entries = [
            Entry(
                provider.name,
                provider.version(),
                "forward",
                partial(_prepare_vae, provider, work),
                lacking or provider.missing(work),
                Count() if work is None else work.count,
            )
            for provider in choose_providers(VAE_PROVIDERS, names)
        ]
        sampling = Sampling(session.sampling_seconds(scale.seconds))
        return run_race(template, entries, sampling, session)

    return Case(template, ("forward",), tuple(provider.name for provider in VAE_PROVIDERS), VALUE - 1, measure)


def _prepare_vae(provider: Provider, work: VaeWork) -> tuple[Call, Callable[[], Check]]:
    encode, results = provider.prepare(work), []

    @torch.no_grad()
    def call() -> None:
        results[:] = [encode()]

    return call, lambda: relative_check(results[0], work.exact, work.limit)
