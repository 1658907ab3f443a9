"""Videos stand upright as their containers say, wherever a video is read."""

import io
import struct

import av
import numpy as np
import pytest
import torch
from coded_clips import draw_frames, read_all

from opensora_fast.data.decoding.clips import ClipRequest, UnsupportedClip
from opensora_fast.data.decoding.dali_decoder import DaliDecoder, is_dali_installed
from opensora_fast.data.decoding.pyav_decoder import decode_request
from opensora_fast.data.decoding.turned_videos import ROLL, SEGMENT, Turn, parse_turn, read_turn
from opensora_fast.data.probe import probe_media
from opensora_fast.data.video_files import read_reference

SIZE = (48, 64)
FRAMES = 14


def write(path, degrees=0, hflip=False, vflip=False, codec="libx264", **options):
    with av.open(str(path), "w", options=options) as container:
        # A track before that of the pictures, which is not turned.
        sound = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000)
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", 5
        stream.set_display_rotation(degrees, hflip, vflip)
        for pixels in draw_frames(FRAMES, SIZE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize(("hflip", "vflip"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_turned_and_mirrored_videos_stand_upright(tmp_path, suffix, degrees, hflip, vflip):
    path = write(tmp_path / f"a{suffix}", degrees, hflip, vflip)
    shown = np.rot90(read_all(path), degrees // 90, axes=(1, 2))  # counter-clockwise
    shown = shown[:, :: -1 if vflip else 1, :: -1 if hflip else 1]
    expected = torch.from_numpy(shown.copy()).permute(3, 0, 1, 2) / 127.5 - 1
    size = shown.shape[1:3]
    assert size == (SIZE if degrees % 180 == 0 else SIZE[::-1])
    assert torch.equal(read_reference(path, size), expected)
    for frames in ((0, 1), (11, 13)):  # from the start, and from a keyframe
        assert torch.equal(decode_request(ClipRequest(0, str(path), frames, size)), expected[:, list(frames)])
    for depth in ("header", "packets", "frames"):
        info = probe_media(path, depth)
        assert (info.num_frames, info.height, info.width) == (FRAMES, *size)


@pytest.mark.skipif(not is_dali_installed(), reason="DALI is not installed")
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_dali_leaves_turned_videos_to_others(tmp_path, suffix):
    upright, turned = (write(tmp_path / f"{turn}{suffix}", turn, codec="libvpx-vp9") for turn in (0, 90))
    decoder = DaliDecoder("cpu", threads=1)
    clip, refused = decoder.decode([ClipRequest(0, str(path), (0, 3), SIZE) for path in (upright, turned)])
    decoder.close()
    assert clip.shape == (3, 2, *SIZE)
    assert isinstance(refused, UnsupportedClip) and refused.reason.startswith("is turned or mirrored")


def test_the_matrix_is_found_before_and_behind_the_pictures(tmp_path):
    for options in ({"movflags": "faststart"}, {}, {"movflags": "frag_keyframe+empty_moov"}):
        assert read_turn(str(write(tmp_path / "a.mp4", 90, **options))) == Turn(True, True, False)


def test_the_angles_are_found_in_matroska_written_to_a_pipe(tmp_path):
    """Such a file does not know its own length."""
    path = write(tmp_path / "a.mkv", 270, live="1")
    assert path.read_bytes().count(SEGMENT + b"\x01" + b"\xff" * 7) == 1
    assert read_turn(str(path)) == Turn(True, False, True)


def test_other_containers_matrices_and_angles_turn_nothing(tmp_path):
    assert read_turn(str(write(tmp_path / "a.avi", 90))) == Turn()
    assert read_turn(str(write(tmp_path / "a.mkv"))) == Turn()
    content = write(tmp_path / "a.mkv", 90).read_bytes()
    rolled, slanted = (ROLL + b"\x88" + struct.pack(">d", angle) for angle in (90, 45))
    assert content.count(rolled) == 1 and parse_turn(io.BytesIO(content)) != Turn()
    assert parse_turn(io.BytesIO(content.replace(rolled, slanted))) == Turn()
    content = write(tmp_path / "a.mp4", 90).read_bytes()
    by_a_quarter, slanted = (np.array(values, ">i4").tobytes() for values in ((0, -65536), (32768, -65536)))
    assert content.count(by_a_quarter) == 1 and parse_turn(io.BytesIO(content)) != Turn()
    assert parse_turn(io.BytesIO(content.replace(by_a_quarter, slanted))) == Turn()


@pytest.mark.parametrize(("suffix", "options"), [(".mp4", {"movflags": "faststart"}), (".mkv", {})])
def test_damaged_files_are_searched_without_an_error(tmp_path, suffix, options):
    content = write(tmp_path / f"a{suffix}", 90, **options).read_bytes()
    assert parse_turn(io.BytesIO(content)) == Turn(True, True, False)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content[: rng.integers(0, len(content))])
        for place in rng.integers(0, max(1, len(damaged)), 20 if damaged else 0):
            damaged[place] = rng.integers(0, 256)
        assert isinstance(parse_turn(io.BytesIO(damaged)), Turn)
