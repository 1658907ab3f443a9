"""Decode clips with NVIDIA DALI: one pipeline for all buckets, on the GPU or (VP8, VP9, MJPEG) on the CPU.

    external_source -> decoders.video(frames=...) -> resize(size=...) -> crop_mirror_normalize(crop=...)

The list of frames and the sizes belong to each sample, so clips of any buckets may share a run and nothing is built
anew for another shape. DALI fails a whole batch for one bad sample: it is then halved until the bad one is alone.

What DALI does not notice is checked before, by reading (not decoding) the file: it pads a file that is cut off with
black, counts frames that an edit list or VP8 hides, mistakes a frame of another size than the first, and crashes where
a damaged index points 2 GiB beyond the end (its file reader subtracts positions in 32 bits). Damage that only shows in
decoding is found by DALI's decoder, or, where that patches the picture up, not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opensora_fast.data.decoding.clips import BadClip, ClipError, ClipRequest, Unsupported, UnsupportedClip
from opensora_fast.data.decoding.copy_stream import CopyStream
from opensora_fast.data.decoding.picture_size import is_hidden, read_picture_size
from opensora_fast.data.decoding.pyav_decoder import (
    STUCK_FACTOR,
    TIME_LIMIT,
    count_processors,
    decode_request,
    describe,
)
from opensora_fast.data.decoding.resize import CoverCrop
from opensora_fast.data.decoding.turned_videos import Turn, parse_turn
from opensora_fast.data.decoding.video_index import check_file, codec_name, open_video, read_packets
from opensora_fast.data.decoding.worker_threads import Overdue, WorkerThreads
from opensora_fast.out_of_memory import SIGNS

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

CODECS = {
    "cpu": ("vp8", "vp9", "mjpeg"),
    "gpu": ("h264", "hevc", "av1", "vp9", "vp8", "mjpeg", "mpeg4"),
}
"""What DALI 2.4 decodes on a device. Which of them a GPU can depends on its generation as well."""

MAXIMUM_BATCH = 16
MAXIMUM_BYTES = 1 << 31
VIDEO_LIBRARY = "libnvcuvid.so.1"
SIGNS_OF_NO_MEMORY = (*SIGNS, "bytes on device", "CUDA allocation failed", "OUT_OF_MEMORY")
"""In what DALI says where the GPU has no memory left: "Can't allocate 123 bytes on device 0", for example."""
INSTALL_HINT = "install it with `pip install nvidia-dali-cuda130` (or nvidia-dali-cuda120), or use PyAV"


def is_dali_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def find_obstacle(device: str) -> str:
    """Why DALI cannot decode on the "cpu" or the "gpu" here; "" if it can.

    Without the driver's library for video DALI would take every clip for a bad one.
    """
    if not is_dali_installed():
        return f"DALI is not installed: {INSTALL_HINT}"
    if device == "gpu" and not torch.cuda.is_available():
        return 'DALI is to decode on the GPU but torch sees none: use device="cpu", or PyAV'
    if device == "gpu" and not _loads(VIDEO_LIBRARY):
        return (
            f"DALI decodes on the GPU with the driver's {VIDEO_LIBRARY}, which is not here: a container has it only if "
            "it was started with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    return ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Sample:
    """One clip as the pipeline takes it."""

    request: ClipRequest
    data: np.ndarray
    source_size: tuple[int, int]
    crop: CoverCrop


class _WatchedFile(io.BytesIO):
    """Remembers whether somebody went so far beyond its end that DALI's reader would crash there."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.size = len(content)
        self.was_left = False

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and position - self.size >= MAXIMUM_BYTES:
            self.was_left = True
        return super().seek(position, whence)


