"""One block of ST-DiT-2, computed in every way of `variants.py`, with the gradients of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_fast.kernels import PackLayout, TextLayout
from opensora_fast.kernels.linear import check_quack
from opensora_fast.model import STDiT2Config
from opensora_fast.model.block import PackContext, STDiT2Block, compute_block
from opensora_fast.model.embedders import RotaryFrequencies, rotary_tables

from ..measuring.provider import Bound, Provider, compiled, compiles_on_cuda, needs_cuda
from ..shapes import Pack, text_lengths
from .open_sora import missing_open_sora
from .upstream import UpstreamBlock, varlen_starts
from .variants import REFERENCE, VARIANT_OF, VARIANTS, Variant, attention_by

ONE_SHAPE = "takes videos of one shape only"


@dataclass(frozen=True)
class BlockWork:
    """A block, its inputs and what the layers around it made.

    Attributes:
        inputs: x [N, C], text [M, C], space [B, 6, C] and time [B, 3, C], the outputs of the modulation's Linears.
        frequencies: float32 [D/2], of the rotary embedding.
    """

    block: STDiT2Block
    layout: PackLayout
    text_lengths: tuple[int, ...]
    inputs: dict[str, Tensor]
    frequencies: Tensor

    @property
    def device(self) -> str:
        return self.layout.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs["x"].dtype

    @property
    def leaves(self) -> dict[str, Tensor]:
        return self.inputs | dict(self.block.named_parameters())

    @property
    def is_uniform(self) -> bool:
        return len(self.layout.runs) == 1

    def to(self, dtype: torch.dtype) -> BlockWork:
        """The same values in another dtype, as fresh leaves."""
        inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in self.inputs.items()}
        return replace(self, block=copy.deepcopy(self.block).to(dtype), inputs=inputs)


def make_block_work(config: STDiT2Config, pack: Pack, text: int, device: str, dtype: torch.dtype) -> BlockWork:
    """A block with random weights and random inputs; `text`: mean tokens of a caption."""
    torch.manual_seed(0)
    channels = config.hidden_size
    layout = PackLayout.of(pack.shapes, device)  # not below: it computes on the host, on the default device
    with torch.device(device):
        block = STDiT2Block(channels, config.num_heads, config.mlp_ratio, config.qk_norm).to(dtype)
        lengths = text_lengths(layout.num_videos, text)
        sizes = {
            "x": (layout.num_tokens, channels),
            "text": (sum(lengths), channels),
            "space": (layout.num_videos, 6, channels),
            "time": (layout.num_videos, 3, channels),
        }
        inputs = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
        frequencies = RotaryFrequencies(config.head_size, rounding=False).freqs.detach()
    return BlockWork(block, layout, tuple(lengths), inputs, frequencies)


def compute_alone(block: STDiT2Block, x: Tensor, context: PackContext) -> Tensor:
    """x [N, C] → [N, C], nothing made for the next block."""
    return compute_block(block, x, None, context, None)[0]


def compile_alone(variant: Variant) -> Callable[[STDiT2Block, Tensor, PackContext], Tensor]:
    """`compute_alone` as one graph."""
    return compiled(compute_alone, options=dict(variant.options))


def _prepare_own(variant: Variant, work: BlockWork) -> Bound:
    cos, sin = rotary_tables(work.frequencies, work.layout.max_frames)
    inputs = work.inputs
    context = PackContext(
        layout=work.layout,
        frame_rows=work.layout.frame_video,
        text=inputs["text"],
        text_layout=TextLayout.from_lengths(work.text_lengths, work.layout.device),
        space_and_mlp=inputs["space"],
        time=inputs["time"],
        cos=cos,
        sin=sin,
        backends=variant.backends or REFERENCE,
    )
    function = compile_alone(variant) if variant.compiled else compute_alone

    def call() -> Tensor:
        with attention_by(variant.sdpa_order):
            return function(work.block, inputs["x"], context)

    return call


def _prepare_upstream(variant: Variant, work: BlockWork) -> Bound:
    block = UpstreamBlock(work.block, work.frequencies, variant.flash)
    function = compiled(block.forward) if variant.compiled else block
    inputs = work.inputs
    run = work.layout.runs[0]
    lengths = list(work.text_lengths)
    starts = varlen_starts(inputs["x"].unflatten(0, (run.videos, -1)), lengths) if variant.flash else None

    def call() -> Tensor:
        output = function(
            inputs["x"].unflatten(0, (run.videos, -1)),
            inputs["text"][None],
            inputs["space"].flatten(1),
            inputs["time"].flatten(1),
            lengths,
            T=run.frames,
            S=run.frame_tokens,
            starts=starts,
        )
        return output.flatten(0, 1)

    return call


def block_provider(variant: Variant) -> Provider:
    """The provider of a variant; recomputation and graphs of whole steps mean nothing for a single block."""

    def prepare(work: BlockWork) -> Bound:
        return (_prepare_upstream if variant.is_upstream else _prepare_own)(variant, work)

    def missing(work: BlockWork) -> str:
        if variant.is_upstream and not work.is_uniform:
            return ONE_SHAPE
        return missing_on(variant, work)

    return Provider(variant.name, prepare, missing, variant.version)


def missing_on(variant: Variant, work: BlockWork) -> str:
    """Why a variant cannot run where the work is."""
    if variant.installed:
        return missing_open_sora(variant.flash, work)
    if variant.compiled:
        return compiles_on_cuda(work)
    if variant.uses_quack:
        try:
            check_quack(torch.device(work.device), work.dtype)
        except ValueError as error:
            return str(error)
    return needs_cuda(work) if variant.uses_triton or variant.sdpa else ""


BLOCK_PROVIDERS = tuple(
    block_provider(variant)
    for variant in VARIANTS
    if not (variant.installed or "-recompute" in variant.name or variant.name.endswith(("-stored", "-graph")))
)
# Both are eager PyTorch, in our order of operations and in upstream's.
BLOCK_REFERENCES = tuple(block_provider(VARIANT_OF[name]) for name in ("eager", "upstream"))
