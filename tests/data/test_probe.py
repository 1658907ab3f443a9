"""Probing of files and folders: counts, sizes and rates as written; damaged files are listed and nothing stops."""

import os
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from sample_media import write_image, write_video

from opensora_fast.cli import run
from opensora_fast.data.decoding.clips import ClipError
from opensora_fast.data.manifest import Manifest, write_table
from opensora_fast.data.probe import find_media, map_files, probe_folder, probe_media, probe_table, read_caption

DEPTHS = ("header", "packets", "frames")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("name", "codec", "stated"),
    [
        ("a.mp4", "libx264", "h264"),
        ("a.mkv", "libx264", "h264"),
        ("a.webm", "libvpx-vp9", "vp9"),
        ("a.avi", "mpeg4", "mpeg4"),
        ("a.mov", "mjpeg", "mjpeg"),
        ("a.ts", "libx264", "h264"),
        ("a.m2ts", "libx264", "h264"),
        ("a.3gp", "libx264", "h264"),
        ("a.ogv", "libvpx", "vp8"),
        ("a.gif", "gif", "gif"),
    ],
)
def test_videos(tmp_path, depth, name, codec, stated):
    path = write_video(tmp_path / name, frames=17, size=(48, 80), fps=25, codec=codec)
    assert find_media(tmp_path) == [path]
    info = probe_media(path, depth)
    assert (info.num_frames, info.height, info.width, info.fps, info.codec) == (17, 48, 80, 25.0, stated)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "A.JPEG"])
def test_images(tmp_path, depth, name):
    info = probe_media(write_image(tmp_path / name, (30, 50)), depth)
    assert (info.num_frames, info.height, info.width, info.fps) == (1, 30, 50, 120.0)


def test_hidden_pictures_of_vp8_are_no_frames(tmp_path):
    source = write_video(tmp_path / "source.webm", frames=12, codec="libvpx")
    path = tmp_path / "a.webm"
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size == 0:
                continue
            if not packet.is_keyframe:
                # The same picture before, with the bit cleared that says it is shown.
                data = bytes(packet)
                hidden = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream = stream
                writing.mux(hidden)
            packet.stream = stream
            writing.mux(packet)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 23
    assert [probe_media(path, depth).num_frames for depth in DEPTHS] == [12] * 3


def test_a_truncated_video_has_the_frames_that_are_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=40, movflags="faststart", options={"g": "1"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    assert probe_media(path, "header").num_frames == 40
    assert 5 < probe_media(path, "packets").num_frames < 40


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty file"), (b"hello " * 99, "cannot be read as"), (None, "cannot be opened")]
)
def test_unusable_files(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError, match=reason):
        probe_media(tmp_path / name)


