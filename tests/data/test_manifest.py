"""Manifest: CSV and Parquet, cells as they are, errors that name the file, the line and the fix."""

import os

import numpy as np
import pandas as pd
import pytest

from opensora_fast.data.manifest import Clip, Manifest, check_table, check_target, read_table, write_table

HEADER = "path,text,num_frames,height,width,fps\n"


def make_table(**changes) -> pd.DataFrame:
    columns = {
        "path": ["a.mp4", "sub/b.png"],
        "text": ["a cat", "a dog"],
        "num_frames": [97, 1],
        "height": [720, 480],
        "width": [1280, 640],
        "fps": [24.0, np.nan],
        "aes": [5.5, 6.5],
    }
    return pd.DataFrame({**columns, **changes})


@pytest.mark.parametrize("ending", ["csv", "parquet", "CSV"])
def test_read_what_was_written(tmp_path, ending):
    path = tmp_path / f"meta.{ending}"
    write_table(make_table(), path)
    manifest = Manifest.read(path)
    assert len(manifest) == 2
    assert manifest.clip(0) == Clip(0, str(tmp_path / "a.mp4"), "a cat", 97, 720, 1280, 24.0)
    assert manifest.clip(1) == Clip(1, str(tmp_path / "sub/b.png"), "a dog", 1, 480, 640, 120.0)
    assert Manifest(make_table(fps=[24.0, 0.0])).clip(1).fps == 120
    assert manifest.num_frames.tolist() == [97, 1] and manifest.height.dtype == np.int64
    assert manifest.table["aes"].tolist() == [5.5, 6.5]
    assert sorted(os.listdir(tmp_path)) == [path.name]


def test_absolute_paths_stay(tmp_path):
    assert Manifest(make_table(path=["/data/a.mp4", "b.png"]), tmp_path).clip(0).path == "/data/a.mp4"


def test_captions_are_taken_as_they_are(tmp_path):
    path = tmp_path / "meta.csv"
    captions = ['"two lines,\nand ""quotes"""', "None", "NA", "007", "", "null", "über 1.50"]
    path.write_text(HEADER + "".join(f"{row}.mp4,{text},20,480,640,24\n" for row, text in enumerate(captions)))
    manifest = Manifest.read(path)
    texts = [manifest.clip(row).text for row in range(len(manifest))]
    assert texts == ['two lines,\nand "quotes"', "None", "NA", "007", "", "null", "über 1.50"]


def test_byte_order_mark_and_whole_floats(tmp_path):
    path = tmp_path / "meta.csv"
    path.write_bytes(("\ufeff" + HEADER + "a.mp4,x,20.0,480,640,23.976\n").encode())
    clip = Manifest.read(path).clip(0)
    assert (clip.num_frames, clip.fps) == (20, 23.976)


def test_bad_rows_are_listed_with_their_lines(tmp_path):
    path = tmp_path / "meta.csv"
    path.write_text(
        HEADER
        + 'a.mp4,"a caption\nover two lines",20,480,640,24\n'  # lines 2 and 3
        + "\n"
        + "b.mp4,b,-5,480,640,24\n"  # line 5
        + "c.mp4,c,20,480.5,0,24\n"
        + ",d,20,480,640,24\n"
        + "e.mp4,e,many,480,640,\n"
        + "f.png,f,1,480,640,\n"
        + "g.mp4,g,20,480,640,inf\n"
        + "h.mp4,h,20\n"  # the rest of the cells is missing
        + "i.mp4,i,20,480,640,1e39\n"  # infinite in float32, in which the model is told
    )
    with pytest.raises(ValueError) as caught:
        Manifest.read(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 7 of 9 rows cannot be used:",
        "  line 5: num_frames is '-5', not a whole number > 0 (b.mp4)",
        "  line 6: height is '480.5', not a whole number > 0; width is '0', not a whole number > 0 (c.mp4)",
        "  line 7: path is empty",
        "  line 8: num_frames is 'many', not a whole number > 0; fps is missing, not a number > 0 (e.mp4)",
        "  line 10: fps is 'inf', not a number > 0 (g.mp4)",
        "  line 11: height is missing, not a whole number > 0; width is missing, not a whole number > 0; "
        "fps is missing, not a number > 0 (h.mp4)",
        "  line 12: fps is '1e+39', not a number > 0 (i.mp4)",
        f"`opensora-fast data validate {path} --keep GOOD.csv` lists all and writes the good rows",
        f"`opensora-fast data probe {path} --out NEW.csv` takes frames, sizes and fps from the files",
    ]


