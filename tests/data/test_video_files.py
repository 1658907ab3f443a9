"""Writing and reading whole files: what is written is there, in the colors and at the rate that were asked for."""

import io

import av
import numpy as np
import pytest
import torch
from coded_clips import draw_frames, read_all, write_clip
from PIL import Image

from opensora_fast.data.decoding.resize import resize_frame, resize_image
from opensora_fast.data.video_files import make_contact_sheet, read_reference, save_image, save_video, to_bytes


def make_clip(count, size):
    return torch.from_numpy(draw_frames(count, size)).permute(3, 0, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(("size", "written"), [((48, 64), (48, 64)), ((47, 63), (48, 64))])
@pytest.mark.parametrize(("fps", "rate"), [(24, 24), (8.0, 8), (29.97, 29.97), (12.5, 12.5)])
def test_video(tmp_path, size, written, fps, rate):
    clip = make_clip(9, size)
    path = tmp_path / "new" / "folder" / "clip.mp4"
    save_video(path, clip, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(rate, abs=1e-3)
    frames = read_all(path)
    assert frames.shape == (9, *written, 3)
    expected = to_bytes(clip).permute(1, 2, 3, 0).numpy().astype(int)
    difference = np.abs(frames[:, : size[0], : size[1]] - expected)
    assert difference.mean() < 3, "coding loss only: a swapped channel or range is tens of levels"
    if size[0] % 2:
        assert np.abs(frames[:, -1].astype(int) - frames[:, -2]).mean() < 6, "the last row is repeated"


def test_video_of_one_frame_and_values_out_of_range(tmp_path):
    clip = torch.zeros(3, 1, 32, 32)
    clip[0], clip[1] = 5.0, -7.0
    save_video(tmp_path / "a.mp4", clip.bfloat16(), 8)
    assert np.abs(read_all(tmp_path / "a.mp4")[0, 16, 16].astype(int) - (255, 0, 128)).max() <= 4


@pytest.mark.parametrize(
    ("shape", "fps", "message"),
    [
        ((3, 0, 8, 8), 8, "at least one frame"),
        ((1, 2, 8, 8), 8, "must be \\[3, T, H, W\\]"),
        ((3, 8, 8), 8, "must be \\[3, T, H, W\\]"),
        ((3, 2, 8, 8), 0, "fps must be above 0"),
        ((3, 2, 8, 8), float("nan"), "fps must be above 0"),
    ],
)
def test_video_errors(tmp_path, shape, fps, message):
    with pytest.raises(ValueError, match=message):
        save_video(tmp_path / "a.mp4", torch.zeros(shape), fps)
    assert not (tmp_path / "a.mp4").exists()


def test_to_bytes():
    values = torch.tensor([-2.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1.0, 3.0])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("shape", [(3, 20, 30), (3, 1, 20, 30)])
def test_image(tmp_path, shape):
    clip = make_clip(1, (20, 30)).reshape(shape)
    save_image(tmp_path / "new" / "a.png", clip)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), draw_frames(1, (20, 30))[0])
    with pytest.raises(ValueError, match="image must be"):
        save_image(tmp_path / "b.png", torch.zeros(3, 2, 20, 30))


@pytest.mark.parametrize(
    ("save", "size"), [(save_image, (3, 20, 30)), (lambda *it: save_video(*it, 8), (3, 1, 20, 30))]
)
def test_a_file_that_a_full_disk_does_not_take_is_named_and_leaves_the_one_before(tmp_path, save, size):
    path = tmp_path / "a"
    path.write_text("before")
    (tmp_path / ".a.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(path, torch.zeros(size))
    assert str(caught.value.filename) == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and path.read_text() == "before"


def test_reference_video_is_resized_as_training_clips(tmp_path):
    path = write_clip(tmp_path, "h264 b-frames", 13, (72, 128))
    reference = read_reference(path, (40, 40))
    assert reference.shape == (3, 13, 40, 40) and reference.dtype == torch.float32
    expected = torch.empty_like(reference)
    for number, frame in enumerate(read_all(path)):
        resize_frame(frame, expected[:, number])
    assert torch.equal(reference, expected)


def test_reference_image(tmp_path):
    Image.fromarray(draw_frames(1, (50, 90))[0]).save(tmp_path / "a.JPG")
    with Image.open(tmp_path / "a.JPG") as image:
        assert torch.equal(read_reference(tmp_path / "a.JPG", (20, 30)), resize_image(image, (20, 30)))


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_reference_errors_name_the_file(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: cannot be opened"):
        read_reference(tmp_path / name, (20, 30))
    (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=f"{name}: "):
        read_reference(tmp_path / name, (20, 30))


def test_contact_sheet():
    clips = [make_clip(20, (96, 120)), make_clip(1, (192, 96)), make_clip(3, (72, 216))]
    sheet = Image.open(io.BytesIO(make_contact_sheet(clips, ["a", "b", "c"])))
    assert sheet.format == "PNG" and sheet.size == (8 * (120 + 4) + 4, 3 * (14 + 96 + 4) + 4)
    pixels = np.asarray(sheet).astype(int)
    assert np.array_equal(pixels[18:114, 4:124], draw_frames(20, (96, 120))[0]), "first frame, not scaled"
    assert np.array_equal(pixels[18:114, 4 + 7 * 124 : -4], draw_frames(20, (96, 120))[19]), "last frame"
    assert (pixels[4:18, 4:24] < 128).any(), "the label is above it"
    labeled = Image.open(io.BytesIO(make_contact_sheet(clips, ["a", "b" * 400, "c"])))
    assert labeled.size[0] > 2000, "as wide as the label"
    with pytest.raises(ValueError, match="shorter"):
        make_contact_sheet(clips, ["a"])
