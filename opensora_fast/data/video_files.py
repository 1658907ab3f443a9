"""Read and write whole videos and images: references for sampling, samples, contact sheets for reports.

Pixels are float in [-1, 1], clips [3, T, H, W], images [3, H, W] or [3, 1, H, W].
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from opensora_fast.data.decoding.clips import ClipError, ClipRequest, is_image_path
from opensora_fast.data.decoding.pyav_decoder import decode_image, describe, iterate_frames
from opensora_fast.data.decoding.resize import resize_frame
from opensora_fast.files import naming_file, whole_file

PathLike = str | os.PathLike[str]

VIDEO_QUALITY = 17
"""Constant rate factor of x264: visually without loss."""
SHEET_COLUMNS, SHEET_HEIGHT, SHEET_MARGIN, LABEL_HEIGHT = 8, 96, 4, 14
"""Of a contact sheet: frames of a clip at most, and in pixels their height, the white between them, and a label."""


def read_reference(path: PathLike, size: tuple[int, int]) -> torch.Tensor:
    """A whole image or video, resized and cropped as training clips are.

    Args:
        path: file; its ending says whether it is an image (`clips.IMAGE_EXTENSIONS`).
        size: (height, width) in pixels.

    Returns:
        float32 [3, T, height, width] in [-1, 1]; T = 1 for an image.

    Raises:
        ValueError: the file cannot be read; the message names it and the reason.
    """
    import av

    path = os.fspath(path)
    try:
        if is_image_path(path):
            return decode_image(ClipRequest(0, path, (0,), size))
        frames = []
        for pixels in iterate_frames(path):
            frames.append(torch.empty(3, *size))
            resize_frame(pixels, frames[-1])
    except (ClipError, av.FFmpegError) as error:
        reason = str(error) if isinstance(error, ClipError) else describe(error)
        raise ValueError(f"{path}: {reason}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return torch.stack(frames, dim=1)


def save_video(path: PathLike, video: torch.Tensor, fps: float) -> None:
    """Write a clip as MP4 (H.264, yuv420p, BT.601), which every player shows.

    Args:
        path: file; its folder is made.
        video: float [3, T, H, W] in [-1, 1], any device; values outside are clamped. This kind of video has even
            sides, so an odd height or width is made even by repeating the last row or column.
        fps: frames per second.

    Raises:
        ValueError: a wrong shape, no frames, or fps not above 0.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"video must be [3, T, H, W] with at least one frame, got {list(video.shape)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be above 0, got {fps}")
    frames = to_bytes(video).permute(1, 2, 3, 0).numpy()
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with (
        naming_file(Path(path)),
        whole_file(Path(path)) as part,
        av.open(os.fspath(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(VIDEO_QUALITY)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_image(path: PathLike, image: torch.Tensor) -> None:
    """Write an image as PNG, whatever the ending of `path`; its folder is made.

    Args:
        image: float [3, H, W] or [3, 1, H, W] in [-1, 1], any device; values outside are clamped.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming_file(Path(path)), whole_file(Path(path)) as part:
        _to_pillow(image).save(part, format="PNG")


def make_contact_sheet(clips: Sequence[torch.Tensor], labels: Sequence[str]) -> bytes:
    """Some frames of each clip, from its first to its last, one clip a row, for a report.

    Args:
        clips: float [3, T, H, W] in [-1, 1]; shapes may differ.
        labels: a line of text over each row.

    Returns:
        A PNG file.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = []
    for clip in clips:
        width = max(1, round(clip.shape[3] * SHEET_HEIGHT / clip.shape[2]))
        numbers = np.linspace(0, clip.shape[1] - 1, min(SHEET_COLUMNS, clip.shape[1])).round().astype(int).tolist()
        rows.append([_to_pillow(clip[:, number]).resize((width, SHEET_HEIGHT)) for number in numbers])
    font = ImageFont.load_default()
    row_height = SHEET_HEIGHT + SHEET_MARGIN + LABEL_HEIGHT
    widths = [sum(frame.width + SHEET_MARGIN for frame in row) for row in rows]
    widths += [math.ceil(font.getlength(label)) + SHEET_MARGIN for label in labels]
    sheet = Image.new("RGB", (max(widths) + SHEET_MARGIN, row_height * len(rows) + SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        left, top = SHEET_MARGIN, SHEET_MARGIN + index * row_height
        draw.text((left, top), label, fill="black", font=font)
        for frame in row:
            sheet.paste(frame, (left, top + LABEL_HEIGHT))
            left += frame.width + SHEET_MARGIN
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] as uint8 on the CPU: -1 is 0 and 1 is 255, rounded."""
    levels = video.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return levels.to("cpu", torch.uint8)


def _to_pillow(image: torch.Tensor):
    from PIL import Image

    if image.ndim == 4 and image.shape[1] == 1:
        image = image[:, 0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be [3, H, W] or [3, 1, H, W], got {list(image.shape)}")
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).contiguous().numpy())
