"""Validation of manifests and the `data` and `buckets` commands."""

import json
import os
import re

import pandas as pd
import pytest
from sample_media import write_image, write_video

from opensora_fast.cli import run
from opensora_fast.data import probe, validation
from opensora_fast.data.manifest import Manifest
from opensora_fast.data.validation import validate_manifest


@pytest.fixture
def meta(tmp_path):
    """A manifest with good rows, and one row for every kind of mistake."""
    write_video(tmp_path / "good.mp4", frames=20)
    truncated = write_video(tmp_path / "short.mp4", frames=20, movflags="faststart", options={"g": "1"})
    truncated.write_bytes(truncated.read_bytes()[:-3000])
    write_image(tmp_path / "good.png")
    (tmp_path / "text.mp4").write_text("no video")
    path = tmp_path / "meta.csv"
    path.write_text(
        "path,text,num_frames,height,width,fps\n"
        'good.mp4,"a caption\nover two lines",20,48,64,24\n'
        "good.png,,1,48,64,\n"
        "missing.mp4,c,20,48,64,24\n"
        "good.mp4,d,0,48,64,24\n"
        "good.mp4,e,20,64,48,24\n"
        "good.mp4,f,21,48,64,24\n"
        "good.mp4,g,1,48,64,24\n"
        "short.mp4,h,20,48,64,24\n"
        "text.mp4,i,20,48,64,24\n"
        "good.mp4,j,10,48,64,24\n"
    )
    return path


def test_every_bad_row_is_listed_with_line_and_reason(meta):
    found = validate_manifest(meta, workers=2)
    assert [(bad_row.place, bad_row.reason) for bad_row in found.bad_rows] == [
        ("line 5", "cannot be opened: No such file or directory"),
        ("line 6", "num_frames is '0', not a whole number > 0"),
        ("line 7", "the manifest says 64 x 48 pixels, the file 48 x 64"),
        ("line 8", "the manifest says 21 frames, the file has only 20"),
        ("line 9", "num_frames is 1, which means an image, but the file is a video of 20 frames"),
        ("line 11", "cannot be read as a video: InvalidDataError: Invalid data found when processing input"),
    ]
    assert [bad_row.row for bad_row in found.bad_rows] == [2, 3, 4, 5, 6, 8]
    assert found.remarks == [
        "1 of 10 rows have no caption; they train as clips without text",
        "5 of 10 rows name a file that an earlier row names, too",
        f"relative paths count from the folder of the manifest, {meta.parent.resolve()}",
    ]


def test_a_path_that_no_file_can_have_is_one_bad_row(meta):
    meta.write_bytes(meta.read_bytes().replace(b"missing.mp4", b"miss\0ing.mp4"))
    assert re.fullmatch("is no path of a file: .*embedded null .*", validate_manifest(meta).bad_rows[0].reason)


def test_deep_finds_what_headers_hide(meta):
    places = [bad_row.place for bad_row in validate_manifest(meta, check="deep").bad_rows]
    assert "line 10" in places and len(places) == 7


def test_table_only_opens_no_file(meta):
    assert [bad_row.row for bad_row in validate_manifest(meta, check="table").bad_rows] == [3]


def test_good_rows_can_be_kept_elsewhere(meta, tmp_path, capsys):
    kept = tmp_path / "sub" / "good.parquet"
    assert run(["data", "validate", str(meta), "--keep", str(kept), "--deep"]) == 1
    assert f"{kept}: 3 good rows written" in capsys.readouterr().err
    assert run(["data", "validate", str(kept), "--deep"]) == 0
    manifest = Manifest.read(kept)
    assert manifest.table["text"].tolist() == ["a caption\nover two lines", "", "j"]


def test_what_is_bad_is_listed_even_if_nothing_can_be_kept(meta, tmp_path, capsys, monkeypatch):
    table = meta.read_text().splitlines(keepends=True)
    bad = meta.with_name("bad.csv")
    bad.write_text(table[0] + "missing.mp4,c,20,48,64,24\n")
    assert run(["data", "validate", str(bad), "--keep", str(tmp_path / "good.csv")]) == 1
    printed = capsys.readouterr()
    assert "line 2: cannot be opened" in printed.out and "not one row is good" in printed.err
    monkeypatch.setattr(validation, "validate_manifest", lambda *a, **k: pytest.fail("the ending is wrong"))
    assert run(["data", "validate", str(bad), "--keep", str(tmp_path / "good.txt")]) == 1
    assert "good.txt must end in .csv or .parquet" in capsys.readouterr().err


