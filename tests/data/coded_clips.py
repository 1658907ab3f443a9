"""Small coded clips with moving content, and how to read all of their frames: the oracle of the decoder tests."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from opensora_fast.data.decoding.pyav_decoder import to_rgb

VP9 = {"deadline": "realtime", "cpu-used": "8"}


@dataclass(frozen=True)
class Coding:
    """How a clip is coded; `keyframes` is the distance between keyframes."""

    suffix: str
    codec: str
    pixels: str = "yuv420p"
    keyframes: int = 10
    options: dict = field(default_factory=dict)


CODINGS = {
    "h264 b-frames": Coding(
        ".mp4", "libx264", options={"bf": "3", "b-adapt": "0", "sc_threshold": "0", "preset": "veryfast"}
    ),
    "h264 mkv": Coding(".mkv", "libx264", options={"bf": "2", "sc_threshold": "0", "preset": "veryfast"}),
    "h264 ts": Coding(".ts", "libx264", options={"bf": "2", "preset": "veryfast"}),
    "h264 open groups": Coding(
        ".mp4",
        "libx264",
        options={"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0:keyint=10", "preset": "veryfast"},
    ),
    "hevc closed groups": Coding(
        ".mp4", "libx265", options={"x265-params": "open-gop=0:keyint=10:log-level=none", "preset": "ultrafast"}
    ),
    "hevc open groups": Coding(
        ".mp4", "libx265", options={"x265-params": "open-gop=1:keyint=10:log-level=none", "preset": "ultrafast"}
    ),
    "vp9 webm": Coding(".webm", "libvpx-vp9", options=VP9),
    "vp9 mp4 hidden frames": Coding(
        ".mp4", "libvpx-vp9", options={"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "12"}
    ),
    "vp8": Coding(".webm", "libvpx", options=VP9),
    "mjpeg": Coding(".avi", "mjpeg", pixels="yuvj420p"),
    "mpeg4": Coding(".avi", "mpeg4"),
}


def draw_frames(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth moving colors, a moving block with sharp edges, and no two frames alike."""
    height, width = size
    rng = np.random.default_rng(seed)
    speed = rng.uniform(1.0, 4.0, 3)
    rows, columns = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        for channel in range(3):
            phase = speed[channel] * number
            wave = np.sin((columns + phase) / 17 + channel) + np.cos((rows - phase) / 13)
            frames[number, ..., channel] = np.clip(127 + 60 * wave, 0, 255)
        left = (5 * number) % max(1, width - 16)
        frames[number, height // 3 : height // 3 + 12, left : left + 16] = (250, 240 - 3 * (number % 70), 20)
    return frames


def write_clip(folder: Path, coding: str | Coding, count: int = 40, size=(72, 128), name: str = "clip") -> Path:
    """Write a clip in one of the CODINGS; 25 frames per second."""
    coding = CODINGS[coding] if isinstance(coding, str) else coding
    path = Path(folder) / (name + coding.suffix)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(coding.codec, rate=25, options=dict(coding.options))
        stream.height, stream.width, stream.pix_fmt = *size, coding.pixels
        stream.gop_size = coding.keyframes
        for number, pixels in enumerate(draw_frames(count, size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_all(path: Path | str) -> np.ndarray:
    """uint8 [T, H, W, 3]: the full decode from the start, with no options at all."""
    with av.open(str(path)) as container:
        return np.stack([to_rgb(frame) for frame in container.decode(video=0)])
