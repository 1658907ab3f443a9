"""Checkpoints: whole or not there at all, whatever happens while they are written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from opensora_fast.config import load_train_config
from opensora_fast.train.checkpoints.checkpoint import (
    find_newest,
    list_checkpoints,
    locate_checkpoint,
    set_aside_newer,
    verify_checkpoint,
    write_checkpoint,
)
from opensora_fast.train.checkpoints.start import choose_start
from opensora_fast.train.checkpoints.state import FORMAT, read_position
from opensora_fast.train.locate_config import locate_config


def fill(content):
    def write(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(content * 1000)
        (folder / "state.json").write_text(content)

    return write


def test_write_verify_and_keep_the_newest(tmp_path):
    for step in (5, 10, 100_000_000, 20_000_000):
        folder = write_checkpoint(tmp_path, step, fill(str(step)), keep=3)
        verify_checkpoint(folder)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-20000000", "step-00000010"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000000", "step-20000000", "step-00000010"}
    assert find_newest(tmp_path, print).name == "step-100000000"


MARKERS = ("{", "[]", '{"step": 2}', '{"files": {}}', '{"step": "2", "files": {}}', '{"step": 2, "files": []}')
MARKERS += ('{"step": 2, "files": {"state.json": 1}}', '{"step": 2, "files": {"state.json": {}}}')


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "add", "no marker", *MARKERS])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage):
    good = write_checkpoint(tmp_path, 1, fill("a"), keep=2)
    bad = write_checkpoint(tmp_path, 2, fill("b"), keep=2)
    weights = bad / "model" / "weights"
    if damage == "truncate":
        weights.write_text("b")
    elif damage == "flip":
        raw = bytearray(weights.read_bytes())
        raw[500] ^= 1
        weights.write_bytes(raw)
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (bad / "model" / "extra").write_text("x")
    elif damage == "no marker":
        (bad / "complete.json").unlink()
    else:
        (bad / "complete.json").write_text(damage)
    told = []
    assert find_newest(tmp_path, told.append) == good
    assert len(told) == 1 and str(bad) in told[0] and "going back" in told[0]
    with pytest.raises(ValueError, match="step-00000002"):
        locate_checkpoint(bad, print)
    # writing that step again replaces it
    verify_checkpoint(write_checkpoint(tmp_path, 2, fill("c"), keep=2))
    assert find_newest(tmp_path, print) == bad


def test_locate(tmp_path):
    run = tmp_path / "run"
    folder = write_checkpoint(run / "checkpoints", 7, fill("a"), keep=1)
    assert locate_checkpoint(run, print) == folder
    assert locate_checkpoint(run / "checkpoints", print) == folder
    assert locate_checkpoint(folder, print) == folder
    moved = folder.rename(tmp_path / "best")
    assert locate_checkpoint(moved, print) == moved
    with pytest.raises(ValueError, match="no such folder"):
        locate_checkpoint(tmp_path / "nothing", print)
    with pytest.raises(ValueError, match="no complete checkpoint; give a checkpoint"):
        locate_checkpoint(run, print)
    theirs = tmp_path / "epoch0-global_step5"
    theirs.mkdir()
    (theirs / "running_states.json").touch()
    with pytest.raises(ValueError, match="Open-Sora's own trainer; --init-from .* starts from its weights"):
        locate_checkpoint(theirs, print)


def test_a_checkpoint_may_be_damaged_again(tmp_path):
    good = write_checkpoint(tmp_path, 1, fill("a"), keep=2)
    for content in ("b", "c"):
        write_checkpoint(tmp_path, 2, fill(content), keep=2)
        assert set_aside_newer(good) == [tmp_path / "damaged-step-00000002"]
        assert (tmp_path / "damaged-step-00000002" / "state.json").read_text() == content
        assert list_checkpoints(tmp_path) == [good]


def test_a_run_of_damaged_checkpoints_only_is_not_begun_anew(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 1, fill("a"), keep=1)
    (checkpoint / "state.json").unlink()
    with pytest.raises(ValueError, match="checkpoints holds no checkpoint that is whole; remove them to start anew"):
        choose_start(load_train_config(locate_config("stage1")).config, tmp_path, "auto", None, print)
    assert list_checkpoints(tmp_path / "checkpoints") == [checkpoint]


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": FORMAT - 1}))
    with pytest.raises(ValueError, match=f"has format {FORMAT - 1}; this version reads {FORMAT}"):
        read_position(tmp_path)


@pytest.mark.parametrize("failing", ["mkdir", "rename"])
def test_what_fails_around_the_writing_is_told_alike(tmp_path, monkeypatch, failing):
    good = write_checkpoint(tmp_path, 1, fill("a"), keep=1)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*{"mkdir": (Path, "mkdir"), "rename": (os, "rename")}[failing], fail)
        with pytest.raises(ValueError, match="step-00000002 could not be written: .*No space left on device.*--resume"):
            write_checkpoint(tmp_path, 2, fill("b"), keep=1)
    assert list(tmp_path.iterdir()) == [good]


def test_a_checkpoint_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    def fail(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    old = write_checkpoint(tmp_path, 1, fill("a"), keep=1)
    monkeypatch.setattr(shutil, "rmtree", fail)
    message = f"step-00000002 is written, but one before it could not be removed: .*Permission denied: '{old}'"
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path, 2, fill("b"), keep=1)
    verify_checkpoint(tmp_path / "step-00000002")


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_leaves_the_checkpoints_before_and_nothing_of_the_new_one(tmp_path, kind):
    def fail(folder):
        (folder / "part").write_text("x")
        raise kind("No space left on device")

    good = write_checkpoint(tmp_path, 1, fill("a"), keep=1)
    with pytest.raises(ValueError, match="step-00000002 could not be written: No space left on device.*--resume auto"):
        write_checkpoint(tmp_path, 2, fail, keep=1)
    assert list(tmp_path.iterdir()) == [good]
    write_checkpoint(tmp_path, 3, fill("b"), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


# Writes checkpoints 1 and 2 and kills itself, without any clean-up, at the n-th file operation of the second.
KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from opensora_fast.train.checkpoints import checkpoint

def fill(folder):
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("x" * 5000)
    (folder / "state.json").write_text("{}")

parent, deadly, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
checkpoint.write_checkpoint(parent, 1, fill, keep)
operations = 0

def count(event, arguments):
    global operations
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        operations += 1
        if operations == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
checkpoint.write_checkpoint(parent, 2, fill, keep)
print(operations)
"""


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_at_every_file_operation_leaves_a_good_checkpoint(tmp_path, keep):
    """`kill -9` at each open, rename and remove of a write: the checkpoint before stays usable until the new one is."""

    def run(folder, deadly):
        return subprocess.run(
            [sys.executable, "-c", KILLED_WRITER, str(folder), str(deadly), str(keep)], capture_output=True, text=True
        )

    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    operations = int(whole.stdout)
    assert operations > 10
    seen = set()
    for deadly in range(1, operations + 1):
        folder = tmp_path / str(deadly)
        result = run(folder, deadly)
        assert result.returncode == -signal.SIGKILL, result.stderr
        told = []
        newest = find_newest(folder, told.append)
        assert newest is not None, (deadly, told)
        seen.add(newest.name)
        # and the run goes on from there
        verify_checkpoint(write_checkpoint(folder, 3, fill("c"), keep=1))
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert seen == {"step-00000001", "step-00000002"}


def test_files_are_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), real_fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    folder = write_checkpoint(tmp_path, 1, fill("a"), keep=1)
    before = events[: events.index("rename")]
    files = json.loads((folder / "complete.json").read_text())["files"]
    assert set(files) == {"model/weights", "state.json"}
    for name in [*files, "complete.json", "model"]:
        assert any(path.endswith(f".unfinished-step-00000001/{name}") for path in before), name
    assert before[-1].endswith(".unfinished-step-00000001")  # the names in it
    assert events[-1] == str(tmp_path)
