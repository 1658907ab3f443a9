"""Size of the picture in a compressed VP8, VP9 or MJPEG packet, read from its header without decoding.

DALI takes the size of a video from the container and believes it: of a frame of another size it returns a part, or
reads past the end of the picture. So the sizes that the packets themselves give are compared beforehand.
"""

from __future__ import annotations

Size = tuple[int, int]
"""Height and width in pixels."""


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.value = int.from_bytes(data, "big")
        self.left = 8 * len(data)

    def read(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError("the header is cut off")
        return self.value >> self.left & (1 << count) - 1


def read_picture_size(codec: str, data: bytes) -> Size | None:
    """The size that a packet states, or None where it takes over that of an earlier picture (or the codec is another).

    Raises:
        ValueError: the header is damaged.
    """
    if codec == "vp8":
        return _read_vp8(data)
    if codec == "vp9":
        return _read_vp9(data)
    return _read_jpeg(data) if codec == "mjpeg" else None


def is_hidden(codec: str, data: bytes) -> bool:
    """Whether a packet holds a VP8 picture that is only a reference for others and never shown."""
    return codec == "vp8" and len(data) > 0 and not data[0] & 0x10


def _read_vp8(data: bytes) -> Size | None:
    if len(data) < 3:
        raise ValueError("the header is cut off")
    if data[0] & 1:
        return None  # not a keyframe
    if len(data) < 10 or data[3:6] != b"\x9d\x01\x2a":
        raise ValueError("the keyframe has no start code")
    width, height = (int.from_bytes(data[start : start + 2], "little") & 0x3FFF for start in (6, 8))
    return height, width


def _read_vp9(data: bytes) -> Size | None:
    bits = _Bits(data[:24])
    if bits.read(2) != 2:
        raise ValueError("no frame marker")
    profile = bits.read(1) | bits.read(1) << 1
    if profile == 3:
        bits.read(1)
    if bits.read(1):
        return None  # shows an earlier picture again
    inter, shown, resilient = bits.read(1), bits.read(1), bits.read(1)
    if not inter:
        _check_vp9_start_code(bits)
        _skip_vp9_colors(bits, profile)
        return _read_vp9_size(bits)
    intra_only = 0 if shown else bits.read(1)
    if not resilient:
        bits.read(2)
    if intra_only:
        _check_vp9_start_code(bits)
        if profile > 0:
            _skip_vp9_colors(bits, profile)
        bits.read(8)
        return _read_vp9_size(bits)
    bits.read(8 + 3 * 4)  # pictures to replace, three references with a sign each
    if any(bits.read(1) for _ in range(3)):
        return None  # has the size of that reference
    return _read_vp9_size(bits)


def _check_vp9_start_code(bits: _Bits) -> None:
    if bits.read(24) != 0x498342:
        raise ValueError("the keyframe has no start code")


def _skip_vp9_colors(bits: _Bits, profile: int) -> None:
    if profile >= 2:
        bits.read(1)
    if bits.read(3) != 7:  # not RGB
        bits.read(1)
        if profile in (1, 3):
            bits.read(3)
    elif profile in (1, 3):
        bits.read(1)


def _read_vp9_size(bits: _Bits) -> Size:
    width, height = bits.read(16) + 1, bits.read(16) + 1
    return height, width


def _read_jpeg(data: bytes) -> Size:
    """From the start-of-frame segment; the segments before it say how long they are."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            raise ValueError("a segment has no marker")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[start : start + 2], "big") for start in (position + 5, position + 7))
            return height, width
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise ValueError("it states no size")
