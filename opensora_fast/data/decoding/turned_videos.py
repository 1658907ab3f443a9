"""How a video is turned when it is shown: phones store pictures as they were held, and note that in the container.

Players turn them, and so does OpenCV, with which Open-Sora's tools write their tables. Its loader trains them on their
side, as decoders give them. Read is the matrix of MP4 and MOV, which is what cameras write; PyAV shows it on decoded
frames only, and neither probing nor DALI's loader decodes any.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from opensora_fast.data.decoding.video_index import check_file

Box = tuple[bytes, int, int]
"""A part of an MP4 file: its kind, and where its content begins and ends."""


@dataclass(frozen=True)
class Turn:
    """What is done to each stored picture, in this order."""

    swaps_sides: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A stored picture [H, W, 3] as it is shown: itself, or [W, H, 3] if the sides are swapped."""
        if self == Turn():
            return pixels
        if self.swaps_sides:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1])


def read_turn(path: str) -> Turn:
    """How the video of a file is turned. ClipError if there is no file."""
    check_file(path)
    with open(path, "rb") as file:
        return parse_turn(file)


def parse_turn(file: BinaryIO) -> Turn:
    """How the first video track of a seekable file is turned; not at all where no matrix by quarters is found."""
    file.seek(0, io.SEEK_END)
    for track in _find(file, [(b"", 0, file.tell())], b"moov", b"trak"):
        if any(_read(file, box, 8, 4) == b"vide" for box in _find(file, [track], b"mdia", b"hdlr")):
            for header in _find(file, [track], b"tkhd"):
                # Times of 64 instead of 32 bits, in version 1, come before it.
                matrix = _read(file, header, 52 if _read(file, header, 0, 1) == b"\1" else 40, 20)
                return _read_matrix(np.frombuffer(matrix, ">i4").tolist())
    return Turn()


def _read_matrix(values: list[int]) -> Turn:
    """From its first two rows (a, b, u) and (c, d, v): what is shown at (x, y) is stored at (ax + cy, bx + dy)."""
    if len(values) == 5:
        a, b, _, c, d = values
        if a and d and not b and not c:
            return Turn(False, d < 0, a < 0)
        if b and c and not a and not d:
            return Turn(True, b < 0, c < 0)
    return Turn()


def _find(file: BinaryIO, boxes: list[Box], *kinds: bytes) -> list[Box]:
    """The boxes of the last kind in those of the kind before, and so on, in the order of the file."""
    for kind in kinds:
        boxes = [inner for _, start, end in boxes for inner in _split(file, start, end) if inner[0] == kind]
    return boxes


def _split(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """The boxes that follow each other from `start` to `end`; none after one that is damaged."""
    while start + 8 <= end:
        file.seek(start)
        header = file.read(16)
        size, kind, content = int.from_bytes(header[:4], "big"), header[4:8], start + 8
        if size == 1:
            size, content = int.from_bytes(header[8:], "big"), start + 16
        following = start + size if size else end
        if not kind.isalnum() or not content <= following <= end:
            return
        yield kind, content, following
        start = following


def _read(file: BinaryIO, box: Box, offset: int, count: int) -> bytes:
    _, start, end = box
    file.seek(start + offset)
    return file.read(max(0, min(count, end - start - offset)))
