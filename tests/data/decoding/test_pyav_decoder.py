"""PyAV: the same frames as a full decode, bit for bit, from as late a start as possible; bad files are told apart."""

import contextlib
import os

import av
import numpy as np
import pytest
import torch
from coded_clips import CODINGS, Coding, draw_frames, read_all, write_clip
from PIL import Image

from opensora_fast.data.decoding import pyav_decoder
from opensora_fast.data.decoding.clips import BadClip, ClipError, ClipRequest
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder, decode_request, iterate_frames, read_frames
from opensora_fast.data.decoding.resize import resize_frame, resize_image

SIZE = (36, 64)


@pytest.fixture(scope="module")
def decoder():
    decoder = PyAVDecoder(threads=2, time_limit=30)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module", params=CODINGS)
def coded(request, tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("coded"), request.param)
    return request.param, path, read_all(path)


@pytest.fixture
def starts(monkeypatch):
    """The frames at which decoding began, in order."""
    seen = []
    collect = pyav_decoder._collect

    def spy(packets, number, *arguments, **options):
        seen.append(number)
        return collect(packets, number, *arguments, **options)

    monkeypatch.setattr(pyav_decoder, "_collect", spy)
    return seen


# Codings in which the decoder may start at any keyframe (every 10 frames), and those in which it must not.
SEEKING = {"h264 b-frames", "h264 mkv", "hevc closed groups", "vp9 webm", "vp9 mp4 hidden frames", "mjpeg"}
FROM_THE_START = {"h264 open groups", "hevc open groups", "vp8", "mpeg4"}


def test_equals_full_decode(coded, starts):
    coding, path, full = coded
    assert len(full) == 40
    for first in (0, 1, 7, 9, 10, 11, 19, 20, 25, 30, 36):
        wanted = {first, min(first + 1, 39), min(first + 3, 39), min(first + 13, 39)}
        found = {}
        starts.clear()
        read_frames(str(path), frozenset(wanted), found.__setitem__)
        assert sorted(found) == sorted(wanted)
        for number, pixels in found.items():
            assert np.array_equal(pixels, full[number]), f"{coding}: frame {number} from {first}"
        if coding in SEEKING and first > pyav_decoder.FRAMES_NOT_WORTH_SEEKING:
            expected = first if coding == "mjpeg" else first // 10 * 10
            assert starts == [expected], f"{coding}: frame {first} was reached from {starts}"
        if coding in FROM_THE_START:
            assert set(starts) <= {0} or coding.endswith("open groups") and starts[-1] == 0


def test_first_key_picture_of_an_open_group_is_not_trusted(tmp_path, starts):
    path = write_clip(tmp_path, "h264 open groups")
    read_frames(str(path), frozenset([25]), lambda number, pixels: None)
    assert starts == [0]


def test_decodes_only_up_to_the_last_wanted_frame(tmp_path, monkeypatch):
    path = write_clip(tmp_path, "vp9 webm")
    converted = []
    monkeypatch.setattr(
        pyav_decoder, "to_rgb", lambda frame, _: converted.append(frame) or np.zeros((4, 4, 3), np.uint8)
    )
    read_frames(str(path), frozenset([3, 5]), lambda number, pixels: None)
    assert len(converted) == 2


def test_clip_is_resized_in_the_order_asked_for(tmp_path, decoder):
    path = write_clip(tmp_path, "h264 b-frames")
    full = read_all(path)
    frames = (12, 3, 30, 3, 39)
    (clip,) = decoder.decode([ClipRequest(0, str(path), frames, SIZE)])
    assert clip.shape == (3, 5, *SIZE) and clip.dtype == torch.float32 and clip.is_contiguous()
    expected = torch.empty_like(clip)
    for place, number in enumerate(frames):
        resize_frame(full[number], expected[:, place])
    assert torch.equal(clip, expected)


