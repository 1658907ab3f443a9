"""Resize and crop: sizes and offsets worked out by hand, and the pixels of the reference computation."""

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_fast.data.decoding.clips import ClipError
from opensora_fast.data.decoding.resize import CoverCrop, resize_frame, resize_image


@pytest.mark.parametrize(
    ("source", "target", "scaled", "corner"),
    [
        ((720, 1280), (144, 256), (144, 256), (0, 0)),
        ((272, 640), (144, 256), (144, 339), (0, 41)),  # 640 * 144 / 272 = 338.8; (339 - 256) / 2 = 41.5
        ((640, 272), (256, 144), (339, 144), (41, 0)),
        ((100, 100), (50, 75), (75, 75), (12, 0)),  # 12.5 down
        ((100, 201), (100, 200), (100, 201), (0, 0)),  # 0.5 down
        ((5, 10), (5, 9), (5, 10), (0, 0)),
        ((100, 103), (100, 100), (100, 103), (0, 1)),  # 1.5 down
        ((1, 1), (3, 7), (7, 7), (2, 0)),
        ((20, 30), (20, 30), (20, 30), (0, 0)),
        ((2, 5), (1, 2), (1, 2), (0, 0)),  # 5 * 0.5 = 2.5 rounds to the even 2
        ((2, 7), (1, 2), (1, 4), (0, 1)),  # 7 * 0.5 = 3.5 rounds to the even 4
    ],
)
def test_video_plan(source, target, scaled, corner):
    crop = CoverCrop.of_video(source, target)
    assert (crop.scaled_height, crop.scaled_width) == scaled
    assert (crop.top, crop.left) == corner
    assert (crop.height, crop.width) == target


@pytest.mark.parametrize(
    ("source", "target", "corner"),
    [
        ((100, 103), (100, 100), (0, 2)),  # 1.5 to the even 2, where a video takes 1
        ((100, 101), (100, 100), (0, 0)),  # 0.5 to the even 0
        ((105, 100), (100, 100), (2, 0)),  # 2.5 to the even 2
        ((107, 100), (100, 100), (4, 0)),  # 3.5 to the even 4, where a video takes 3
    ],
)
def test_image_offsets_round_to_even(source, target, corner):
    crop = CoverCrop.of_image(source, target)
    assert (crop.top, crop.left) == corner


def test_target_is_always_covered():
    rng = np.random.default_rng(0)
    for source_height, source_width, height, width in rng.integers(1, 400, (2000, 4)).tolist():
        for crop in (
            CoverCrop.of_video((source_height, source_width), (height, width)),
            CoverCrop.of_image((source_height, source_width), (height, width)),
        ):
            assert 0 <= crop.top <= crop.scaled_height - height
            assert 0 <= crop.left <= crop.scaled_width - width
            assert crop.scaled_height == height or crop.scaled_width == width


@pytest.mark.parametrize("plan", [CoverCrop.of_video, CoverCrop.of_image])
def test_a_strip_is_not_blown_up_to_cover_the_target(plan):
    with pytest.raises(ClipError, match="of 1 x 4096 pixels would be resized to 160 x 655360 to cover 160 x 640"):
        plan((1, 4096), (160, 640))


def test_sizes_below_one():
    with pytest.raises(ValueError, match="at least 1 x 1"):
        CoverCrop.of_video((0, 5), (4, 4))


@pytest.mark.parametrize("source", [(31, 57), (64, 40), (90, 160), (45, 80)])
@pytest.mark.parametrize("target", [(45, 80), (20, 20), (100, 33)])
def test_frame_is_bilinear_without_smoothing(source, target):
    frame = np.random.default_rng(1).integers(0, 256, (*source, 3), dtype=np.uint8)
    clip = torch.full((3, 4, *target), float("nan"))
    resize_frame(frame, clip[:, 2])
    assert clip[:, [0, 1, 3]].isnan().all() and not clip[:, 2].isnan().any()
    # Bilinear interpolation by its definition, in float64: output pixel i looks at (i + 0.5) * source / scaled - 0.5.
    crop = CoverCrop.of_video(source, target)
    values = frame.astype(np.float64)
    for axis, (length, scaled, start, size) in enumerate(
        [
            (source[0], crop.scaled_height, crop.top, target[0]),
            (source[1], crop.scaled_width, crop.left, target[1]),
        ]
    ):
        place = np.clip((np.arange(scaled) + 0.5) * length / scaled - 0.5, 0, None)[start : start + size]
        low = np.minimum(place.astype(int), length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = (place - low).reshape([-1 if other == axis else 1 for other in range(3)])
        values = np.take(values, low, axis) * (1 - weight) + np.take(values, high, axis) * weight
    expected = torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(clip[:, 2].double(), expected, atol=2e-5, rtol=0)


def test_frame_of_the_target_size_is_only_scaled():
    frame = np.random.default_rng(2).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    output = torch.empty(3, 6, 9)
    resize_frame(frame, output)
    assert torch.equal(output, torch.from_numpy(frame).permute(2, 0, 1).float() / 127.5 - 1)
    assert output.min() >= -1 and output.max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_image_is_pillows_bicubic(mode):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    output = resize_image(image, (20, 30))
    crop = CoverCrop.of_image((40, 61), (20, 30))
    resized = image.convert("RGB").resize((crop.scaled_width, crop.scaled_height), Image.Resampling.BICUBIC)
    window = np.asarray(resized)[crop.top : crop.top + 20, crop.left : crop.left + 30]
    assert output.shape == (3, 1, 20, 30) and output.dtype == torch.float32 and output.is_contiguous()
    assert torch.equal(output[:, 0], torch.from_numpy(window.copy()).permute(2, 0, 1).float() / 127.5 - 1)
