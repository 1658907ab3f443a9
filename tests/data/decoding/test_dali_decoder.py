"""DALI: the same clips as PyAV, whatever is together in a run; a bad clip costs itself alone."""

import json
import re
import shutil
import threading

import av
import numpy as np
import pytest
import torch
from coded_clips import CODINGS, Coding, draw_frames, read_all, write_clip
from failing_decoders import CrashingDaliDecoder
from PIL import Image
from test_pyav_decoder import join, move_index_to_the_front

from opensora_fast.cli import run
from opensora_fast.data.decoding import dali_decoder
from opensora_fast.data.decoding.clips import BadClip, ClipRequest
from opensora_fast.data.decoding.dali_decoder import DaliDecoder, build_pipeline, find_cause
from opensora_fast.data.decoding.decoders import RoutedDecoder
from opensora_fast.data.decoding.isolated_decoder import IsolatedDecoder
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

LEVELS_OF_COLOR = 0
"""Largest difference of an 8-bit value between DALI on the CPU and PyAV before the resize: none."""
CLIP_BOUND = 1e-4
"""Largest difference after the resize, of values in [-1, 1]: 1/78 of a level, from the order of float32 operations."""

DALI_CODINGS = [name for name, coding in CODINGS.items() if coding.codec in ("libvpx", "libvpx-vp9", "mjpeg")]


@pytest.fixture(scope="module")
def dali():
    decoder = DaliDecoder("cpu", threads=2, maximum_batch=4, time_limit=30)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def pyav():
    decoder = PyAVDecoder(threads=2, time_limit=30)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dali")
    sizes = [(72, 128), (121, 213), (64, 48), (90, 160)]
    return [
        write_clip(folder, coding, 30, sizes[number % 4], name=str(number))
        for number, coding in enumerate(DALI_CODINGS)
    ]


def reason(result) -> str:
    assert isinstance(result, BadClip), result
    return result.reason


