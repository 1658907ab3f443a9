"""Sequence parallelism: processes that compute one pack of videos together, each a run of its frames.

All of ST-DiT-2 but temporal attention treats each frame by itself, so a process's frames are a pack of their own: of
the same videos, but shorter. For temporal attention the processes exchange tokens for heads (DeepSpeed-Ulysses,
https://arxiv.org/abs/2309.14509): each gets all tokens of H / P of the heads, attends, and gives the others back what
is theirs. That is 4 rows of C elements a token, block and pass, of which a process keeps 1 / P.

Every process gathers the tokens that the last layer gives, so that all compute the same loss. Of its gradient each has
the part that goes through its own tokens: the gradient of a parameter is the sum over the processes.

Letters: P processes, N tokens of the pack, n tokens of this process, C hidden size, H heads, D head size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.registration import differentiable_once
from opensora_fast.parallel.collectives import all_gather, naming_the_loss

Shapes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class FrameRange:
    """Consecutive frames `first` … `last` - 1 of one video."""

    video: int
    first: int
    last: int


@lru_cache(maxsize=1024)
def divide_frames(shapes: Shapes, processes: int) -> tuple[tuple[FrameRange, ...], ...]:
    """Shares out the frames of a pack: to each process consecutive ones, of about as many tokens as to the others.

    A frame goes to the process in whose part of the tokens its middle lies. Where frames are fewer than processes, or
    very different, some get none.

    Args:
        shapes: (T, H, W) in tokens of each video.
        processes: P.
    """
    total = sum(frames * height * width for frames, height, width in shapes)
    shares: list[list[FrameRange]] = [[] for _ in range(processes)]
    start = 0
    for video, (frames, height, width) in enumerate(shapes):
        tokens = height * width
        for frame in range(frames):
            share = shares[processes * (2 * start + tokens) // (2 * total)]
            if share and share[-1].video == video:
                share[-1] = FrameRange(video, share[-1].first, frame + 1)
            else:
                share.append(FrameRange(video, frame, frame + 1))
            start += tokens
    return tuple(map(tuple, shares))


class SequenceGroup:
    """The processes that compute one pack together; made by `join_processes`.

    Args:
        group: joins their devices.
        host_group: joins their hosts, over gloo.

    Attributes:
        rank: number of this process among them, 0 .. size - 1; 0 reads the micro-batches.
        size: P.

    Raises (all that communicates):
        ProcessLostError: another process has ended. It says itself why.
    """

    def __init__(self, group: dist.ProcessGroup, host_group: dist.ProcessGroup) -> None:
        self.group = group
        self.host_group = host_group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)

    def leave(self) -> None:
        """Give up the groups: nothing can be said to the other processes any more."""
        del self.group, self.host_group

    def tell(self, value: Any) -> Any:
        """What the first process gives, on every one; of the others it is ignored. Of JSON's types."""
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        with naming_the_loss():
            dist.broadcast(length, group=self.host_group, src=self._first)
            if self.rank != 0:
                content = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(content, group=self.host_group, src=self._first)
        return json.loads(content.numpy().tobytes())

    def share(self, tensors: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
        """The tensors of the first process, on every one: what is on its host on their hosts, the rest on `device`.

        Args:
            tensors: by name; None on the others.
        """
        described = None
        if tensors is not None:
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            described = [
                (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type == "cpu")
                for name, tensor in tensors.items()
            ]
        shared = {}
        for name, shape, dtype, on_host in self.tell(described):
            if self.rank == 0:
                shared[name] = tensors[name]
            else:
                place = "cpu" if on_host else device
                shared[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            with naming_the_loss():
                dist.broadcast(shared[name], group=self.host_group if on_host else self.group, src=self._first)
        return shared

    def divide(self, layout: PackLayout) -> FrameShare:
        """This process's share of a pack."""
        shares = divide_frames(layout.shapes, self.size)
        tokens = [sum((part.last - part.first) * _frame_tokens(layout, part) for part in share) for share in shares]
        own = shares[self.rank]
        if own:
            return FrameShare(self, layout, own, tuple(tokens), vain=0)
        last = FrameRange(layout.num_videos - 1, layout.shapes[-1][0] - 1, layout.shapes[-1][0])
        return FrameShare(self, layout, (last,), tuple(tokens), vain=_frame_tokens(layout, last))


def _frame_tokens(layout: PackLayout, part: FrameRange) -> int:
    _, height, width = layout.shapes[part.video]
    return height * width


@dataclass(frozen=True, eq=False)
class FrameShare:
    """The frames of a pack that this process computes, and how it meets the others.

    Attributes:
        group: the processes.
        whole: layout of the whole pack.
        frames: of this process. One for which no frame is left computes the last one, in vain: nobody reads the result,
            and its gradients are zeros.
        tokens: of each process, in the order of the pack.
        vain: tokens that are computed in vain.
    """

    group: SequenceGroup
    whole: PackLayout
    frames: tuple[FrameRange, ...]
    tokens: tuple[int, ...]
    vain: int

    @property
    def owned(self) -> int:
        """Tokens that this process computes for all."""
        return self.tokens[self.group.rank]

    @property
    def videos(self) -> slice:
        """The videos that its frames belong to."""
        return slice(self.frames[0].video, self.frames[-1].video + 1)

    def take_frames(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Of the pack's videos [channels, T, H, W] this process's part."""
        return [videos[part.video][:, part.first : part.last] for part in self.frames]

    def take_frame_rows(self, rows: Tensor) -> Tensor:
        """Of each frame's row in a modulation table of all videos [F] (see `PackLayout.modulation_rows`), those of
        this process's frames, in a table of its videos alone."""
        own, videos = self.videos, self.whole.num_videos
        first = sum(frames for frames, _, _ in self.whole.shapes[: own.start]) + self.frames[0].first
        rows = rows[first : first + sum(part.last - part.first for part in self.frames)]
        given = (rows >= videos).to(rows.dtype)
        return rows - own.start - given * (videos - (own.stop - own.start))

    def take_heads(self, tensor: Tensor) -> Tensor:
        """[…, H, D] → […, H / P, D]: the heads with which this process attends over time."""
        heads = tensor.shape[-2] // self.group.size
        return tensor.narrow(-2, self.group.rank * heads, heads)

    def give_tokens(self, x: Tensor) -> Tensor:
        """x [n, …, H, D] of this process's tokens and all heads → [N, …, H / P, D] of all tokens and its heads."""
        return _Exchange.apply(x, self, _to_heads, _to_tokens)

    def take_tokens(self, x: Tensor) -> Tensor:
        """The way back: x [N, …, H / P, D] → [n, …, H, D]; zeros for tokens that are computed in vain."""
        return _Exchange.apply(x, self, _to_tokens, _to_heads)

    def gather(self, tokens: Tensor) -> Tensor:
        """tokens [n, channels] of each process → [N, channels] on all. Each keeps the gradient of its own."""
        return _Gather.apply(tokens, self)


Exchange = Callable[[Tensor, FrameShare], Tensor]


def _to_heads(x: Tensor, share: FrameShare) -> Tensor:
    processes = share.group.size
    sent = x[: share.owned].unflatten(-2, (processes, -1)).movedim(-3, 0).contiguous()  # [P, n, …, H / P, D]
    received = x.new_empty(sum(share.tokens), *sent.shape[2:])
    with naming_the_loss():
        dist.all_to_all_single(
            received, sent.flatten(0, 1), list(share.tokens), [share.owned] * processes, group=share.group.group
        )
    return received


def _to_tokens(x: Tensor, share: FrameShare) -> Tensor:
    processes = share.group.size
    received = x.new_empty(processes * share.owned, *x.shape[1:])
    with naming_the_loss():
        dist.all_to_all_single(
            received, x.contiguous(), [share.owned] * processes, list(share.tokens), group=share.group.group
        )
    x = received.unflatten(0, (processes, share.owned)).movedim(0, -3).flatten(-3, -2)  # copies: [n, …, H, D]
    return torch.cat([x, x.new_zeros(share.vain, *x.shape[1:])]) if share.vain else x


class _Exchange(torch.autograd.Function):
    """One of the two exchanges forward, and the other, which is its inverse, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: FrameShare, there: Exchange, back: Exchange) -> Tensor:
        ctx.share, ctx.back = share, back
        return there(x, share)

    @staticmethod
    @differentiable_once("sequence_parallel")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.share), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, share: FrameShare) -> Tensor:
        ctx.share = share
        longest = max(share.tokens)
        sent = tokens.new_zeros(longest, tokens.shape[1])
        sent[: share.owned] = tokens[: share.owned]
        received = tokens.new_empty(share.group.size, longest, tokens.shape[1])
        with naming_the_loss():
            all_gather(received.flatten(0, 1), sent, group=share.group.group)
        return torch.cat([part[:count] for part, count in zip(received, share.tokens, strict=True)])

    @staticmethod
    @differentiable_once("sequence_parallel")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        share = ctx.share
        own = gradient.narrow(0, sum(share.tokens[: share.group.rank]), share.owned)
        return torch.cat([own, own.new_zeros(share.vain, own.shape[1])]) if share.vain else own, None
