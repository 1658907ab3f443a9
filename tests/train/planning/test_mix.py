"""A mix file says how clips fall into buckets; what is wrong in it is named by line."""

import json

import numpy as np
import pytest

from opensora_fast.config import load_train_config
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.train.locate_config import locate_config
from opensora_fast.train.planning.mix import mix_assumed, mix_of_file, read_mix

CONFIG = load_train_config(locate_config("stage1")).config
BUCKET = Bucket(CONFIG.bucket_config)


def write(tmp_path, text: str, name: str = "mix.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def count(mix) -> dict[tuple, int]:
    numbers = np.bincount(mix.bucket_of, minlength=len(BUCKET))
    return {BUCKET.ids[index]: int(numbers[index]) for index in np.flatnonzero(numbers)}


def test_clips_are_cut_into_micro_batches(tmp_path):
    path = write(
        tmp_path, "resolution,frames,aspect_ratio,clips\n144p,16,0.56,100\n144p,16,1.78,13\n256,1,1,50\n240p,16,,2000\n"
    )
    mix = mix_of_file(path, CONFIG, BUCKET, world_size=64)
    assert count(mix) == {
        ("144p", 16, "0.56"): 16,
        ("144p", 16, "1.78"): 2,
        ("256", 1, "1.0"): 2,
        ("240p", 16, "0.56"): 1000,
    }
    assert mix.steps == 1020 // 64
    assert (np.diff(mix.bucket_of) != 0).sum() > 20, "shuffled"
    filled = mix_of_file(path, CONFIG.model_copy(update={"drop_last": False}), BUCKET, world_size=64)
    assert count(filled) == {
        ("144p", 16, "0.56"): 17,
        ("144p", 16, "1.78"): 3,
        ("256", 1, "1.0"): 3,
        ("240p", 16, "0.56"): 1000,
    }
    assert filled.steps == -(-1023 // 64)


def test_shares_in_json_are_shares_of_clips(tmp_path):
    entries = [{"resolution": "144p", "frames": 16, "share": 3}, {"resolution": 256, "frames": 1, "share": 1}]
    mix = mix_of_file(write(tmp_path, json.dumps(entries), "mix.json"), CONFIG, BUCKET, 64)
    numbers = count(mix)
    # Batch sizes 6 and 24: three times the clips are twelve times the micro-batches.
    assert numbers["144p", 16, "0.56"] / numbers["256", 1, "1.0"] == pytest.approx(12, rel=1e-3)
    assert mix.steps is None


def test_without_a_file_every_entry_that_keeps_clips_gives_as_many():
    numbers = count(mix_assumed(CONFIG, BUCKET))
    assert len(numbers) == 11 and len(set(numbers.values())) == 1
    assert ("240p", 64, "0.56") not in numbers and ("1024", 1, "1.0") in numbers


def test_entries_of_which_none_keeps_clips_are_refused():
    with pytest.raises(ValueError, match="every keep probability is 0"):
        mix_assumed(CONFIG, Bucket({"144p": {16: (0.0, 1)}, "240p": {16: (0.0, None)}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution,frames,share\n144p,17,1\n", r"line 2: there is no bucket \('144p', 17\)"),
        ("resolution,frames,share\n144p,16,1\n150p,16,1\n", "line 3: .*150p"),
        (
            "resolution,frames,aspect_ratio,share\n144p,16,0.99,1\n",
            "line 2: resolution 144p has no aspect ratio '0.99'",
        ),
        ("resolution,frames,share\n240p,64,1\n", r"line 2: bucket_config\['240p'\]\[64\] keeps no clip"),
        ("resolution,frames,share\n144p,16,-1\n", "line 2: share is '-1'; write a number from 0 to"),
        ("resolution,frames,clips\n144p,16,1.5\n", "line 2: clips is '1.5'; write a whole number"),
        ("resolution,frames,clips\n144p,16,\n", "line 2: give clips in all lines, or share in all lines"),
        ("resolution,frames,clips,share\n144p,16,1,\n240p,16,,1\n", "line 3: give clips in all lines, or share"),
        ("resolution,frames,weight\n144p,16,1\n", "line 2: unknown 'weight'; known are resolution, frames"),
        ("frames,share\n16,1\n", "line 2: resolution is missing"),
        ("resolution,frames,share\n144p,16,0\n", "share is 0 everywhere"),
        ("resolution,frames,share\n", "holds no bucket"),
        (
            "resolution,frames,aspect_ratio,share\n144p,16,wide,1\n",
            "^[^ ]*, line 2: aspect_ratio is 'wide'; write a number",
        ),
        ("resolution,frames,share\n144p,16,1,7\n", "line 2: more values than names in the header"),
        ("resolution,frames,share\n144p,16,1e300\n", "line 2: share is '1e300'; write a number from 0 to"),
        ('resolution,frames,share\n144p,16,"' + 200_000 * "1" + '"\n', "field larger than"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_mix(write(tmp_path, text), BUCKET)


def test_what_spreadsheets_write_is_read(tmp_path):
    plain = write(tmp_path, "resolution,frames,share\n144p,16,1\n")
    other = tmp_path / "other.csv"
    other.write_bytes(b"\xef\xbb\xbfresolution, frames, share\r\n144p, 16, 1\r\n")
    assert np.array_equal(read_mix(other, BUCKET)[0], read_mix(plain, BUCKET)[0])


@pytest.mark.parametrize("name", ["mix.csv", "mix.json"])
def test_a_file_that_is_no_text_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{name}: not a text in UTF-8"):
        read_mix(tmp_path / name, BUCKET)


def test_true_is_no_number(tmp_path):
    path = write(tmp_path, '[{"resolution": "144p", "frames": 16, "share": true}]', "mix.json")
    with pytest.raises(ValueError, match="object 1: share is True; write a number"):
        read_mix(path, BUCKET)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mix.json", "{"),
        ("mix.json", '{"144p": 1}'),
        ("mix.json", "3"),
        ("mix.json", '[{"resolution": "144p", "frames": 16, "share": 1}, 3]'),
        ("mix.txt", ""),
    ],
)
def test_other_files_are_refused(tmp_path, name, text):
    with pytest.raises(ValueError, match="not JSON|a list of objects|write a .csv or a .json"):
        read_mix(write(tmp_path, text, name), BUCKET)
