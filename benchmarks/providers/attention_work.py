"""Inputs of ST-DiT-2's three attentions, and what every implementation does around its core.

A provider takes what the op takes (packed qkv and the norm weights) and returns what the op returns, so each does the
same work: rotary embedding and QK-norm in upstream's order, then attention. Libraries without a fused norm get it from
eager PyTorch.

Letters: N tokens of the pack, M text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.costs.operations import Count
from opensora_fast.kernels import PackLayout, TextLayout
from opensora_fast.kernels.qk_norm_rotary import rms_norm_reference, rotary_reference

from .op_work import OpWork

KINDS = ("spatial", "temporal", "cross")
# q, k, v each [sequences, H, length, D] → [sequences, H, length, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionWork(OpWork):
    """Inputs of one attention call.

    Attributes:
        text_lengths: text tokens of each video, for cross-attention.
    """

    kind: str
    layout: PackLayout
    leaves: dict[str, Tensor]
    text: TextLayout | None = None
    text_lengths: tuple[int, ...] = ()
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def is_uniform(self) -> bool:
        """All sequences are equally long."""
        return len(self.layout.runs) == 1 and len(set(self.text_lengths)) <= 1


def make_attention_work(
    kind: str, length: int, device: str, dtype: torch.dtype, tokens: int, heads: int, head_size: int
) -> AttentionWork:
    """Random inputs of about `tokens` tokens whose attended length is `length`.

    spatial: frames of `length` tokens; temporal: videos of `length` frames; cross: `length` text tokens for each of two
    videos.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "cross":
        shapes, text_lengths = [(1, 1, max(tokens // 2, 1))] * 2, [length] * 2
    else:
        count = max(tokens // length, 1)
        shapes, text_lengths = [(count, 1, length)] if kind == "spatial" else [(length, 1, count)], []
    return make_pack_attention_work(kind, shapes, text_lengths, device, dtype, heads, head_size)


def make_pack_attention_work(
    kind: str,
    shapes: Sequence[tuple[int, int, int]],
    text_lengths: Sequence[int],
    device: str,
    dtype: torch.dtype,
    heads: int,
    head_size: int,
    norm_weight: float = 1.0,
) -> AttentionWork:
    """Random inputs for videos of `shapes` (T, H, W) in tokens.

    Args:
        text_lengths: of each video; read for cross-attention only.
        norm_weight: about this is each weight of the QK-norm; the larger, the larger the scores can be.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    def leaf(values: Tensor) -> Tensor:
        return values.to(dtype).requires_grad_()

    layout = PackLayout.of(shapes, device)
    if kind == "cross":
        text = TextLayout.from_lengths(text_lengths, layout.device)
        leaves = {
            "q": leaf(draw(layout.num_tokens, heads, head_size)),
            "kv": leaf(draw(text.num_tokens, 2, heads, head_size)),
        }
        return AttentionWork(kind, layout, leaves, text, tuple(text_lengths))
    leaves = {"qkv": leaf(draw(layout.num_tokens, 3, heads, head_size))}
    for name in ("q_weight", "k_weight"):
        leaves[name] = leaf(norm_weight * (1 + 0.1 * draw(head_size)))
    if kind == "spatial":
        return AttentionWork(kind, layout, leaves)
    angles = torch.arange(layout.max_frames, device=device)[:, None] / 10000 ** (
        torch.arange(0, head_size, 2, device=device) / head_size
    )
    return AttentionWork(kind, layout, leaves, cos=angles.cos(), sin=angles.sin())


def count_attention(
    kind: str,
    shapes: Sequence[tuple[int, int, int]],
    text_lengths: Sequence[int],
    channels: int,
    element: int,
) -> tuple[Count, Count]:
    """(forward, forward and backward) of useful operations and least bytes.

    4·C operations for each pair of query and key forward, and 10·C backward, which has to compute the scores again.
    Bytes: each input read once, each output written once; backward reads the output, its gradient and the inputs, and
    writes the inputs' gradients.
    """
    tokens = sum(frames * height * width for frames, height, width in shapes)
    if kind == "spatial":
        pairs = sum(frames * (height * width) ** 2 for frames, height, width in shapes)
    elif kind == "temporal":
        pairs = sum(height * width * frames**2 for frames, height, width in shapes)
    else:
        videos = zip(shapes, text_lengths, strict=True)
        pairs = sum(frames * height * width * length for (frames, height, width), length in videos)
    inputs = (tokens + 2 * sum(text_lengths)) if kind == "cross" else 3 * tokens
    forward = Count(4.0 * channels * pairs, float(element * channels * (inputs + tokens)))
    backward = Count(10.0 * channels * pairs, float(element * channels * (2 * inputs + 2 * tokens)))
    return forward, forward + backward


def attend_run_by_run(work: AttentionWork, attend: Attend) -> Tensor:
    """The op with `attend` as its core, called once for each run of equal videos (cross-attention of ragged texts:
    once for each video). Returns [N, H, D]."""
    if work.kind == "cross":
        return _cross_run_by_run(work, attend)
    outputs = []
    for run in work.layout.runs:
        qkv = work.leaves["qkv"][run.first_token : run.first_token + run.tokens]
        qkv = qkv.unflatten(0, (run.videos, run.frames, run.frame_tokens))
        if work.kind == "spatial":
            q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (z.flatten(0, 1) for z in qkv.permute(3, 0, 2, 4, 1, 5).unbind(0))
        output = attend(*normalize(work, q, k, run.frames), v)
        if work.kind == "spatial":
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        else:
            output = output.unflatten(0, (run.videos, run.frame_tokens)).permute(0, 3, 1, 2, 4)
            outputs.append(output.flatten(0, 2))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def normalize(work: AttentionWork, q: Tensor, k: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Rotary embedding (temporal attention; q, k [..., T, D]) and QK-norm."""
    if work.kind == "temporal":
        q, k = (rotary_reference(z, work.cos[:frames], work.sin[:frames]) for z in (q, k))
    return rms_norm_reference(q, work.leaves["q_weight"]), rms_norm_reference(k, work.leaves["k_weight"])


def _cross_run_by_run(work: AttentionWork, attend: Attend) -> Tensor:
    q, kv = work.leaves["q"], work.leaves["kv"]
    if work.is_uniform:
        videos = work.layout.num_videos
        k, v = kv.unflatten(0, (videos, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q.unflatten(0, (videos, -1)).transpose(1, 2), k, v).transpose(1, 2).flatten(0, 1)
    tokens = [frames * height * width for frames, height, width in work.layout.shapes]
    outputs = []
    for rows, text in zip(q.split(tokens), kv.split(list(work.text_lengths)), strict=True):
        k, v = text[None].permute(2, 0, 3, 1, 4).unbind(0)
        outputs.append(attend(rows[None].transpose(1, 2), k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


@dataclass(frozen=True)
class Sequences:
    """A pack as sequences one after another: q [N, H, D], k and v [N or M, H, D].

    Attributes:
        restore: brings an output [N, H, D] back into the order of the pack.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    restore: Callable[[Tensor], Tensor]


def sequence_lengths(work: AttentionWork) -> tuple[list[int], list[int]]:
    """Lengths of the sequences of queries and of keys, in the order of `to_sequences`."""
    shapes = work.layout.shapes
    if work.kind == "cross":
        return [frames * height * width for frames, height, width in shapes], list(work.text_lengths)
    if work.kind == "spatial":
        lengths = [height * width for frames, height, width in shapes for _ in range(frames)]
    else:
        lengths = [frames for frames, height, width in shapes for _ in range(height * width)]
    return lengths, lengths


def to_sequences(work: AttentionWork) -> Sequences:
    """Rotary embedding, QK-norm, and tokens in the order of their sequences."""
    if work.kind == "cross":
        k, v = work.leaves["kv"].unbind(1)
        return Sequences(work.leaves["q"], k, v, lambda output: output)
    if work.kind == "spatial":
        q, k, v = work.leaves["qkv"].unbind(1)
        q, k = normalize(work, q, k, 0)
        return Sequences(q, k, v, lambda output: output)
    parts: list[list[Tensor]] = [[], [], []]
    for run in work.layout.runs:
        qkv = work.leaves["qkv"][run.first_token : run.first_token + run.tokens]
        qkv = qkv.unflatten(0, (run.videos, run.frames, run.frame_tokens))
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [videos, S, H, T, D]
        q, k = normalize(work, q, k, run.frames)
        for part, z in zip(parts, (q, k, v), strict=True):
            part.append(z.transpose(2, 3).flatten(0, 2))

    def restore(output: Tensor) -> Tensor:
        pieces = []
        for run, piece in zip(work.layout.runs, output.split([run.tokens for run in work.layout.runs]), strict=True):
            piece = piece.unflatten(0, (run.videos, run.frame_tokens, run.frames))
            pieces.append(piece.transpose(1, 2).flatten(0, 2))
        return torch.cat(pieces)

    q, k, v = (torch.cat(part) for part in parts)
    return Sequences(q, k, v, restore)