@pytest.mark.parametrize("coding", DALI_CODINGS)
def test_colors_are_those_of_pyav(tmp_path, coding):
    """The pipeline without resize: a size equal to that of the file."""
    size = (72, 130)  # 130 is no multiple of 32, for which DALI takes another path
    path = write_clip(tmp_path, coding, 12, size)
    with DaliSession() as dali:
        (clip,) = dali.decode([ClipRequest(0, str(path), tuple(range(12)), size)])
    levels = ((clip + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.abs(levels.astype(int) - read_all(path)).max() <= LEVELS_OF_COLOR


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("space", ["ITU601", "ITU709", "BT2020"])
def test_tagged_colors_are_those_of_pyav(tmp_path, space, full_range):
    from av.video.reformatter import ColorRange, Colorspace

    path, size = str(tmp_path / "a.webm"), (64, 96)
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options=CODINGS["vp9 webm"].options)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.colorspace = Colorspace[space]
        stream.codec_context.color_range = ColorRange.JPEG if full_range else ColorRange.MPEG
        for pixels in draw_frames(3, size):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.colorspace, frame.color_range = stream.codec_context.colorspace, stream.codec_context.color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with DaliSession() as dali:
        (clip,) = dali.decode([ClipRequest(0, path, (0, 1, 2), size)])
    levels = ((clip + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.abs(levels.astype(int) - read_all(path)).max() <= LEVELS_OF_COLOR


def test_clips_of_all_shapes_in_one_run(dali, pyav, files):
    """More clips than fit into a run, of different files, lengths, frames (out of order, repeated) and sizes."""
    rng = np.random.default_rng(0)
    requests = []
    for row in range(11):
        frames = tuple(rng.integers(0, 30, rng.integers(1, 9)).tolist())
        size = tuple(rng.integers(8, 150, 2).tolist())
        requests.append(ClipRequest(row, str(files[row % len(files)]), frames, size))
    for request, ours, theirs in zip(requests, dali.decode(requests), pyav.decode(requests), strict=True):
        assert isinstance(ours, torch.Tensor), ours
        assert ours.shape == theirs.shape == (3, len(request.frames), *request.size)
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert (ours - theirs).abs().max() <= CLIP_BOUND, request


def test_same_pipeline_for_all(dali, files):
    pipeline = dali._pipeline
    for size in ((20, 30), (40, 30)):
        dali.decode([ClipRequest(0, str(files[0]), (0, 1), size)])
    assert dali._pipeline is pipeline


def test_images_are_read_with_pillow(tmp_path, dali, pyav, files):
    Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "a.png")
    requests = [
        ClipRequest(0, str(tmp_path / "a.png"), (0,), (20, 30)),
        ClipRequest(1, str(files[0]), (3,), (20, 30)),
    ]
    image, clip = dali.decode(requests)
    assert torch.equal(image, pyav.decode(requests)[0]) and clip.shape == image.shape


def test_one_bad_clip_of_many(tmp_path, dali, pyav, files):
    """Each is refused with its reason, and every other clip is what it is without them."""
    vp9 = write_clip(tmp_path, "vp9 webm", 30, name="cut")
    vp9.write_bytes(vp9.read_bytes()[: vp9.stat().st_size // 2])
    h264 = write_clip(tmp_path, "h264 b-frames", 30)
    (tmp_path / "text.webm").write_text("Not a video. " * 99)
    (tmp_path / "empty.webm").touch()
    lie = state_another_size(write_clip(tmp_path, "vp9 mp4 hidden frames", 30, name="lie"), (72, 128), (144, 128))
    bad = [
        (vp9, r"has only \d+ frames, frame 29 is asked for|cut off near frame"),
        (h264, r"DALI does not decode h264 on the CPU, only vp8, vp9, mjpeg: use decoder=\"auto\" or \"pyav\""),
        (tmp_path / "text.webm", "cannot be read: InvalidDataError"),
        (tmp_path / "empty.webm", "empty file"),
        (tmp_path / "none.webm", "cannot be opened: No such file or directory"),
        (lie, "its container says 128 x 144 pixels, its frames have 128 x 72|DALI: "),
        (files[0], "has only 30 frames, frame 31 is asked for"),
    ]
    requests, expected = [], {}
    for row, (path, text) in enumerate(bad):
        requests.append(ClipRequest(2 * row, str(path), (3, 31 if path == files[0] else 29), (24, 32)))
        requests.append(ClipRequest(2 * row + 1, str(files[row % len(files)]), (row, 29), (24, 32)))
        expected[2 * row] = text
    results = dali.decode(requests)
    reference = pyav.decode(requests)
    for request, result, other in zip(requests, results, reference, strict=True):
        if request.row in expected:
            assert (result.row, result.path) == (request.row, request.path)
            assert re.match(expected[request.row], reason(result)), reason(result)
        else:
            assert (result - other).abs().max() <= CLIP_BOUND


def test_damage_that_only_decoding_shows(tmp_path, dali, pyav, files):
    """Damaged pictures fail the whole run: it is halved until the damaged clips are alone."""
    path = write_clip(tmp_path, Coding(".webm", "libvpx-vp9", keyframes=30, options=CODINGS["vp9 webm"].options), 30)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    requests = [
        ClipRequest(row, str(path if row in (1, 6) else files[row % len(files)]), (0, 20, 29), (24, 32))
        for row in range(8)
    ]
    results = dali.decode(requests)
    assert [isinstance(result, BadClip) for result in results] == [row in (1, 6) for row in range(8)]
    for row in (0, 2, 3, 4, 5, 7):
        (alone,) = pyav.decode([requests[row]])
        assert (results[row] - alone).abs().max() <= CLIP_BOUND


@pytest.mark.parametrize("coding", ["vp9 webm", "vp8", "mjpeg"])
def test_frame_size_changes(tmp_path, dali, coding):
    parts = [write_clip(tmp_path, coding, 5, size, name) for name, size in (("a", (72, 128)), ("b", (48, 64)))]
    path = tmp_path / f"both{parts[0].suffix}"
    join(path, parts)
    (result,) = dali.decode([ClipRequest(0, str(path), (0, 7), (24, 32))])
    assert reason(result) == "frame 5 has another size than the ones before it"
    (result,) = dali.decode([ClipRequest(0, str(path), (0, 4), (24, 32))])
    assert isinstance(result, torch.Tensor)


def test_hidden_frames_of_vp8(tmp_path, dali, pyav):
    """A reference frame that is never shown is no frame: DALI counts it, so the clip is refused or goes to PyAV."""
    good = write_clip(tmp_path, "vp8", 12)
    path = tmp_path / "hidden.webm"
    with av.open(str(good)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            if number in (3, 7):
                data = bytearray(bytes(packet))
                data[0] &= ~0x10  # the bit that says "show"
                packet = copy_packet(packet, bytes(data))
            packet.stream = stream
            writer.mux(packet)
    (theirs,) = pyav.decode([ClipRequest(0, str(path), (2, 3, 9), (24, 32))])
    (whole,) = pyav.decode([ClipRequest(0, str(good), (2, 4, 11), (24, 32))])
    assert torch.equal(theirs, whole)
    requests = [ClipRequest(row, str(file), (2, 3, 9), (24, 32)) for row, file in enumerate((good, path, path))]
    _, ours, again = dali.decode(requests)
    assert "hidden reference frames" in reason(ours) and reason(again) == reason(ours)
    said = []
    routed = RoutedDecoder(dali, pyav, said.append)
    _, ours, again = routed.decode(requests)
    assert torch.equal(ours, theirs) and torch.equal(again, theirs)
    assert said == [
        "decoder: DALI decodes vp8",
        f"decoder: PyAV decodes vp8 where DALI cannot: {path} has hidden reference frames, which DALI counts: use PyAV",
    ]


def test_truncated_file_with_a_whole_index(tmp_path, dali):
    """The index promises 40 frames; DALI alone would fill up what is missing and say nothing."""
    path = write_clip(tmp_path, "vp9 mp4 hidden frames", 40)
    move_index_to_the_front(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    early, late = dali.decode(
        [ClipRequest(0, str(path), (0, 9), (24, 32)), ClipRequest(1, str(path), (0, 39), (24, 32))]
    )
    assert isinstance(early, torch.Tensor)
    assert re.search("is asked for|cut off near", reason(late))


def test_index_that_points_far_outside(tmp_path, dali, files):
    """Eight bytes that make DALI itself crash: its reader subtracts positions in 32 bits and reads before its data."""
    path = point_far_outside(write_clip(tmp_path, "mjpeg", 12))
    requests = [
        ClipRequest(0, str(path), (0, 5), (24, 32)),
        ClipRequest(1, str(files[0]), (0, 5), (24, 32)),
    ]
    refused, clip = dali.decode(requests)
    assert reason(refused) == "damaged: it points to places far outside of it"
    assert isinstance(clip, torch.Tensor)


def test_a_crash_of_dali_costs_one_clip(tmp_path, files):
    """The process of the decoder is lost with its pipeline, and nothing else."""
    path = shutil.copy(files[1], tmp_path / "crash.webm")
    decoder = IsolatedDecoder(CrashingDaliDecoder, time_limit=60)
    requests = [ClipRequest(row, str(path if row == 1 else files[0]), (0, 5), (72, 128)) for row in range(4)]
    results = decoder.decode(requests)
    decoder.close()
    assert [isinstance(result, torch.Tensor) for result in results] == [True, False, True, True]
    assert reason(results[1]) == "decoding crashed (SIGSEGV)"


def test_files_of_two_gibibytes(tmp_path, dali):
    path = tmp_path / "large.webm"
    with open(path, "wb") as file:
        file.truncate(2**31)
    (result,) = dali.decode([ClipRequest(0, str(path), (0, 5), (24, 32))])
    assert reason(result) == "a file of 2 GiB or more, which DALI cannot read: use PyAV"


def test_hang_costs_one_clip(files, monkeypatch):
    real, release = DaliDecoder._run, threading.Event()

    def run(self, samples):
        if any(sample.request.row == 1 for sample in samples):
            release.wait(60)
        return real(self, samples)

    monkeypatch.setattr(DaliDecoder, "_run", run)
    monkeypatch.setattr(dali_decoder, "STUCK_FACTOR", 1.0)
    decoder = DaliDecoder("cpu", threads=1, time_limit=1.0)
    decoder.decode([ClipRequest(0, str(files[0]), (0, 1), (16, 16))])  # makes the pipeline
    results = decoder.decode([ClipRequest(row, str(files[0]), (0, 1), (16, 16)) for row in range(2)])
    assert [isinstance(result, BadClip) for result in results] == [False, True]
    assert "hung" in reason(results[1])
    decoder.close()
    release.set()


def test_errors():
    with pytest.raises(ValueError, match="device must be"):
        DaliDecoder("tpu")
    with pytest.raises(ValueError, match="maximum_batch"):
        DaliDecoder("cpu", maximum_batch=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees none"):
            DaliDecoder("gpu")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(dali_decoder, "is_dali_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        DaliDecoder("cpu")


def test_find_cause():
    message = (
        "Critical error in pipeline:\nError in CPU operator `x`,\nwhich was used ...\n\nencountered:\n\n"
        'Assert on "ret >= 0" failed: Could not convert frame data: Invalid argument\nC++ context: [a.cc:1]\n'
    )
    assert find_cause(message) == "Could not convert frame data: Invalid argument"
    assert find_cause("something else") == "something else"


@pytest.mark.gpu
@pytest.mark.parametrize("coding", ["h264 b-frames", "hevc closed groups", "vp9 webm"])
def test_gpu_agrees_with_pyav(tmp_path, pyav, coding):
    """Not bit for bit: the GPU converts and interpolates chroma in another way."""
    path = write_clip(tmp_path, coding, 40, (144, 256))
    requests = [ClipRequest(0, str(path), (0, 3, 17, 39), size) for size in ((144, 256), (72, 128))]
    decoder = DaliDecoder("gpu", time_limit=30)
    for ours, theirs in zip(decoder.decode(requests), pyav.decode(requests), strict=True):
        assert ours.device.type == "cuda"
        difference = (ours.cpu() - theirs).abs() * 127.5
        assert difference.mean() < 2 and difference.quantile(0.99) < 12
    decoder.close()


@pytest.mark.gpu
def test_gpu_pipeline_is_the_same_code(files):
    build_pipeline("gpu", torch.cuda.current_device(), 2, 4)


def test_where_the_gpu_is_full_torch_gives_back_what_it_keeps_before_a_clip_is_called_bad(dali, files, monkeypatch):
    real, events, kept = DaliDecoder._run, [], [True]

    def run(self, samples):
        events.append(len(samples))
        return "DALI: Can't allocate 7077888 bytes on device 0." if kept else real(self, samples)

    monkeypatch.setattr(DaliDecoder, "_run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (events.append("given back"), kept.clear()))
    requests = [ClipRequest(row, str(files[row]), (0, 3), (24, 32)) for row in range(2)]
    assert not any(isinstance(clip, BadClip) for clip in dali.decode(requests))
    assert events == [2, "given back", 2]

    events.clear()
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, samples: "DALI: Can't allocate 7077888 bytes on device 0.")
    assert [clip.reason for clip in dali.decode(requests)] == ["DALI: Can't allocate 7077888 bytes on device 0."] * 2


@pytest.mark.gpu
def test_gpu_clips_of_many_sizes_in_one_run(tmp_path, pyav):
    """Files and targets of different sizes and lengths, more than one run takes; a file cut off costs itself alone."""
    sizes = [(144, 256), (240, 426), (180, 180)]
    paths = [write_clip(tmp_path, "h264 b-frames", 30, size, name=str(number)) for number, size in enumerate(sizes)]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(paths[0].read_bytes()[:-2000])
    requests = [
        ClipRequest(row, str(paths[row % 3]), tuple(range(row % 5, 30, 7)), sizes[(row + 1) % 3]) for row in range(10)
    ]
    requests.insert(4, ClipRequest(99, str(cut), (0, 29), (144, 256)))
    decoder = DaliDecoder("gpu", threads=2, maximum_batch=4, time_limit=30)
    for ours, theirs in zip(decoder.decode(requests), pyav.decode(requests), strict=True):
        assert isinstance(ours, BadClip) == isinstance(theirs, BadClip)
        if isinstance(ours, torch.Tensor):
            assert ours.device.type == "cuda" and ours.shape == theirs.shape and ours.dtype == torch.float32
            assert ours.abs().max() < 1 + CLIP_BOUND and ((ours.cpu() - theirs).abs() * 127.5).mean() < 2
    decoder.close()


@pytest.mark.gpu
def test_a_clip_reaches_the_gpu_while_the_stream_that_trains_is_busy(tmp_path):
    Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "a.png")
    request = ClipRequest(0, str(tmp_path / "a.png"), (0,), (24, 32))
    decoder = DaliDecoder("gpu", threads=1)
    (first,) = decoder.decode([request])
    torch.cuda._sleep(1 << 33)  # about four seconds
    end = torch.cuda.Event()
    end.record()
    (second,) = decoder.decode([request])
    assert not end.query()
    assert torch.equal(first, second)
    decoder.close()


@pytest.mark.gpu
def test_training_from_clips_that_the_gpu_decodes(tmp_path):
    train_from_clips(tmp_path, "h264 b-frames", "cuda")


def train_from_clips(folder, coding, device):
    """Three steps of the demo's model, all clips decoded by DALI where the model is; the losses of two runs agree."""
    clips = folder / "clips"
    clips.mkdir()
    for number in range(4):
        write_clip(clips, coding, 40, (144, 256), name=f"clip-{number}")
    table = folder / "clips.csv"
    assert run(["data", "probe", str(clips), "--out", str(table)]) == 0
    losses = []
    for name in ("first", "second"):
        out = folder / name
        command = ["train", "demo", "--data-path", str(table), "--out", str(out), "--steps", "3", "--device", device]
        assert run([*command, "decoder=dali"]) == 0
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 3 and not (out / "bad_clips.jsonl").exists()
        losses.append([line["loss"] for line in metrics])
    assert losses[0] == losses[1]


class DaliSession:
    def __enter__(self):
        self.decoder = DaliDecoder("cpu", threads=1, time_limit=30)
        return self.decoder

    def __exit__(self, *error):
        self.decoder.close()


def point_far_outside(path):
    """Replace the chunk after the frames of an AVI file, its index, by one that claims to be 3 GiB long."""
    content = bytearray(path.read_bytes())
    place = content.rfind(b"idx1")
    content[place : place + 8] = b"XXXX" + (3 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    return path


def copy_packet(packet, data):
    copy = av.Packet(data)
    copy.pts, copy.dts, copy.time_base, copy.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
    return copy


def state_another_size(path, stated, lie):
    """Change the size that an MP4 file states in its header, not the pictures."""
    content = bytearray(path.read_bytes())
    text = stated[1].to_bytes(2, "big") + stated[0].to_bytes(2, "big")
    place = content.find(text, content.find(b"vp09", content.find(b"stsd")))
    assert place > 0
    content[place : place + 4] = lie[1].to_bytes(2, "big") + lie[0].to_bytes(2, "big")
    path.write_bytes(content)
    return path
