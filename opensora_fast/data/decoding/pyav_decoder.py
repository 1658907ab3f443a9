"""Decode clips on the CPU with PyAV: any codec, several clips at a time, only what is needed of each file.

The frames are those of a decode from the start, bit for bit (`video_index.py` says why). What is decoded is converted
to RGB, turned upright, resized and cropped frame by frame, so a long clip never exists at its full size in memory.

Color: BT.601 coefficients whatever the file says, the range (limited or full) as the file says, chroma interpolated at
full precision. Open-Sora's decoder and DALI use the same coefficients, and with these settings PyAV and DALI on the CPU
agree bit for bit (8-bit levels, before the resize). Open-Sora's lacks them: its frames are about one level darker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from opensora_fast.data.decoding.clips import BadClip, ClipError, ClipRequest
from opensora_fast.data.decoding.resize import resize_frame, resize_image
from opensora_fast.data.decoding.turned_videos import read_turn
from opensora_fast.data.decoding.video_index import (
    RESETTING_CODECS,
    check_file,
    codec_name,
    open_video,
    packets_from,
    read_packet_table,
    read_packets,
)
from opensora_fast.data.decoding.worker_threads import Overdue, WorkerThreads

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

FRAMES_NOT_WORTH_SEEKING = 8
TIME_LIMIT = 60.0
STUCK_FACTOR = 2.0
"""A decode that does not even come back to look at the clock is given up after this many time limits."""


class PyAVDecoder:
    """Decodes clips on the CPU.

    Args:
        threads: clips decoded at the same time; by default one for each processor that may be used.
        time_limit: seconds for one clip. It is checked between packets; a library call that does not come back is
            left behind with its thread after twice the time. Either way the clip is bad.
    """

    def __init__(self, threads: int | None = None, time_limit: float = TIME_LIMIT) -> None:
        if time_limit <= 0:
            raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
        self.threads = count_processors() if threads is None else threads
        self.time_limit = time_limit
        # Torch operations inside a worker must not each start a thread per processor. The number of threads belongs to
        # the calling thread, but a new thread inherits the last value set anywhere, so it is set back here.
        intra_op_threads = torch.get_num_threads()
        self._workers = WorkerThreads(self.threads, "decode clips", start=lambda: torch.set_num_threads(1))
        self._workers.map(lambda _: None, range(self.threads), time_limit)
        torch.set_num_threads(intra_op_threads)

    def decode(self, requests: Sequence[ClipRequest]) -> list[torch.Tensor | BadClip]:
        """See `clips.Decoder`. Float32 [3, T, H, W] in [-1, 1] on the CPU, or a `BadClip`."""
        # Few clips on many processors: the codec itself may use the rest.
        codec_threads = max(1, self.threads // max(1, len(requests)))

        def decode_one(request: ClipRequest) -> torch.Tensor | BadClip:
            return decode_request(request, self.time_limit, codec_threads)

        results = self._workers.map(decode_one, requests, STUCK_FACTOR * self.time_limit)
        return [
            BadClip(request.row, request.path, f"decoding hung for {STUCK_FACTOR * self.time_limit:g} s")
            if isinstance(result, Overdue)
            else result
            for request, result in zip(requests, results, strict=True)
        ]

    def close(self) -> None:
        self._workers.close()


def count_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_request(request: ClipRequest, time_limit: float = TIME_LIMIT, threads: int = 1) -> torch.Tensor | BadClip:
    """Decode one clip in the calling thread: float32 [3, T, H, W] in [-1, 1], or a `BadClip`."""
    import av

    try:
        if request.is_image:
            return decode_image(request)
        return decode_video(request, time_limit, threads)
    except ClipError as error:
        reason = str(error)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        # What the libraries say of data they cannot read; anything else is an error of this program.
        reason = f"cannot be decoded: {describe(error)}"
    return BadClip(request.row, request.path, reason)


def describe(error: BaseException) -> str:
    """An exception in one line, without the path that a report names already."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__


def decode_image(request: ClipRequest) -> torch.Tensor:
    """Read a still image with Pillow: float32 [3, 1, H, W] in [-1, 1]. ClipError if it is damaged."""
    from PIL import Image

    check_file(request.path)
    if len(request.frames) != 1:
        raise ClipError(f"is an image, {len(request.frames)} frames are asked for")
    try:
        with Image.open(request.path) as image:
            return resize_image(image, request.size)
    except Exception as error:  # Pillow's readers let all kinds of exceptions out on damaged files
        raise ClipError(f"cannot be read as an image: {describe(error)}") from None


