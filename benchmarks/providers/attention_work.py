"""Inputs of ST-DiT-2's three attentions, and what every implementation does around its core.

A provider takes what the op takes (packed qkv and the norm weights) and returns what the op returns, so each does the
same work: rotary embedding and QK-norm in upstream's order, then attention. Libraries have no such norm: what computes
it for them is the argument `norm` of the functions here.

Letters: N tokens of the pack, M text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

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


# (work, q, k [N, H, D] of the pack) → q, k, as `normalize`
Normalize = Callable[[AttentionWork, Tensor, Tensor], tuple[Tensor, Tensor]]


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


def equal_sequences(work: AttentionWork) -> list[tuple[int, int, int]]:
    """(sequences, tokens of the queries of each, of the keys) of those that are alike and follow each other."""
    layout = work.layout
    if work.kind == "cross":
        if work.is_uniform:
            return [(layout.num_videos, layout.num_tokens // layout.num_videos, work.text_lengths[0])]
        tokens = [frames * height * width for frames, height, width in layout.shapes]
        return [(1, *lengths) for lengths in zip(tokens, work.text_lengths, strict=True)]
    if work.kind == "spatial":
        return [(run.videos * run.frames, run.frame_tokens, run.frame_tokens) for run in layout.runs]
    return [(run.videos * run.frame_tokens, run.frames, run.frames) for run in layout.runs]


def sequence_lengths(work: AttentionWork) -> tuple[list[int], list[int]]:
    """Lengths of the sequences of queries and of keys, in the order of `to_sequences`."""
    groups = equal_sequences(work)
    queries, keys = ([length for group in groups for length in [group[index]] * group[0]] for index in (1, 2))
    return queries, keys


def make_starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where sequences that follow each other begin, and the last ends: int32 [sequences + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def normalize(work: AttentionWork, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (temporal attention) and QK-norm of q and k [N, H, D], in the order of `to_sequences`."""
    if work.kind == "temporal":
        q, k = (_by_place(work, z, rotated=True) for z in (q, k))
    return rms_norm_reference(q, work.leaves["q_weight"]), rms_norm_reference(k, work.leaves["k_weight"])


def to_sequences(work: AttentionWork, norm: Normalize = normalize) -> Sequences:
    """Rotary embedding, QK-norm, and tokens in the order of their sequences; `norm` computes as `normalize`."""
    if work.kind == "cross":
        k, v = work.leaves["kv"].unbind(1)
        return Sequences(work.leaves["q"], k, v, lambda output: output)
    q, k, v = work.leaves["qkv"].unbind(1)
    q, k = norm(work, q, k)
    if work.kind == "spatial":
        return Sequences(q, k, v, lambda output: output)

    def restore(output: Tensor) -> Tensor:
        pieces = []
        for run, piece in zip(work.layout.runs, _split(output, _run_tokens(work)), strict=True):
            piece = piece.unflatten(0, (run.videos, run.frame_tokens, run.frames))
            pieces.append(piece.transpose(1, 2).flatten(0, 2))
        return _join(pieces)

    return Sequences(q, k, _by_place(work, v), restore)


def attend_run_by_run(work: AttentionWork, attend: Attend, norm: Normalize = normalize) -> Tensor:
    """The op with `attend` as its core, called once for each run of equal videos (cross-attention of ragged texts:
    once for each video). Returns [N, H, D]."""
    sequences = to_sequences(work, norm)
    groups = equal_sequences(work)
    sizes = [[count * queries for count, queries, _ in groups], *[[count * keys for count, _, keys in groups]] * 2]
    parts = (_split(z, tokens) for z, tokens in zip((sequences.q, sequences.k, sequences.v), sizes, strict=True))
    outputs = []
    for (count, _, _), *part in zip(groups, *parts, strict=True):
        output = attend(*(z.unflatten(0, (count, -1)).transpose(1, 2) for z in part))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return sequences.restore(_join(outputs))


def _by_place(work: AttentionWork, z: Tensor, rotated: bool = False) -> Tensor:
    """Tokens [N, H, D] of a pack with the frames of each place one after another, embedded if asked for."""
    parts = []
    for run, part in zip(work.layout.runs, _split(z, _run_tokens(work)), strict=True):
        part = part.unflatten(0, (run.videos, run.frames, run.frame_tokens)).transpose(1, 2)  # [videos, S, T, H, D]
        if rotated:
            part = rotary_reference(part, work.cos[: run.frames, None], work.sin[: run.frames, None])
        parts.append(part.flatten(0, 2))
    return _join(parts)


def _run_tokens(work: AttentionWork) -> list[int]:
    return [run.tokens for run in work.layout.runs]


def _split(z: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """As torch.split, whose gradient would be a copy even of a single part."""
    return z.split(sizes) if len(sizes) > 1 else (z,)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