def test_many_clips_in_parallel_keep_their_order(tmp_path, decoder):
    paths = [write_clip(tmp_path, coding, 15, name=str(n)) for n, coding in enumerate(["vp9 webm", "mjpeg", "mpeg4"])]
    requests = [ClipRequest(row, str(paths[row % 3]), (row, row + 1), (16 + 8 * (row % 2), 32)) for row in range(12)]
    together = decoder.decode(requests)
    for request, clip in zip(requests, together, strict=True):
        assert torch.equal(clip, decode_request(request))


def test_codec_threads_do_not_change_the_result(tmp_path):
    path = write_clip(tmp_path, "h264 b-frames")
    request = ClipRequest(0, str(path), (5, 17, 33), SIZE)
    assert torch.equal(decode_request(request, threads=1), decode_request(request, threads=4))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_images(tmp_path, decoder, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(draw_frames(1, (50, 90))[0]).save(path)
    (image,) = decoder.decode([ClipRequest(0, str(path), (0,), SIZE)])
    with Image.open(path) as opened:
        assert torch.equal(image, resize_image(opened, SIZE))


def test_conversion_ignores_the_tagged_matrix_and_heeds_the_tagged_range(tmp_path):
    """BT.601 for all, as Open-Sora's decoder and DALI have it; limited and full range as the file says."""
    from av.video.reformatter import ColorRange, Colorspace

    gray = np.full((64, 64, 3), 128, np.uint8)
    gray[:, 32:] = (200, 60, 60)
    found = {}
    for space in (Colorspace.ITU601, Colorspace.ITU709):
        for color_range in (ColorRange.MPEG, ColorRange.JPEG):
            path = str(tmp_path / f"{int(space)}{int(color_range)}.mp4")
            with av.open(path, "w") as container:
                stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
                stream.height = stream.width = 64
                stream.pix_fmt = "yuv420p"
                stream.codec_context.colorspace, stream.codec_context.color_range = space, color_range
                frame = av.VideoFrame.from_ndarray(gray, format="rgb24").reformat(format="yuv420p")
                frame.colorspace, frame.color_range = space, color_range  # the levels stay, only the label differs
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            found[space, color_range] = read_all(path)[0].astype(int)
    limited, full = found[Colorspace.ITU601, ColorRange.MPEG], found[Colorspace.ITU601, ColorRange.JPEG]
    assert np.array_equal(limited, found[Colorspace.ITU709, ColorRange.MPEG])
    assert np.array_equal(full, found[Colorspace.ITU709, ColorRange.JPEG])
    inside = np.s_[:, 8:24]  # away from the edge, over which chroma is interpolated
    assert np.abs(limited - gray)[inside].max() <= 2, "limited range, as it was written"
    # Read as full range, the levels 16..235 of luma stay what they are.
    assert abs(int(full[8, 8, 0]) - round(16 + 128 * 219 / 255)) <= 2


def bad(result) -> str:
    assert isinstance(result, BadClip), result
    return result.reason


def ask(path, frames=(0, 5)):
    return decode_request(ClipRequest(7, str(path), frames, SIZE), time_limit=20)


class TestBadFiles:
    def test_names_row_and_path(self, tmp_path):
        result = ask(tmp_path / "none.mp4")
        assert (result.row, result.path) == (7, str(tmp_path / "none.mp4"))
        assert result.reason == "cannot be opened: No such file or directory"

    def test_empty(self, tmp_path):
        (tmp_path / "a.mp4").touch()
        assert bad(ask(tmp_path / "a.mp4")) == "empty file"

    def test_folder_and_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
        assert bad(ask(tmp_path / "pipe.mp4")) == "not a regular file"
        assert bad(ask(tmp_path)) == "not a regular file"

    @pytest.mark.parametrize(
        "text", ["Not a video. " * 50, "#EXTM3U\n#EXTINF:1,\nclip.mp4\n", "ffconcat version 1.0\nfile clip.mp4\n"]
    )
    def test_text_is_no_video_and_no_list_of_files(self, tmp_path, text):
        write_clip(tmp_path, "h264 b-frames", 10)
        (tmp_path / "text.mp4").write_text(text)
        assert "cannot be decoded" in bad(ask(tmp_path / "text.mp4"))

    def test_names_with_colons_are_files(self, tmp_path):
        path = write_clip(tmp_path, "vp9 webm", 10, name="http:clip:01")
        assert isinstance(ask(path), torch.Tensor)

    def test_wrong_extension(self, tmp_path):
        video = write_clip(tmp_path, "vp9 webm", 10)
        assert isinstance(ask(video.rename(tmp_path / "clip.mp4")), torch.Tensor)  # the content counts
        assert "cannot be read as an image" in bad(ask((tmp_path / "clip.mp4").rename(tmp_path / "clip.jpg"), (0,)))

    def test_image_in_place_of_a_video(self, tmp_path):
        Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "image.png")
        os.rename(tmp_path / "image.png", tmp_path / "image.mp4")
        assert "ends after 1 frames, frame 5 is asked for" in bad(ask(tmp_path / "image.mp4"))

    def test_several_frames_of_an_image(self, tmp_path):
        Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "image.png")
        assert bad(ask(tmp_path / "image.png", (0, 1))) == "is an image, 2 frames are asked for"

    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    def test_truncated_image(self, tmp_path, suffix):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(draw_frames(1, (50, 90))[0]).save(path)
        path.write_bytes(path.read_bytes()[:600])
        assert "cannot be read as an image" in bad(ask(path, (0,)))

    @pytest.mark.parametrize("coding", ["h264 b-frames", "h264 mkv", "vp9 webm", "mjpeg"])
    @pytest.mark.parametrize("frames", [(0, 39), (25, 39), (39,)])
    def test_truncated_video(self, tmp_path, coding, frames):
        path = write_clip(tmp_path, coding)
        if path.suffix == ".mp4":  # an index at the end would be lost altogether
            move_index_to_the_front(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 3 // 4])
        reason = bad(ask(path, frames))
        assert any(text in reason for text in ("is asked for", "cut off", "cannot be decoded")), reason
        assert isinstance(ask(path, (0, 12)), torch.Tensor), "frames before the cut are still good"

    def test_index_lost(self, tmp_path):
        path = write_clip(tmp_path, "h264 b-frames")
        path.write_bytes(path.read_bytes()[:-200])
        assert "cannot be decoded: InvalidDataError" in bad(ask(path))

    @pytest.mark.parametrize("coding", ["h264 b-frames", "vp9 webm", "vp8"])
    @pytest.mark.parametrize("frames", [(5, 40), (33, 45)])
    def test_frames_beyond_the_end(self, tmp_path, coding, frames):
        path = write_clip(tmp_path, coding)
        assert f"frame {frames[-1]} is asked for" in bad(ask(path, frames))

    def test_no_frames(self, tmp_path):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        assert bad(ask(path))

    def test_sound_only(self, tmp_path):
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert bad(ask(path)) == "no video stream in it"

    def test_damage_is_not_patched_up(self, tmp_path):
        """H.264 with a slice overwritten: a lenient decoder copies the neighbors and says nothing."""
        path = write_clip(tmp_path, Coding(".mkv", "libx264", keyframes=40, options={"bf": "0", "qp": "10"}))
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(range(1, 201)) * 2
        path.write_bytes(content)
        assert bad(ask(path, tuple(range(0, 40, 3))))

    def test_frame_size_changes(self, tmp_path):
        first, second = (
            write_clip(tmp_path, "mjpeg", 5, size, name) for name, size in (("a", (72, 128)), ("b", (48, 64)))
        )
        path = tmp_path / "both.avi"
        join(path, [first, second])
        assert bad(ask(path, (0, 7))) == "frame 5 has another size than the ones before it"

    @pytest.mark.parametrize("frames", [(0, 39), (20, 39)])
    def test_streams_that_appear_late(self, tmp_path, monkeypatch, frames):
        """PyAV raises IndexError behind the last packet of a damaged transport stream that grows further streams."""

        class Growing:
            def __init__(self, container):
                self.container = container

            def demux(self, stream):
                yield from self.container.demux(stream)
                raise IndexError("list index out of range")

            def __getattr__(self, name):
                return getattr(self.container, name)

        path = write_clip(tmp_path, "vp9 webm")
        expected = ask(path, frames)
        real = pyav_decoder.open_video

        @contextlib.contextmanager
        def open_growing(*arguments):
            with real(*arguments) as (container, stream):
                yield Growing(container), stream

        monkeypatch.setattr(pyav_decoder, "open_video", open_growing)
        assert torch.equal(ask(path, frames), expected)
        assert len(list(iterate_frames(str(path)))) == 40
        assert "frame 45 is asked for" in bad(ask(path, (20, 45)))

    def test_time_limit(self, tmp_path):
        path = write_clip(tmp_path, "vp9 webm")
        result = decode_request(ClipRequest(0, str(path), (39,), SIZE), time_limit=1e-9)
        assert "not decoded within" in bad(result)

    def test_library_that_does_not_come_back(self, tmp_path, monkeypatch):
        import time

        path = write_clip(tmp_path, "vp9 webm", 10)
        real = pyav_decoder.decode_request
        monkeypatch.setattr(
            pyav_decoder,
            "decode_request",
            lambda request, *rest: time.sleep(12) if request.row == 1 else real(request, *rest),
        )
        decoder = PyAVDecoder(threads=2, time_limit=1.0)
        requests = [ClipRequest(row, str(path), (0, 5), SIZE) for row in range(5)]
        started = time.monotonic()
        results = decoder.decode(requests)
        assert time.monotonic() - started < 10
        assert "hung" in bad(results[1])
        assert [isinstance(result, torch.Tensor) for result in results] == [True, False, True, True, True]
        decoder.close()
        assert time.monotonic() - started < 10, "closing does not wait for the thread that is stuck"


def test_close_ends_all_threads(count_begun_threads):
    decoder = PyAVDecoder(threads=3)
    assert count_begun_threads() == 3
    decoder.close()
    assert count_begun_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        decoder.decode([ClipRequest(0, "x", (0,), SIZE)])


def test_workers_leave_the_thread_count_of_torch_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder = PyAVDecoder(threads=2)
        assert torch.get_num_threads() == 2
        import threading

        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2]
        decoder.close()
    finally:
        torch.set_num_threads(before)