def test_validate_command(meta, capsys):
    assert run(["data", "validate", str(meta)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "line 5: cannot be opened: No such file or directory (missing.mp4)"
    assert lines[-1] == f"{meta}: 10 rows, 6 bad"
    assert run(["data", "validate", str(meta), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 10 and len(report["bad_rows"]) == 6
    assert report["bad_rows"][0] == {
        "row": 2,
        "place": "line 5",
        "path": "missing.mp4",
        "reason": "cannot be opened: No such file or directory",
    }
    assert run(["data", "validate", str(meta), "--deep", "--table-only"]) == 1
    assert "--deep and --table-only" in capsys.readouterr().err
    assert run(["data", "validate", str(meta.parent / "other.csv")]) == 1
    assert "other.csv does not exist" in capsys.readouterr().err
    empty = meta.with_name("empty.csv")
    empty.write_text(meta.read_text().splitlines(keepends=True)[0])
    assert run(["data", "validate", str(empty)]) == 1
    assert "empty.csv has no rows" in capsys.readouterr().err


def test_probe_command(tmp_path, capsys):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"x")
    out = tmp_path / "meta.csv"
    assert run(["data", "probe", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {tmp_path / 'b.mp4'}: cannot be read as a video" in printed
    assert f"{out}: 1 rows, 1 left out" in printed
    other = tmp_path / "other.csv"
    assert run(["data", "probe", str(tmp_path), "--out", str(other), "--fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert len(pd.read_csv(other)) == 1
    assert run(["data", "probe", str(tmp_path / "nowhere"), "--out", str(tmp_path / "third.csv")]) == 1
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_or_is_there_is_refused_at_once(meta, capsys, monkeypatch):
    """Its captions may be written by hand; told before hours of probing or checking, not after."""
    content = meta.read_text()
    monkeypatch.setattr(probe, "probe_media", lambda *_: pytest.fail("probed"))
    monkeypatch.setattr(validation, "validate_manifest", lambda *_, **__: pytest.fail("checked"))
    inside = meta.parent / "good.mp4" / "new" / "meta.csv"
    closed = meta.parent / "closed" / "meta.csv"
    closed.parent.mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed.parent and may(path, mode))
    for out, message in (
        (meta, f"manifest {meta} exists already, and is not overwritten: give another name"),
        (
            inside,
            f"manifest {inside} cannot be written: {inside.parents[1]} is no folder that this user may write into",
        ),
        (closed, f"manifest {closed} cannot be written: {closed.parent} is no folder that this user may write"),
    ):
        for command in (["probe", str(meta.parent), "--out", str(out)], ["validate", str(meta), "--keep", str(out)]):
            assert run(["data", *command]) == 1
            assert message in capsys.readouterr().err
    assert meta.read_text() == content


CONFIG = """
dataset = dict(type="VariableVideoTextDataset", frame_interval=2)
bucket_config = {"144p": {1: (1.0, 2), 16: (1.0, 2)}, "720p": {16: (1.0, 1)}}
"""


@pytest.fixture
def plain_meta(tmp_path):
    path = tmp_path / "meta.csv"
    rows = [f"{number}.mp4,x,40,144,256,24" for number in range(5)] + ["a.png,x,1,144,256,"]
    path.write_text("path,text,num_frames,height,width,fps\n" + "\n".join(rows) + "\n")
    return path


def test_buckets_explain(plain_meta, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    command = ["buckets", "explain", str(plain_meta), "--config", str(config)]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "144p, 16 frames, 0.56" in printed and "warning: 720p, 16 frames: no clip" in printed
    assert run([*command, "drop_last=False", "--world-size", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["micro_batches"], report["steps"], report["clips"], report["used_clips"]) == (4, 2, 6, 6)
    assert report["buckets"][0] == {
        "resolution": "144p",
        "frames": 16,
        "aspect_ratio": "0.56",
        "height": 144,
        "width": 256,
        "clips": 5,
        "batch_size": 2,
        "micro_batches": 3,
        "tokens": 2 * 16 * 9 * 16,
    }
    assert run([*command, "model.patch_size=(1, 4, 4)", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["buckets"][0]["tokens"] == 2 * 16 * 5 * 8
    assert run([*command, "bucket_config={'144p': {16: (1.0, 9)}}"]) == 1
    error = capsys.readouterr().err
    assert "144p, 16 frames, 0.56: 5 clips, batch size 9" in error and "lower the batch sizes" in error
    assert run([*command, "bucket_config={'144': {16: (1.0, 9)}}"]) == 1
    assert "did you mean '144p'" in capsys.readouterr().err
