"""Small videos and images, written where a test wants them."""

from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_video(path: Path, *, frames: int = 12, size: tuple[int, int] = (48, 64), fps: int = 24, **arguments) -> Path:
    """A moving gradient of `size` (height, width). `codec`, `options` (of the codec) and `movflags` may be given."""
    codec = arguments.get("codec", "libx264")
    container_options = {"movflags": arguments["movflags"]} if "movflags" in arguments else {}
    height, width = size
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=fps, options=arguments.get("options", {}))
        stream.height, stream.width = height, width
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        rows, columns = np.mgrid[:height, :width]
        for number in range(frames):
            pixels = np.stack([rows * 4 + number * 9, columns * 3, rows + columns + number * 5], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_image(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    """A noisy image of `size` (height, width)."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