def test_programming_errors_are_raised(decoder, monkeypatch, tmp_path):
    path = write_clip(tmp_path, "vp9 webm", 10)
    monkeypatch.setattr(pyav_decoder, "resize_frame", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.decode([ClipRequest(0, str(path), (0,), SIZE)])


def test_bad_time_limit():
    with pytest.raises(ValueError, match="time_limit"):
        PyAVDecoder(time_limit=0)


def test_iterate_frames(tmp_path):
    path = write_clip(tmp_path, "h264 b-frames", 12)
    assert np.array_equal(np.stack(list(iterate_frames(str(path)))), read_all(path))
    with pytest.raises(ClipError, match="cannot be opened"):
        list(iterate_frames(str(tmp_path / "none.mp4")))


def join(path, parts):
    """Write the packets of several files of one codec into one."""
    with av.open(str(path), "w") as writer:
        stream, shift = None, 0
        for part in parts:
            with av.open(str(part)) as reader:
                source = reader.streams.video[0]
                stream = stream or writer.add_stream_from_template(source)
                packets = [packet for packet in reader.demux(source) if packet.size]
                for packet in packets:
                    packet.pts += shift
                    packet.dts += shift
                    packet.stream = stream
                    writer.mux(packet)
                shift = packets[-1].pts + packets[1].pts - packets[0].pts


def move_index_to_the_front(path):
    moved = path.with_name("moved.mp4")
    with av.open(str(path)) as reader, av.open(str(moved), "w", options={"movflags": "+faststart"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    moved.rename(path)