def test_bad_rows_of_parquet_are_named_by_number(tmp_path):
    path = tmp_path / "meta.parquet"
    write_table(make_table(height=[720, 0]), path)
    with pytest.raises(ValueError, match="row 1: height is '0'"):
        Manifest.read(path)
    write_table(make_table(height=[720, None]).convert_dtypes(), path)  # missing as pandas.NA
    with pytest.raises(ValueError, match="row 1: height is missing"):
        Manifest.read(path)


def test_only_some_of_many_bad_rows_are_shown():
    table = pd.concat([make_table(width=[0, 0])] * 20)
    with pytest.raises(ValueError, match="40 of 40 rows(.|\n)*and 30 more") as caught:
        Manifest(table)
    assert len(str(caught.value).splitlines()) == 14


def test_lines_are_found_up_to_a_cell_that_is_too_long(tmp_path):
    path = tmp_path / "meta.csv"
    rows = ["a.mp4,a,0,480,640,24", f"b.mp4,{'b' * 200_000},20,480,640,24", "c.mp4,c,0,480,640,24"]
    path.write_text(HEADER + "\n".join(rows))
    with pytest.raises(ValueError, match=r"line 2: num_frames(.|\n)*row 2: num_frames"):
        Manifest.read(path)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([np.nan, np.nan], ["", ""]),
        ([None, "x"], ["", "x"]),
        ([1.5, 7], ["1.5", "7.0"]),
        (pd.Categorical(["x", None]), ["x", ""]),
        (pd.array(["x", None], dtype="string"), ["x", ""]),
    ],
)
def test_captions_of_other_column_types(texts, expected):
    manifest = Manifest(make_table(text=texts))
    assert [manifest.clip(row).text for row in range(2)] == expected


def test_check_table_does_not_change_its_argument():
    table = make_table(height=["x", 480])
    before = table.copy(deep=True)
    checked, bad_rows = check_table(table, "table")
    pd.testing.assert_frame_equal(table, before)
    assert [bad_row.row for bad_row in bad_rows] == [0]
    assert checked["height"].tolist() == [0, 480]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("meta.csv", b"", "empty.*path,text,num_frames"),
        ("meta.csv", b"path,text,height\na,b,1\n", "lacks the columns num_frames, width, fps"),
        # as after a join of tables: which of two captions is meant nobody can know
        ("meta.csv", b"path,text,text,num_frames,height,width,fps\na,b,c,1,2,3,4\n", "more than one column text: keep"),
        ("meta.csv", HEADER.encode(), "has no rows"),
        ("meta.csv", HEADER.encode() + b"a.mp4,a,b,c,1,2,3,4,5\n", "not a well-formed CSV"),
        ("meta.csv", HEADER.encode() + b"a.mp4,x,20,480,640,24\nb.mp4,a, b,20,480,640,24\n", "CSV.*line 3 has 7"),
        # a first row that is too long, which the parser does not name, and a caption over two lines
        (
            "meta.csv",
            HEADER.encode() + b'a,x,y,2,3,4,5\nb,"x\ny",2,3,4,5\nc,x,y,z,2,3,4,5\n',
            "line 2 has 7, line 5 has 8",
        ),
        ("meta.csv", HEADER.encode() + b"a,x,y,20,480,640,24\n" * 12, "line 11 has 7 and 2 more.*double quotes"),
        ("meta.csv", b"path;text\na;x, y, z\n", "its header is one cell, 'path;text': the cells .* must have commas"),
        ("meta.csv", b"path;text\na;x\n", "its header is one cell, 'path;text': the cells .* must have commas"),
        ("meta.csv", b"path\na\n", "lacks the columns text, num_frames"),
        ("meta.csv", HEADER.encode("utf-16"), "not UTF-8 text, save it as that"),
        ("meta.csv", HEADER.encode() + b'a,"x,20,480,640,24\n', "EOF inside string"),
        ("meta.csv", HEADER.encode() + b"a.mp4,\xff\xfe,20,480,640,24\n", "not UTF-8"),
        ("meta.parquet", b"PAR1 not really", "not a readable Parquet"),
        ("meta.txt", b"", "must end in .csv or .parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match="does not exist.*data probe"):
        read_table(tmp_path / "meta.csv")


def test_commands_that_are_named_can_be_pasted(tmp_path):
    folder = tmp_path / "my clips"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"data probe '{folder}' --out META"):
        read_table(folder)
    for text, command in (
        (HEADER + "a.mp4,x,0,480,640,24\n", "validate {} --keep"),
        ("path,text\na,b\n", "probe {} --out"),
        (None, "--out {}`"),
    ):
        (folder / "meta.csv").unlink(missing_ok=True)
        if text is not None:
            (folder / "meta.csv").write_text(text)
        with pytest.raises(ValueError, match=command.format(f"'{folder / 'meta.csv'}'")):
            Manifest.read(folder / "meta.csv")


