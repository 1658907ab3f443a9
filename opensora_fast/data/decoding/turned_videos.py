"""How a video is turned when it is shown: phones store pictures as they were held, and note that in the container.

Players turn them, and so does OpenCV, with which Open-Sora's tools write their tables. Its loader trains them on their
side, as decoders give them. Read are the matrix of MP4 and MOV, which is what cameras write, and the angles of Matroska
and WebM, into which FFmpeg translates it; PyAV shows them on decoded frames only, and neither probing nor DALI's loader
decodes any.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from opensora_fast.data.decoding.video_index import check_file

Box = tuple[bytes, int, int]
"""A part of an MP4 or Matroska file: its kind, and where its content begins and ends."""
Split = Callable[[BinaryIO, int, int], Iterator[Box]]

# Kinds of the parts of a Matroska file.
HEADER, SEGMENT, CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
TRACKS, TRACK, TRACK_TYPE, VIDEO = b"\x16\x54\xae\x6b", b"\xae", b"\x83", b"\xe0"
PROJECTION, SHAPE, YAW, PITCH, ROLL = (b"\x76" + kind for kind in (b"\x70", b"\x71", b"\x73", b"\x74", b"\x75"))


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
    """How the first video track of a seekable file is turned; not at all where no turn by quarters is found."""
    whole = b"", 0, file.seek(0, io.SEEK_END)
    return _parse_matroska(file, whole) if _read(file, whole, 0, 4) == HEADER else _parse_mp4(file, whole)


def _parse_mp4(file: BinaryIO, whole: Box) -> Turn:
    for track in _find(file, [whole], _split_mp4, b"moov", b"trak"):
        if any(_read(file, box, 8, 4) == b"vide" for box in _find(file, [track], _split_mp4, b"mdia", b"hdlr")):
            for header in _find(file, [track], _split_mp4, b"tkhd"):
                # Times of 64 instead of 32 bits, in version 1, come before it.
                matrix = _read(file, header, 52 if _read(file, header, 0, 1) == b"\1" else 40, 20)
                return _read_matrix(np.frombuffer(matrix, ">i4").tolist())
    return Turn()


def _parse_matroska(file: BinaryIO, whole: Box) -> Turn:
    for track in _find(file, [whole], _split_matroska, SEGMENT, TRACKS, TRACK):
        if _read_whole_number(file, track, TRACK_TYPE) == 1:
            for projection in _find(file, [track], _split_matroska, VIDEO, PROJECTION):
                if _read_whole_number(file, projection, SHAPE) == 0:  # others show a sphere
                    return _read_angles(*(_read_angle(file, projection, kind) for kind in (YAW, PITCH, ROLL)))
            return Turn()
    return Turn()


def _read_angles(yaw: float, pitch: float, roll: float) -> Turn:
    """From degrees: a picture is rolled counter-clockwise, and seen from behind, as in a mirror, at a yaw of 180."""
    if yaw not in (-180, 0, 180) or pitch or roll % 90:
        return Turn()
    mirrored = -1 if yaw else 1
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(roll * mirrored // 90) % 4]
    return _read_matrix([mirrored * cosine, -sine, 0, mirrored * sine, cosine])


def _read_whole_number(file: BinaryIO, parent: Box, kind: bytes) -> int:
    """A number in a part of a Matroska file; 0 if it is not there."""
    return int.from_bytes(_read_first(file, parent, kind), "big")


def _read_angle(file: BinaryIO, parent: Box, kind: bytes) -> float:
    """Likewise degrees, which are floating-point."""
    content = _read_first(file, parent, kind)
    return struct.unpack({4: ">f", 8: ">d"}[len(content)], content)[0] if len(content) in (4, 8) else 0.0


def _read_first(file: BinaryIO, parent: Box, kind: bytes) -> bytes:
    return next((_read(file, box, 0, 8) for box in _find(file, [parent], _split_matroska, kind)), b"")


def _read_matrix(values: list[int]) -> Turn:
    """From its first two rows (a, b, u) and (c, d, v): what is shown at (x, y) is stored at (ax + cy, bx + dy)."""
    if len(values) == 5:
        a, b, _, c, d = values
        if a and d and not b and not c:
            return Turn(False, d < 0, a < 0)
        if b and c and not a and not d:
            return Turn(True, b < 0, c < 0)
    return Turn()


def _find(file: BinaryIO, boxes: list[Box], split: Split, *kinds: bytes) -> list[Box]:
    """The boxes of the last kind in those of the kind before, and so on, in the order of the file."""
    for kind in kinds:
        boxes = [inner for _, start, end in boxes for inner in split(file, start, end) if inner[0] == kind]
    return boxes


def _split_mp4(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
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


def _split_matroska(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """The parts that follow each other from `start` to `end`; none from the pictures on, or after a damaged one."""
    while start < end:
        file.seek(start)
        header = file.read(12)
        kind, size = _take_number(header), _take_number(header[len(_take_number(header)) :])
        if len(kind) not in range(1, 5) or not size or kind == CLUSTER:
            return
        content = start + len(kind) + len(size)
        bits = 7 * len(size)
        length = int.from_bytes(size, "big") & (1 << bits) - 1
        # All ones: unknown, as of what is written to a pipe. Beyond the end: of a file that is cut off.
        following = end if length == (1 << bits) - 1 else min(content + length, end)
        yield kind, content, following
        start = following


def _take_number(data: bytes) -> bytes:
    """The number of 1 to 8 bytes that data begin with, whose first bits that are 0 say how many follow; or nothing."""
    length = 9 - data[0].bit_length() if data else 0
    return data[:length] if length <= min(8, len(data)) else b""


def _read(file: BinaryIO, box: Box, offset: int, count: int) -> bytes:
    _, start, end = box
    file.seek(start + offset)
    return file.read(max(0, min(count, end - start - offset)))
