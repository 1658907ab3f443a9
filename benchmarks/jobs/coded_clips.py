"""The same moving pictures in every codec and resolution, for the loader's benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FPS, KEYFRAME_DISTANCE = 24, 30


@dataclass(frozen=True)
class Coding:
    """How a codec is written."""

    encoder: str
    ending: str
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)


CODINGS = {
    "h264": Coding("libx264", ".mp4", options={"crf": "23", "preset": "veryfast"}),
    "hevc": Coding("libx265", ".mp4", options={"crf": "28", "preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9": Coding("libvpx-vp9", ".webm", options={"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}),
    "av1": Coding("libsvtav1", ".mp4", options={"preset": "10", "crf": "35"}),
    "mpeg4": Coding("mpeg4", ".avi", options={"q": "5"}),
    "mjpeg": Coding("mjpeg", ".avi", pixels="yuvj420p"),
}


def read_source(frames: int) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] of 720p: of the demo's cartoon, or drawn ones where it is missing."""
    from opensora_fast.data.decoding.pyav_decoder import iterate_frames
    from opensora_fast.data.demo_clips import CARTOON, find_source_videos

    try:
        path = find_source_videos()[CARTOON]
    except ValueError:
        return [draw_frame(number) for number in range(frames)]
    return [frame for _, frame in zip(range(frames), iterate_frames(str(path)), strict=False)]


def draw_frame(number: int) -> np.ndarray:
    """A moving block over slow waves: something for motion search to find, and sharp edges."""
    height, width = 720, 1280
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack(
        [
            128 + 100 * np.sin((rows + 5 * number) / 37),
            128 + 100 * np.sin((columns - 3 * number) / 53),
            128 + 100 * np.sin((rows + columns + 4 * number) / 71),
        ],
        axis=-1,
    )
    top, left = (11 * number) % (height - 120), (17 * number) % (width - 160)
    picture[top : top + 120, left : left + 160] = (230, 40, 60)
    return picture.astype(np.uint8)


def write_coded(path: Path, source: list[np.ndarray], size: tuple[int, int], coding: Coding) -> None:
    """Writes the frames at `size` (height, width).

    Raises:
        ValueError: this build of FFmpeg has no such encoder.
    """
    import av

    try:
        av.codec.Codec(coding.encoder, "w")
    except ValueError:  # av.codec.codec.UnknownCodecError is one
        raise ValueError(f"this build of FFmpeg has no encoder {coding.encoder}") from None
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(coding.encoder, rate=FPS, options=coding.options)
        stream.height, stream.width, stream.pix_fmt = height, width, coding.pixels
        stream.codec_context.gop_size = KEYFRAME_DISTANCE
        for number, pixels in enumerate(source):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(width=width, height=height, format=coding.pixels)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