class DaliDecoder:
    """Decodes clips with DALI. Still images are read with Pillow, as all decoders do.

    Args:
        device: "cpu" or "gpu", which is the current one.
        threads: of the CPU; by default one for each processor that may be used.
        maximum_batch: clips in one run of the pipeline, at most.
        time_limit: seconds for one clip. A run that takes more than twice that for each of its clips is left behind
            with its thread, and the clips are tried in smaller runs.

    Raises:
        ValueError: DALI is not installed or cannot decode on the device, or an argument is out of range.
    """

    def __init__(
        self,
        device: str = "gpu",
        *,
        threads: int | None = None,
        maximum_batch: int = MAXIMUM_BATCH,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        if device not in CODECS:
            raise ValueError(f'device must be "cpu" or "gpu", got {device!r}')
        if maximum_batch < 1 or time_limit <= 0:
            raise ValueError(
                f"maximum_batch must be 1 or more and time_limit above 0, got {maximum_batch} and {time_limit}"
            )
        if obstacle := find_obstacle(device):
            raise ValueError(obstacle)
        self.device = device
        self.codecs = CODECS[device]
        self.device_id = torch.cuda.current_device() if device == "gpu" else None
        self.threads = count_processors() if threads is None else threads
        self.maximum_batch = maximum_batch
        self.time_limit = time_limit
        self._pipeline: Pipeline | None = None
        self._copies = CopyStream(self.device_id) if device == "gpu" else None
        self._readers = WorkerThreads(self.threads, "read clips")
        self._runner = WorkerThreads(1, "run DALI")

    def decode(self, requests: Sequence[ClipRequest]) -> list[torch.Tensor | BadClip]:
        """See `clips.Decoder`. Float32 [3, T, H, W] in [-1, 1] on the decoder's device, or a `BadClip`."""
        prepared = self._readers.map(self._prepare, requests, STUCK_FACTOR * self.time_limit)
        results: list[Any] = [
            BadClip(request.row, request.path, "reading the file hung") if isinstance(found, Overdue) else found
            for request, found in zip(requests, prepared, strict=True)
        ]
        places = [place for place, found in enumerate(results) if isinstance(found, _Sample)]
        for start in range(0, len(places), self.maximum_batch):
            batch = places[start : start + self.maximum_batch]
            for place, result in zip(batch, self._run_or_split([results[place] for place in batch]), strict=True):
                results[place] = result
        return [self.place(result) if isinstance(result, torch.Tensor) else result for result in results]

    def place(self, clip: torch.Tensor) -> torch.Tensor:
        """A clip on the decoder's device, for the calling thread."""
        return clip if self._copies is None else self._copies.place(clip)

    def close(self) -> None:
        self._readers.close()
        self._runner.close()
        self._pipeline = None

    def _prepare(self, request: ClipRequest) -> _Sample | torch.Tensor | BadClip:
        import av

        if request.is_image:
            return decode_request(request)
        try:
            check_file(request.path)
            if os.path.getsize(request.path) >= MAXIMUM_BYTES:
                raise Unsupported("a file of 2 GiB or more, which DALI cannot read: use PyAV")
            with open(request.path, "rb") as file:
                content = file.read()
            size = self._inspect(content, max(request.frames))
            return _Sample(request, np.frombuffer(content, np.uint8), size, CoverCrop.of_video(size, request.size))
        except Unsupported as error:
            return UnsupportedClip(request.row, request.path, str(error))
        except ClipError as error:
            reason = str(error)
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            reason = f"cannot be read: {describe(error)}"
        return BadClip(request.row, request.path, reason)

    def _inspect(self, content: bytes, last_frame: int) -> tuple[int, int]:
        """Height and width of the frames. ClipError if DALI would refuse the file or not give the frames asked for."""
        file = _WatchedFile(content)
        if parse_turn(file) != Turn():
            raise Unsupported("is turned or mirrored when it is shown, which DALI leaves out: use PyAV")
        file.seek(0)
        with open_video(file) as (container, stream):
            codec = codec_name(stream)
            if codec not in self.codecs:
                raise Unsupported(
                    f"DALI does not decode {codec} on the {self.device.upper()}, only {', '.join(self.codecs)}: "
                    'use decoder="auto" or "pyav"'
                )
            size = (stream.codec_context.height, stream.codec_context.width)
            count = 0
            for packet in read_packets(container, stream):
                if packet.size == 0:
                    continue
                if count <= last_frame:
                    _check_packet(packet, codec, size, count)
                count += 1
        if file.was_left:
            raise ClipError("damaged: it points to places far outside of it")
        if last_frame >= count:
            raise ClipError(f"has only {count} frames, frame {last_frame} is asked for")
        return size

    def _run_or_split(self, samples: list[_Sample], may_free: bool = True) -> list[torch.Tensor | BadClip]:
        """Decode samples; if one fails them all, find it and decode the others."""
        limit = STUCK_FACTOR * self.time_limit * len(samples)
        [outcome] = self._runner.map(self._run, [samples], limit)
        if isinstance(outcome, list):
            return outcome
        # After an error a pipeline may be unusable, and after a hang another thread is still in it.
        self._pipeline = None
        if may_free and isinstance(outcome, str) and any(sign in outcome for sign in SIGNS_OF_NO_MEMORY):
            # No fault of the clips: torch keeps what it has used once, and that may be all there is.
            torch.cuda.empty_cache()
            return self._run_or_split(samples, may_free=False)
        if len(samples) == 1:
            request = samples[0].request
            reason = f"decoding hung for {limit:g} s" if isinstance(outcome, Overdue) else outcome
            return [BadClip(request.row, request.path, reason)]
        half = len(samples) // 2
        return self._run_or_split(samples[:half]) + self._run_or_split(samples[half:])

    def _run(self, samples: list[_Sample]) -> list[torch.Tensor | BadClip] | str:
        """One run of the pipeline: the clips, or what DALI says is wrong."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(self.device, self.device_id, self.threads, self.maximum_batch)
        crops = [sample.crop for sample in samples]
        feeds = {
            "files": [sample.data for sample in samples],
            "frames": [np.array(sample.request.frames, np.int32) for sample in samples],
            "scaled_sizes": [np.array((crop.scaled_height, crop.scaled_width), np.float32) for crop in crops],
            "sizes": [np.array((crop.height, crop.width), np.float32) for crop in crops],
        }
        pipeline = self._pipeline
        try:
            for name, values in feeds.items():
                pipeline.feed_input(name, values)
            clips, shapes = pipeline.run()
        except RuntimeError as error:
            return f"DALI: {find_cause(str(error))}"
        # The memory of the outputs belongs to the pipeline, which uses it again in the next run.
        with contextlib.nullcontext() if self._copies is None else self._copies.finished():
            results = [torch.from_dlpack(clips[place]).clone() for place in range(len(samples))]
        return [_check_shape(*checked) for checked in zip(samples, results, np.array(shapes.as_tensor()), strict=True)]


def _check_shape(sample: _Sample, clip: torch.Tensor, decoded: np.ndarray) -> torch.Tensor | BadClip:
    """A decoded clip, unless DALI took the frames to be of another size ([T, H, W, 3]) than they are."""
    if tuple(decoded[1:3]) == sample.source_size:
        return clip
    height, width = sample.source_size
    reason = f"its container says {decoded[2]} x {decoded[1]} pixels, its frames have {width} x {height}"
    return BadClip(sample.request.row, sample.request.path, reason)


def _check_packet(packet: Any, codec: str, size: tuple[int, int], number: int) -> None:
    if packet.is_corrupt:
        raise ClipError(f"damaged or cut off near frame {number}")
    if packet.is_discard or (packet.pts is not None and packet.pts < 0):
        raise Unsupported("has frames that are not to be shown (an edit list), which DALI shows: use PyAV")
    data = bytes(packet)
    if is_hidden(codec, data):
        raise Unsupported("has hidden reference frames, which DALI counts: use PyAV")
    try:
        stated = read_picture_size(codec, data)
    except ValueError as error:
        raise ClipError(f"damaged near frame {number}: {error}") from None
    if stated not in (None, size):
        raise ClipError(f"frame {number} has another size than the ones before it")


def build_pipeline(device: str, device_id: int | None, threads: int, maximum_batch: int) -> Pipeline:
    """The pipeline. It takes lists of at most `maximum_batch` samples.

    Inputs: `files` (uint8 [bytes]), `frames` (int32 [T]), `scaled_sizes` and `sizes` (float32 [2]: height, width).
    Outputs: clips (float32 [3, T, H, W] in [-1, 1]) and what they were before the resize (int64 [4]: T, H, W, 3).
    """
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=maximum_batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # a run decodes what was fed for it, and nothing ahead
    )
    with pipeline:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        scaled_sizes = fn.external_source(name="scaled_sizes", dtype=types.FLOAT, ndim=1)
        sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
        videos = fn.decoders.video(
            files,
            frames=frames,
            affine=False,  # each process would pin its threads to the same first processors
            pad_mode="none",  # a frame beyond the end is an error, not a black picture
            device="mixed" if device == "gpu" else "cpu",
        )
        shapes = videos.shape()
        videos = fn.resize(
            videos,
            size=scaled_sizes,
            interp_type=types.INTERP_LINEAR,
            antialias=False,
            dtype=types.FLOAT,
        )
        videos = fn.crop_mirror_normalize(
            videos,
            crop=sizes,
            crop_pos_x=0.5,
            crop_pos_y=0.5,
            rounding="truncate",
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="CFHW",
        )
        pipeline.set_outputs(videos, shapes)
    pipeline.build()
    return pipeline


def find_cause(message: str) -> str:
    """The sentence of a DALI error that says what was wrong with the data."""
    text = message.split("encountered:", 1)[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = lines[0] if lines else message.strip()
    if cause.startswith("Assert on") and "failed:" in cause:
        cause = cause.split("failed:", 1)[1].strip()
    return cause[:300]
