"""Where the tokens of a pack lie: the only representation of video tokens in this project.

A pack is one matrix `x [N, C]` that holds the tokens of B videos of any shapes, one after another. The tokens of a
video are ordered (frame, row, column). A dense batch is the pack of equal shapes.

Letters: B videos, T frames of a video, S tokens of one of its frames, F frames of all videos together,
N tokens of all videos together, M text tokens of all videos together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from .dispatch import is_intercepted

# Every layout holds the tile tables of these sizes, so that using one neither builds nor copies anything; a kernel
# configuration chooses among them.
FRAME_TILE_SIZES = tuple(range(16, 129, 8))
# Rows of the tiles of temporal attention; a video takes the smallest that holds its frames.
PLACE_TILE_ROWS = (16, 32, 64, 128)
# The longest video that has whole places in a tile → rows of the blocks into which longer videos are cut. The first is
# for float32, of which a thread cannot hold as many.
PLACE_BLOCK_ROWS = {0: 32, 64: 64, 128: 64}


def makes_stand_ins() -> bool:
    """True where a new tensor may be of no use later, so that it must not be kept in a cache."""
    return not torch.compiler.is_compiling() and is_intercepted()


@dataclass(frozen=True)
class Run:
    """Consecutive videos of one shape: `x[first_token : first_token + videos·T·S]` views as [videos, T, S, C]."""

    first_video: int
    first_frame: int
    first_token: int
    videos: int
    frames: int
    height: int
    width: int

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.videos * self.frames * self.frame_tokens


@dataclass(frozen=True, eq=False)
class PackLayout:
    """Shapes of the videos of a pack and the index tables that kernels read.

    Build it with `PackLayout.of(shapes, device)`, which caches by shapes and device. Everything is computed on the host
    from the shapes, so neither building nor using a layout waits for the GPU.

    Attributes (all tensors int32 on `device`):
        shapes: for each video (T, H, W), H and W in tokens.
        frame_video [F]: video of each frame.
        token_frame [N]: frame of each token, counted over the whole pack.
        tile_tables: for each size of FRAME_TILE_SIZES what `frame_tiles` and `video_tiles` return.
        frame_position [F]: number of each frame within its video; the position of the rotary embedding.
        place_tables: for each key of PLACE_BLOCK_ROWS what `place_tiles` returns.
    """

    shapes: tuple[tuple[int, int, int], ...]
    device: torch.device
    frame_video: Tensor
    token_frame: Tensor
    tile_tables: dict[int, tuple[Tensor, Tensor]]
    frame_position: Tensor
    place_tables: dict[int, tuple[Tensor, ...]]

    @staticmethod
    def of(shapes: Sequence[Sequence[int]], device: torch.device | str) -> PackLayout:
        """Returns the layout of videos with `shapes` = [(T, H, W), …] in tokens.

        Raises:
            ValueError: no video, or a shape that is not three positive integers, or 2³¹ tokens or more.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        try:
            whole = tuple(tuple(operator.index(size) for size in shape) for shape in shapes)
        except TypeError:
            raise ValueError(f"PackLayout: shapes {shapes}; give whole numbers (T, H, W) for each video") from None
        build = _layout_of.__wrapped__ if makes_stand_ins() else _layout_of
        return build(whole, device)

    @property
    def num_videos(self) -> int:
        return len(self.shapes)

    @cached_property
    def num_frames(self) -> int:
        return sum(frames for frames, _, _ in self.shapes)

    @cached_property
    def num_tokens(self) -> int:
        return sum(frames * height * width for frames, height, width in self.shapes)

    @cached_property
    def max_frames(self) -> int:
        return max(frames for frames, _, _ in self.shapes)

    @cached_property
    def max_frame_tokens(self) -> int:
        return max(height * width for _, height, width in self.shapes)

    @cached_property
    def tile_counts(self) -> tuple[int, ...]:
        """How many tiles `frame_tiles` cuts, for each of FRAME_TILE_SIZES."""
        return tuple(self.frame_tiles(size).shape[0] for size in FRAME_TILE_SIZES)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Consecutive videos of equal shape, so that dense code can view them as a batch."""
        runs: list[Run] = []
        video = frame = token = 0
        for shape in self.shapes:
            frames, height, width = shape
            if runs and (runs[-1].frames, runs[-1].height, runs[-1].width) == shape:
                last = runs[-1]
                runs[-1] = Run(last.first_video, last.first_frame, last.first_token, last.videos + 1, *shape)
            else:
                runs.append(Run(video, frame, token, 1, *shape))
            video += 1
            frame += frames
            token += frames * height * width
        return tuple(runs)

    def frame_tiles(self, size: int) -> Tensor:
        """Cuts the frames into tiles of at most `size` tokens, none of which crosses a frame.

        The tiles of a frame are equally long but for its last, which may be shorter.

        Returns:
            int32 [tiles, 3]: first token, token count and frame of each tile, in the order of the tokens.

        Raises:
            ValueError: `size` is not one of FRAME_TILE_SIZES.
        """
        return self._tile_table(size)[0]

    def video_tiles(self, size: int) -> Tensor:
        """Returns int32 [B+1], the first row of each video in `frame_tiles(size)`.

        Raises:
            ValueError: `size` is not one of FRAME_TILE_SIZES.
        """
        return self._tile_table(size)[1]

    def _tile_table(self, size: int) -> tuple[Tensor, Tensor]:
        if size not in self.tile_tables:
            raise ValueError(f"frame_tiles: size {size} is not one of FRAME_TILE_SIZES = {FRAME_TILE_SIZES}")
        return self.tile_tables[size]

    def place_tiles(self, longest: int) -> tuple[Tensor, ...]:
        """Cuts the places (all frames of one position) into tiles for temporal attention.

        Args:
            longest: videos of at most so many frames have whole places in a tile; a key of PLACE_BLOCK_ROWS.

        Returns:
            for each of PLACE_TILE_ROWS, the tiles of so many rows int32 [tiles, 4]: of videos that no smaller tile
                holds, as many whole places as fit: token of the first frame at the first place, T, S and the number of
                places; none for videos longer than `longest`;
            blocks int32 [blocks, 4]: for those, PLACE_BLOCK_ROWS[longest] frames of one place: token of the first frame
                at the place, T, S and the first frame of the block.

        Raises:
            ValueError: `longest` is no key of PLACE_BLOCK_ROWS.
        """
        if longest not in self.place_tables:
            raise ValueError(f"place_tiles: longest {longest} is not one of {', '.join(map(str, PLACE_BLOCK_ROWS))}")
        return self.place_tables[longest]

    def modulation_rows(self, x_masks: Sequence[Tensor | None] | Tensor | None) -> Tensor:
        """Returns for each frame its row in a modulation table, int32 [F].

        Without masks the table has B rows and a frame's row is its video. With masks it has 2·B rows: row b for the
        noised frames of video b, row B + b for its given frames.

        Args:
            x_masks: bool [B, T] for videos of one frame count, or one bool [T] (or None) for each video;
                True marks a noised frame, False a given one.

        Raises:
            ValueError: a mask that is no tensor, or whose length is not the video's frame count.
        """
        if x_masks is None:
            return self.frame_video
        if len(x_masks) != self.num_videos:
            raise ValueError(f"x_masks: {len(x_masks)} masks for {self.num_videos} videos; give one per video")
        if isinstance(x_masks, Tensor):
            if x_masks.shape != (self.num_videos, self.max_frames) or x_masks.numel() != self.num_frames:
                raise ValueError(
                    f"x_mask: shape {tuple(x_masks.shape)} does not fit {self.num_videos} videos of "
                    f"{[shape[0] for shape in self.shapes]} frames"
                )
            noised = x_masks.reshape(-1)
        elif all(mask is None for mask in x_masks):
            return self.frame_video
        else:
            pieces = []
            for index, (mask, (frames, _, _)) in enumerate(zip(x_masks, self.shapes, strict=True)):
                if mask is None:
                    mask = torch.ones(frames, dtype=torch.bool, device=self.device)
                if not isinstance(mask, Tensor):
                    raise ValueError(f"x_masks[{index}] must be a tensor or None, got {type(mask).__name__}")
                if mask.shape != (frames,):
                    raise ValueError(f"x_masks[{index}]: shape {tuple(mask.shape)}, but the video has {frames} frames")
                pieces.append(mask.to(self.device, non_blocking=True))
            noised = torch.cat(pieces)
        given = (noised.to(self.device, non_blocking=True) == 0).to(torch.int32)
        return self.frame_video + self.num_videos * given


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # so that a layout first made while sampling can be saved for backward in training
def _layout_of(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> PackLayout:
    if not shapes:
        raise ValueError("PackLayout: no videos; give at least one (T, H, W)")
    for index, shape in enumerate(shapes):
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"PackLayout: video {index} has shape {shape}; expected (T, H, W), each at least 1")
    tokens = sum(frames * height * width for frames, height, width in shapes)
    if tokens >= 2**31:
        raise ValueError(f"PackLayout: {tokens} tokens; a pack holds fewer than 2**31")
    frames = torch.tensor([shape[0] for shape in shapes], device="cpu")
    frame_tokens = torch.tensor([shape[1] * shape[2] for shape in shapes], device="cpu")
    frame_video = torch.repeat_interleave(torch.arange(len(shapes), device="cpu"), frames)
    tokens_of_frame = frame_tokens[frame_video]
    token_frame = torch.repeat_interleave(torch.arange(len(frame_video), device="cpu"), tokens_of_frame)

    place = partial(place_table, device=device)
    layout = PackLayout(
        shapes=shapes,
        device=device,
        frame_video=place(frame_video),
        token_frame=place(token_frame),
        tile_tables={
            size: tuple(place(table) for table in _tile_frames(tokens_of_frame, frames, size))
            for size in FRAME_TILE_SIZES
        },
        frame_position=place(torch.cat([torch.arange(shape[0], device="cpu") for shape in shapes])),
        place_tables={
            longest: tuple(place(table) for table in _tile_places(shapes, longest)) for longest in PLACE_BLOCK_ROWS
        },
    )
    # Now, not when first asked for: torch.compile would take that for a change and compile everything a second time.
    for name, member in vars(PackLayout).items():
        if isinstance(member, cached_property):
            getattr(layout, name)
    return layout


def place_table(table: Tensor, device: torch.device) -> Tensor:
    """A table of the host as int32 on `device`, without waiting for a GPU."""
    table = table.to(torch.int32)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _tile_frames(tokens_of_frame: Tensor, frames: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """tokens_of_frame [F], frames [B] → first token, count and frame of each tile [tiles, 3], first tiles [B+1]."""

    def divide_up(value: Tensor, divisor: Tensor | int) -> Tensor:
        return torch.div(value + divisor - 1, divisor, rounding_mode="floor")

    tile_tokens = divide_up(tokens_of_frame, divide_up(tokens_of_frame, size))
    tiles_of_frame = divide_up(tokens_of_frame, tile_tokens)
    frame = torch.repeat_interleave(torch.arange(len(tokens_of_frame), device="cpu"), tiles_of_frame)
    offset = (torch.arange(len(frame), device="cpu") - _starts(tiles_of_frame)[frame]) * tile_tokens[frame]
    count = torch.minimum(tile_tokens[frame], tokens_of_frame[frame] - offset)
    first = _starts(tokens_of_frame)[frame] + offset
    tiles = torch.stack([first, count, frame], dim=1).contiguous()
    return tiles, _starts(tiles_of_frame)[_starts(frames)]


def _tile_places(shapes: tuple[tuple[int, ...], ...], longest: int) -> tuple[Tensor, ...]:
    """See `PackLayout.place_tiles`.

    The blocks of one place come one after another, so that they find its keys and values in the cache.
    """
    tables = {rows: [torch.empty(0, 4, dtype=torch.int64, device="cpu")] for rows in (*PLACE_TILE_ROWS, None)}
    token = 0
    for frames, height, width in shapes:
        places = height * width
        if frames <= longest:
            rows = next(rows for rows in PLACE_TILE_ROWS if frames <= rows)
            first = torch.arange(0, places, rows // frames, device="cpu")
            last = torch.clamp(places - first, max=rows // frames)
        else:
            rows = None
            starts = torch.arange(0, frames, PLACE_BLOCK_ROWS[longest], device="cpu")
            first = torch.arange(places, device="cpu").repeat_interleave(len(starts))
            last = starts.repeat(places)
        columns = token + first, torch.full_like(first, frames), torch.full_like(first, places), last
        tables[rows].append(torch.stack(columns, dim=1))
        token += frames * places
    return tuple(torch.cat(table) for table in tables.values())


def _starts(lengths: Tensor) -> Tensor:
    """Cumulative sum with a leading zero: [L] → [L+1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


@dataclass(frozen=True, eq=False)
class TextLayout:
    """Where the text tokens of each video lie in `text [M, C]`.

    Attributes:
        starts int32 [B]: first text token of each video. No two videos share one, or its gradient is that of one video.
        lengths int32 [B]: text tokens of each video; 0 is allowed and makes its cross-attention zero.
        max_length: a bound on the lengths that the host knows.
        num_tokens: M.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    num_tokens: int

    @staticmethod
    def from_lengths(lengths: Sequence[int], device: torch.device) -> TextLayout:
        """Returns the layout of texts of `lengths` tokens that lie one after another.

        Raises:
            ValueError: no text, or a length that is negative or not whole.
        """
        try:
            lengths = [operator.index(length) for length in lengths]
        except TypeError:
            raise ValueError(f"TextLayout: lengths {lengths}; give a whole number for each video") from None
        if not lengths or min(lengths) < 0:
            raise ValueError(f"TextLayout: lengths {lengths}; give one for each video, each at least 0")
        counts = torch.tensor(lengths, device="cpu")
        return TextLayout(
            starts=_starts(counts)[:-1].to(torch.int32).to(device, non_blocking=True),
            lengths=counts.to(torch.int32).to(device, non_blocking=True),
            max_length=max(int(counts.max()), 1),
            num_tokens=int(counts.sum()),
        )

    @staticmethod
    def from_mask(mask: Tensor | None, num_videos: int, length: int, device: torch.device) -> tuple[TextLayout, Tensor]:
        """Returns the layout of `mask`'s real tokens, and the index [M] that picks them from text of shape [B·L, …].

        A mask on the host gives an exact ragged pack. A mask on the GPU may not be read by the host without a stall, so
        its text stays padded to L: the index only moves each video's real tokens to the front.

        Args:
            mask: [B, L], nonzero = real token; None = all real.
            num_videos: B.
            length: L.
            device: where the tables are put.

        Raises:
            ValueError: the mask's shape is not [B, L].
        """
        if mask is None:
            mask = torch.ones(num_videos, length, dtype=torch.bool, device="cpu")
        if mask.shape != (num_videos, length):
            raise ValueError(f"mask: shape {tuple(mask.shape)}, expected ({num_videos}, {length}) as the text in y")
        real = mask != 0
        lengths = real.sum(dim=1)
        if real.device.type == "cpu":
            index = real.reshape(-1).nonzero().squeeze(1)
            starts = _starts(lengths)[:-1]
            max_length, num_tokens = max(int(lengths.max()), 1), index.numel()
        else:
            order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)
            starts = torch.arange(num_videos, device=real.device) * length
            index = (order + starts[:, None]).reshape(-1)
            max_length, num_tokens = length, index.numel()
        if device.type == "cuda" and index.device.type == "cpu" and not torch.compiler.is_compiling():
            index = index.pin_memory()  # of many captions it is so large that the host would wait for its copy
        starts, lengths = (tensor.to(torch.int32).to(device, non_blocking=True) for tensor in (starts, lengths))
        return TextLayout(starts, lengths, max_length, num_tokens), index.to(device, non_blocking=True)