def decode_video(request: ClipRequest, time_limit: float, threads: int) -> torch.Tensor:
    """Decode the frames of one video file: float32 [3, T, H, W] in [-1, 1].

    Raises:
        ClipError: it cannot be done. av.FFmpegError: the library's own word for that.
    """
    output = torch.empty(3, len(request.frames), *request.size)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(request.frames):
        places.setdefault(number, []).append(place)

    def take(number: int, pixels: np.ndarray) -> None:
        first, *others = places[number]
        resize_frame(pixels, output[:, first])
        for place in others:
            output[:, place] = output[:, first]

    read_frames(request.path, frozenset(places), take, time_limit, threads)
    return output


def read_frames(
    path: str,
    wanted: frozenset[int],
    take: Callable[[int, np.ndarray], None],
    time_limit: float = TIME_LIMIT,
    threads: int = 1,
) -> None:
    """Decode some frames of a video file and hand each, upright, to take(number, uint8 [H, W, 3]), in ascending order.

    Raises:
        ClipError: the file lacks one of them, is damaged, or takes too long.
    """
    deadline = _Deadline(time_limit)
    turn = read_turn(path)

    def take_upright(number: int, pixels: np.ndarray) -> None:
        take(number, turn.apply(pixels))

    try:
        _read_from_keyframe(path, wanted, take_upright, deadline, threads)
    except _NotExact:
        with open_video(path, threads) as (container, stream):
            _collect(deadline.watch(read_packets(container, stream)), 0, wanted, take_upright)


class _NotExact(Exception):
    """Decoding cannot begin in the middle of this file and give the same frames."""


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def watch(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        """Pass packets on until the time is over."""
        for packet in packets:
            if time.monotonic() > self.end:
                raise ClipError(f"not decoded within {self.seconds:g} s")
            yield packet


def _read_from_keyframe(
    path: str, wanted: frozenset[int], take: Callable[[int, np.ndarray], None], deadline: _Deadline, threads: int
) -> None:
    """As `read_frames`, from the last keyframe that allows it. _NotExact: nothing but the start will do."""
    first, last = min(wanted), max(wanted)
    with open_video(path, threads) as (container, stream):
        if first <= FRAMES_NOT_WORTH_SEEKING or codec_name(stream) not in RESETTING_CODECS:
            _collect(deadline.watch(read_packets(container, stream)), 0, wanted, take)
            return
        table = read_packet_table(stream, deadline.watch(read_packets(container, stream)))
        if last >= table.count:  # a packet holds at most one frame
            raise ClipError(f"has only {table.count} frames, frame {last} is asked for")
        keyframe = table.last_keyframe(first)
        packets = keyframe and packets_from(container, stream, keyframe)
        if not packets:
            raise _NotExact
        _collect(deadline.watch(packets), keyframe.number, wanted, take, must_be_exact=True)


def _collect(
    packets: Iterable[Packet],
    number: int,
    wanted: frozenset[int],
    take: Callable[[int, np.ndarray], None],
    must_be_exact: bool = False,
) -> None:
    """Decode packets, of which the first shown frame is frame `number`, up to the last wanted frame."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    last = max(wanted)
    size = None
    first_timestamp = previous = None
    for packet in packets:
        if packet.is_corrupt:
            raise ClipError(f"damaged or cut off near frame {number}")
        if must_be_exact and first_timestamp is None:
            first_timestamp = packet.pts
        for frame in packet.decode():
            if must_be_exact and not _follows(frame.pts, previous, first_timestamp):
                raise _NotExact
            previous = frame.pts
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise ClipError(f"frame {number} has another size than the ones before it")
            if number in wanted:
                if frame.is_corrupt:
                    raise ClipError(f"frame {number} is damaged")
                take(number, to_rgb(frame, reformatter))
            number += 1
            if number > last:
                return
    raise ClipError(f"ends after {number} frames, frame {last} is asked for")


def _follows(timestamp: int | None, previous: int | None, first: int | None) -> bool:
    """Whether frames come in the order of their times, beginning with the keyframe's."""
    if timestamp is None or first is None:
        return False
    return timestamp == first if previous is None else timestamp > previous


def to_rgb(frame: VideoFrame, reformatter: VideoReformatter | None = None) -> np.ndarray:
    """Colors of a decoded frame: uint8 [H, W, 3].

    A reformatter that is used for all frames of a clip keeps its tables; making them for each takes as long as the
    conversion of a small frame.
    """
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

    converted = (reformatter or VideoReformatter()).reformat(
        frame,
        format="rgb24",
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
        src_colorspace=Colorspace.ITU601,
        dst_colorspace=Colorspace.ITU601,
        threads=1,
    )
    return converted.to_ndarray()


def iterate_frames(path: str) -> Iterator[np.ndarray]:
    """All frames of a video file, upright, uint8 [H, W, 3] each. ClipError or av.FFmpegError if it is damaged."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    turn = read_turn(path)
    with open_video(path, 0) as (container, stream):  # as many as the codec likes
        for packet in read_packets(container, stream):
            for frame in packet.decode():
                yield turn.apply(to_rgb(frame, reformatter))
