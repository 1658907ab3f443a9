"""Still images as a person sees them: gray of 16 bits is gray, photos stand upright, wherever an image is read."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_fast.data.decoding.clips import BadClip, ClipError, ClipRequest
from opensora_fast.data.decoding.pyav_decoder import decode_request
from opensora_fast.data.probe import probe_media
from opensora_fast.data.video_files import read_reference

SIZE = (24, 40)
DEPTHS = ("header", "packets", "frames")
WIDE = np.random.default_rng(0).integers(0, 1 << 16, (*SIZE, 3), dtype=np.uint16)
EXPECTED = torch.from_numpy(WIDE >> 8).permute(2, 0, 1).float() / 127.5 - 1


def read(path):
    """The image [3, H, W] as training reads it; sampling must read the same."""
    image = decode_request(ClipRequest(0, str(path), (0,), SIZE))
    assert isinstance(image, torch.Tensor), image
    assert torch.equal(image, read_reference(path, SIZE))
    return image[:, 0]


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif", "big-endian.tiff"])
def test_gray_of_16_bits_keeps_its_upper_8(tmp_path, name):
    gray, path = WIDE[..., 0], tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 %d %d 65535\n" % (SIZE[1], SIZE[0]) + gray.astype(">u2").tobytes())
    else:
        Image.fromarray(gray.astype(">u2") if name.startswith("big") else gray).save(path)
    assert torch.equal(read(path), EXPECTED[:1].expand(3, -1, -1))


def test_color_of_16_bits_keeps_its_upper_8(tmp_path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in WIDE)
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert torch.equal(read(path), EXPECTED)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_levels_without_a_known_white_are_refused(tmp_path, dtype):
    path = tmp_path / "a.tif"
    Image.fromarray(WIDE[..., 0].astype(dtype)).save(path)
    result = decode_request(ClipRequest(0, str(path), (0,), SIZE))
    assert isinstance(result, BadClip) and "its levels have 32 bits" in result.reason
    for depth in DEPTHS:
        with pytest.raises(ClipError, match="its levels have 32 bits"):
            probe_media(path, depth)
    with pytest.raises(ValueError, match="a.tif: .*its levels have 32 bits"):
        read_reference(path, SIZE)


# How a camera that notes this orientation stores an upright picture: 6 begins with its right side, from the top.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
    9: lambda upright: upright,  # there is no such orientation
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_stand_upright_as_their_cameras_noted(tmp_path, suffix, orientation):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    upright = np.stack([rows * 10, columns * 6, rows * 5 + columns * 3], axis=-1).astype(np.uint8)
    exif, path = Image.Exif(), tmp_path / f"photo{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, quality=100)
    error = (read(path) - (torch.from_numpy(upright).permute(2, 0, 1).float() / 127.5 - 1)).abs().max()
    assert error <= (0 if suffix in (".png", ".tif") else 0.2)
    for depth in DEPTHS:
        info = probe_media(path, depth)
        assert (info.height, info.width) == SIZE


def test_damaged_notes_beside_a_picture_cost_nothing(tmp_path):
    path = tmp_path / "a.png"
    pixels = (WIDE >> 8).astype(np.uint8)
    Image.fromarray(pixels).save(path, exif=b"no TIFF header" + b"\xff" * 30)
    assert torch.equal(read(path), EXPECTED)
    assert probe_media(path, "header").height == SIZE[0]
