"""The choice of a decoder: what it is, what is said about it, and that clips go where it was said."""

import pytest
import torch
from coded_clips import draw_frames, write_clip
from PIL import Image

from opensora_fast.data.decoding.clips import BadClip, ClipRequest
from opensora_fast.data.decoding.dali_decoder import is_dali_installed
from opensora_fast.data.decoding.decoders import RoutedDecoder, build_decoder, find_codec
from opensora_fast.data.decoding.isolated_decoder import IsolatedDecoder
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder

needs_dali = pytest.mark.skipif(not is_dali_installed(), reason="DALI is not installed")


@pytest.mark.parametrize("name", ["auto", "pyav"])
def test_pyav_on_the_cpu(name):
    said = []
    decoder = build_decoder(name, report=said.append)
    assert type(decoder) is PyAVDecoder and said == ["decoder: PyAV for all codecs"]
    decoder.close()


@needs_dali
def test_dali_on_the_cpu_is_isolated(tmp_path):
    said = []
    decoder = build_decoder("dali", time_limit=30, report=said.append)
    assert type(decoder) is IsolatedDecoder
    assert said == ["decoder: DALI on the CPU for vp8, vp9, mjpeg; others are bad clips"]
    paths = [write_clip(tmp_path, coding, 12) for coding in ("vp9 webm", "h264 b-frames")]
    requests = [ClipRequest(row, str(path), (1, 9), (24, 32)) for row, path in enumerate(paths)]
    clip, refused = decoder.decode(requests)
    assert clip.shape == (3, 2, 24, 32)
    assert isinstance(refused, BadClip) and 'use decoder="auto" or "pyav"' in refused.reason
    decoder.close()


@needs_dali
def test_routing_by_codec(tmp_path):
    from opensora_fast.data.decoding.dali_decoder import DaliDecoder

    said = []
    decoder = RoutedDecoder(DaliDecoder("cpu", threads=1), PyAVDecoder(threads=1), said.append)
    Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "a.png")
    names = ("vp9 webm", "h264 b-frames", "mjpeg", "hevc closed groups")
    paths = [str(write_clip(tmp_path, coding, 12, name=coding.replace(" ", "_"))) for coding in names]
    requests = [ClipRequest(row, path, (1, 9), (24, 32)) for row, path in enumerate(paths)]
    requests += [
        ClipRequest(4, str(tmp_path / "a.png"), (0,), (24, 32)),
        ClipRequest(5, str(tmp_path / "none.mp4"), (0,), (24, 32)),
        ClipRequest(6, paths[0], (2,), (24, 32)),
    ]
    results = decoder.decode(requests)
    assert isinstance(results[5], BadClip) and "cannot be opened" in results[5].reason
    assert said == [
        "decoder: DALI decodes vp9",
        "decoder: PyAV decodes h264",
        "decoder: DALI decodes mjpeg",
        "decoder: PyAV decodes hevc",
        "decoder: PyAV decodes image",
        "decoder: PyAV decodes unreadable",
    ]
    alone = PyAVDecoder(threads=1)
    for request, result, reference in zip(requests, results, alone.decode(requests), strict=True):
        if not isinstance(result, BadClip):
            assert (result - reference).abs().max() <= 1e-4, request
    decoder.decode(requests)
    assert len(said) == 6, "said once"
    alone.close()
    decoder.close()


def test_without_dali(monkeypatch):
    monkeypatch.setattr("opensora_fast.data.decoding.dali_decoder.is_dali_installed", lambda: False)
    said = []
    decoder = build_decoder("auto", device="cuda", report=said.append)
    assert type(decoder) is PyAVDecoder
    assert len(said) == 1 and said[0].startswith("decoder: PyAV for all codecs (DALI is not installed: install it with")
    decoder.close()
    with pytest.raises(ValueError, match="pip install nvidia-dali"):
        build_decoder("dali", report=str)


@needs_dali
def test_a_driver_without_its_library_for_video_is_told_before_the_first_clip(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("opensora_fast.data.decoding.dali_decoder.VIDEO_LIBRARY", "libnvcuvid.so.999")
    said = []
    decoder = build_decoder("auto", device="cuda", report=said.append)
    assert type(decoder) is PyAVDecoder
    assert "libnvcuvid.so.999, which is not here" in said[0] and "NVIDIA_DRIVER_CAPABILITIES" in said[0]
    decoder.close()
    with pytest.raises(ValueError, match="libnvcuvid.so.999, which is not here"):
        build_decoder("dali", device="cuda", report=str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ffmpeg"}, "decoder must be one of auto, pyav, dali"),
        ({"device": "gpu"}, 'device must be "cpu" or "cuda"'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(**arguments)


def test_find_codec(tmp_path):
    assert find_codec(str(write_clip(tmp_path, "h264 b-frames", 3))) == "h264"
    assert find_codec(str(tmp_path / "none.mp4")) == "unreadable"