def test_folder_to_manifest(tmp_path, capsys):
    folder = tmp_path / "media"
    (folder / "more" / ".hidden").mkdir(parents=True)
    write_video(folder / "red_car-2.mp4", frames=20)
    (folder / "red_car-2.txt").write_text("A red car,\n  seen from above.\n")
    write_video(folder / "more" / "blue boat.webm", frames=9, codec="libvpx-vp9")
    write_image(folder / "more" / "a_green--field.png")
    write_image(folder / "more" / ".hidden" / "not_me.png")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "notes.md").write_text("no medium")
    result = probe_folder(folder, folder / "meta.csv", workers=2)
    assert [(os.path.basename(path), reason.split(":")[0]) for path, reason in result.unreadable] == [
        ("broken.mp4", "cannot be read as a video")
    ]
    manifest = Manifest.read(folder / "meta.csv")
    rows = [(clip.text, clip.num_frames, clip.height, clip.width, clip.fps) for clip in map(manifest.clip, range(3))]
    assert rows == [
        ("a green field", 1, 48, 64, 120.0),
        ("blue boat", 9, 48, 64, 24.0),
        ("A red car, seen from above.", 20, 48, 64, 24.0),
    ]
    assert manifest.table["path"].tolist() == ["more/a_green--field.png", "more/blue boat.webm", "red_car-2.mp4"]
    assert all(os.path.exists(manifest.clip(row).path) for row in range(3))
    assert "probe files: 4/4 files" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_files_gets_what_it_lacks_from_them(tmp_path, ending, capsys):
    """Open-Sora's tables may lack fps, which its trainer takes from the file."""
    media = tmp_path / "media"
    media.mkdir()
    write_video(media / "a.mp4", frames=20, fps=25)
    write_image(media / "b.png")
    write_table(
        pd.DataFrame(
            {
                "id": [7, 8, 9, 10],
                "path": ["media/gone.mp4", "media/a.mp4", str(media / "b.png"), None],
                "text": ["none", 'A car, "red"', "NA", "no path"],
                "num_frames": [1, 2, 3, 4],
                "aes": [5.5, 6.5, 7.5, 8.5],
            }
        ),
        tmp_path / f"captions.{ending}",
    )
    new = tmp_path / "media" / f"new.{ending}"
    assert run(["data", "validate", str(tmp_path / f"captions.{ending}")]) == 1
    assert f"`opensora-fast data probe {tmp_path}/captions.{ending} --out NEW.csv`" in capsys.readouterr().err
    assert run(["data", "probe", str(tmp_path / f"captions.{ending}"), "--out", str(new)]) == 0
    said = capsys.readouterr().out
    assert "left out: media/gone.mp4: cannot be opened" in said and "left out: : path is empty" in said
    table = Manifest.read(new).table
    assert table.drop(columns="codec").to_dict("list") == {
        "id": [8, 9],
        "path": ["a.mp4", "b.png"],
        "text": ['A car, "red"', "NA"],
        "num_frames": [20, 1],
        "aes": [6.5, 7.5],
        "height": [48, 48],
        "width": [64, 64],
        "fps": [25.0, 120.0],
    }
    assert run(["data", "validate", str(new), "--deep"]) == 0