def test_a_folder_is_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="is a folder; .*data probe"):
        read_table(tmp_path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_any_caption_is_read_as_it_was_written(tmp_path, ending):
    texts = ["a\rb", "a\r\nb", "a\nb", "a\0b", ' "x", <b>&amp;</b> ', "NA", "😀\u2028", "\ufeff", "x" * 200_000]
    numbers = {"num_frames": 1, "height": 480, "width": 640, "fps": 24.0}
    for written in (texts, texts[:1]):  # all, and a carriage return alone
        write_table(pd.DataFrame({"path": "a.png", "text": written, **numbers}), tmp_path / f"meta.{ending}")
        manifest = Manifest.read(tmp_path / f"meta.{ending}")
        assert [manifest.clip(row).text for row in range(len(manifest))] == written


@pytest.mark.parametrize("name", ["path", "text"])
@pytest.mark.parametrize("values", [[b"a.mp4", b"b.mp4"], [["a", "b"], ["c"]]])
def test_cells_that_hold_no_text_are_named(tmp_path, name, values):
    path = tmp_path / "meta.parquet"
    make_table(**{name: values}).to_parquet(path)
    with pytest.raises(ValueError, match=rf"row 0: {name} is .*a.*, not text(.|\n)*row 1: {name} is"):
        Manifest.read(path)


def test_cells_that_hold_several_numbers_are_named(tmp_path):
    path = tmp_path / "meta.parquet"
    make_table(height=[[480, 640], [480]]).to_parquet(path)
    with pytest.raises(ValueError, match=r"row 0: height is '\[480 640\]', not a whole number"):
        Manifest.read(path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "meta.parquet"
    make_table().to_parquet(path)
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="meta.parquet is not a readable Parquet file"):
        Manifest.read(path)


def test_a_manifest_that_cannot_be_written_is_named_and_leaves_no_part(tmp_path):
    os.symlink("/dev/full", tmp_path / ".meta.csv.part")
    with pytest.raises(ValueError, match="meta.csv could not be written: .*No space left"):
        write_table(make_table(), tmp_path / "meta.csv")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_written_to(tmp_path):
    (tmp_path / "meta.csv").mkdir()
    with pytest.raises(ValueError, match="meta.csv is a folder; give the name of a file"):
        check_target(tmp_path / "meta.csv")
    with pytest.raises(ValueError, match="meta.csv could not be written: .*Is a directory"):
        write_table(make_table(), tmp_path / "meta.csv")
    assert os.listdir(tmp_path) == ["meta.csv"]


def test_write_refuses_other_kinds(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        write_table(make_table(), tmp_path / "meta.json")
    assert os.listdir(tmp_path) == []