def test_a_table_without_captions_or_with_no_file_is_refused(tmp_path):
    (tmp_path / "paths.csv").write_text("path,caption\na.mp4,x\n")
    with pytest.raises(ValueError, match="lacks the column text.*its caption under these names"):
        probe_table(tmp_path / "paths.csv", tmp_path / "new.csv")
    (tmp_path / "gone.csv").write_text("path,text\na.mp4,x\n")
    with pytest.raises(
        ValueError, match="none of the 1 files of .*gone.csv can be read; nothing was written\n  a.mp4: "
    ):
        probe_table(tmp_path / "gone.csv", tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


def test_manifest_elsewhere_names_absolute_paths(tmp_path):
    (tmp_path / "media").mkdir()
    write_image(tmp_path / "media" / "a.png")
    probe_folder(tmp_path / "media", tmp_path / "tables" / "meta.parquet")
    manifest = Manifest.read(tmp_path / "tables" / "meta.parquet")
    assert manifest.table["path"].tolist() == [str((tmp_path / "media" / "a.png").resolve())]


def test_links_are_known_by_their_own_names(tmp_path):
    """As in the cache of the Hugging Face hub, whose files have no endings."""
    (tmp_path / "blobs").mkdir()
    write_image(tmp_path / "a.png").rename(tmp_path / "blobs" / "4f2a")
    write_video(tmp_path / "b.mp4", frames=9).rename(tmp_path / "blobs" / "9c1d")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").symlink_to("../blobs/4f2a")
    (tmp_path / "media" / "b.mp4").symlink_to("../blobs/9c1d")
    for home in (tmp_path, tmp_path / "media", tmp_path / "tables"):
        home.mkdir(exist_ok=True)
        probe_folder(tmp_path / "media", home / "meta.csv")
        clips = list(map(Manifest.read(home / "meta.csv").clip, range(2)))
        assert [os.path.relpath(clip.path, tmp_path) for clip in clips] == ["media/a.png", "media/b.mp4"]


def test_folders_that_are_not_searched_are_named(tmp_path, monkeypatch):
    for name in ("open", "closed"):
        (tmp_path / "media" / name).mkdir(parents=True)
        write_image(tmp_path / "media" / name / "a.png")
    (tmp_path / "media" / "round").symlink_to(tmp_path / "media")
    scandir = os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    result = probe_folder(tmp_path / "media", tmp_path / "meta.csv")
    assert result.table["path"].tolist() == ["media/open/a.png"]
    assert [(os.path.basename(path), reason.split(":")[0]) for path, reason in sorted(result.unreadable)] == [
        ("closed", "cannot be searched"),
        ("round", "a link to a folder is not followed"),
    ]
    (tmp_path / "media" / "open" / "a.png").unlink()
    with pytest.raises(ValueError, match="no video or image below(.|\n)*closed: cannot be searched"):
        probe_folder(tmp_path / "media", tmp_path / "other.csv")


def test_a_name_that_is_not_text_is_left_out_and_named(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png"))
    assert run(["data", "probe", str(tmp_path), "--out", str(tmp_path / "meta.csv")]) == 0
    printed = capsys.readouterr().out
    assert "b\\xff.png: its name is not UTF-8 text" in printed and "1 rows, 1 left out" in printed
    assert Manifest.read(tmp_path / "meta.csv").table["path"].tolist() == ["a.png"]


def test_a_caption_that_is_not_text_is_told(tmp_path):
    path = write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClipError, match="a.txt is not UTF-8"):
        read_caption(path)


def test_a_caption_that_may_not_be_read_costs_its_clip(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    read = Path.read_text

    def refuse(path, **options):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    result = probe_folder(tmp_path, tmp_path / "meta.csv")
    assert result.table["text"].tolist() == ["caption b"]
    assert result.unreadable == [(str(tmp_path / "a.png"), "its caption a.txt cannot be read: Permission denied")]


def test_nothing_is_written_when_nothing_can_be_read(tmp_path):
    out = tmp_path / "meta.csv"
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        probe_folder(tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match="test_probe.py is not a folder"):
        probe_folder(__file__, out)
    with pytest.raises(ValueError, match="no video or image below"):
        probe_folder(tmp_path, out)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 files(.|\n)*a.mp4"):
        probe_folder(tmp_path, out)
    with pytest.raises(ValueError, match="must end in"):
        probe_folder(tmp_path, tmp_path / "meta.txt")
    clip = write_video(tmp_path / "clip.mp4", frames=2)
    with pytest.raises(ValueError, match="clip.mp4 is a video or image: give the folder that holds it"):
        probe_table(clip, out)
    assert not out.exists()


def test_mutated_files_are_listed_or_read_and_never_stop_the_run(tmp_path):
    generator = np.random.default_rng(1)
    sources = [
        write_video(tmp_path / "source.mp4", frames=8),
        write_video(tmp_path / "source.webm", frames=8, codec="libvpx-vp9"),
        write_image(tmp_path / "source.jpg"),
        write_image(tmp_path / "source.png"),
    ]
    folder = tmp_path / "mutated"
    folder.mkdir()
    for number in range(60):
        source = sources[number % len(sources)]
        content = bytearray(source.read_bytes())
        if number % 3 == 0:
            content = content[: generator.integers(0, len(content))]
        for position in generator.integers(0, max(1, len(content)), 20 * (number % 3)):
            content[position] ^= 1 << int(generator.integers(0, 8))
        (folder / f"{number:03d}{source.suffix}").write_bytes(content)
    write_image(folder / "whole.png")
    result = probe_folder(folder, tmp_path / "meta.csv")
    assert len(result.table) + len(result.unreadable) == 61 == len(find_media(folder))
    assert "whole" in result.table["text"].tolist() and len(result.unreadable) >= 10
    assert all(reason for _, reason in result.unreadable)
    Manifest.read(tmp_path / "meta.csv")


def test_map_files_keeps_order_and_gives_up_on_what_hangs():
    import threading

    stuck = threading.Event()

    def work(item: int) -> int:
        if item == 5:
            stuck.wait(20)
        if item == 7:
            raise ClipError("seven")
        return item * item

    results = list(map_files(work, range(100), workers=3, time_limit=0.5))
    stuck.set()
    assert str(results[5]).startswith("took longer than 0.5 s: cut long videos") and str(results[7]) == "seven"
    assert [result for item, result in enumerate(results) if item not in (5, 7)] == [
        item * item for item in range(100) if item not in (5, 7)
    ]
