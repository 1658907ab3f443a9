"""Checkpoints that survive a kill at any moment: it costs the steps since the last one that was written whole.

A checkpoint is a folder `step-00000500`. It is filled under another name, every file is flushed to the disk and its
checksum noted in `complete.json`, and only then the folder gets its name; so a folder of that name is whole, and what a
kill leaves behind is never mistaken for one. Older checkpoints are removed after that, the newest `keep` stay. Only
safetensors and JSON are written and read: loading executes nothing.
"""

import json
import operator
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from opensora_fast.files import flush, hash_file

COMPLETE = "complete.json"
FOLDER_NAME = re.compile(r"step-(\d{8,})")
UNFINISHED_PREFIX = ".unfinished-"


def write_checkpoint(parent: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of one step and remove the oldest.

    Args:
        parent: folder of the run's checkpoints, made if it is not there.
        step: optimizer steps taken.
        fill: writes the files into the folder it is given.
        keep: number of checkpoints that stay, 1 or more.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: it could not be written, because the disk is full for example. What was written of it is removed,
            older checkpoints stay. Or it is written, but an older one could not be removed.
    """
    final = locate_step(parent, step)
    unfinished = parent / f"{UNFINISHED_PREFIX}{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f"{UNFINISHED_PREFIX}*"):
            shutil.rmtree(leftover)
        _fill_and_seal(unfinished, step, fill)
        if final.exists():  # a damaged one of the same step, which resuming has passed over
            shutil.rmtree(final)
        os.rename(unfinished, final)
        flush(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(
            f"the checkpoint {final} could not be written: {error}. Once it can be, --resume auto continues "
            "from the checkpoint before it"
        ) from error
    try:
        for old in list_checkpoints(parent)[keep:]:
            shutil.rmtree(old)
    except OSError as error:
        raise ValueError(
            f"the checkpoint {final} is written, but one before it could not be removed: {error}"
        ) from error
    return final


def _fill_and_seal(folder: Path, step: int, fill: Callable[[Path], None]) -> None:
    """Make the folder, let its files be written, flush them to the disk and vouch for them in `complete.json`."""
    folder.mkdir()
    fill(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    marker = folder / COMPLETE
    marker.write_text(json.dumps({"step": step, "files": files}, indent=1))
    for path in (marker, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)


def locate_step(parent: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return parent / f"step-{step:08d}"


def list_checkpoints(parent: Path) -> list[Path]:
    """Folders named as checkpoints, newest first; whether they are whole is not looked at."""
    if not parent.is_dir():
        return []
    folders = [path for path in parent.iterdir() if FOLDER_NAME.fullmatch(path.name)]
    return sorted(folders, key=get_step, reverse=True)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum. ValueError names the first that is missing, changed or not listed."""
    _, files = _read_marker(folder)
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size or hash_file(path) != checksum:
            raise ValueError(f"{path} is damaged: it is not what was written")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if extra := sorted(present - set(files) - {COMPLETE}):
        raise ValueError(f"{folder / extra[0]} does not belong to the checkpoint: remove it")


def _read_marker(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """What `complete.json` says: the step, and bytes and SHA-256 of every file. ValueError if it cannot be read."""
    marker = folder / COMPLETE
    if not marker.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: {COMPLETE} is missing")
    try:
        content = json.loads(marker.read_text())
        files = {name: (written["bytes"], written["sha256"]) for name, written in content["files"].items()}
        return operator.index(content["step"]), files
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{marker} is damaged: {error!r}") from None


def find_newest(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None; `warn` is told of each one that is passed over."""
    for folder in list_checkpoints(parent):
        try:
            verify_checkpoint(folder)
            return folder
        except ValueError as error:
            warn(f"{error}; going back to the checkpoint before it")
    return None


def set_aside_newer(checkpoint: Path) -> list[Path]:
    """Rename the folders of later steps, which are damaged: they would count among the newest that stay, in place of
    whole ones. Returns the new names, `damaged-step-...`."""
    step = get_step(checkpoint)
    renamed = []
    for folder in list_checkpoints(checkpoint.parent):
        if get_step(folder) > step:
            target = folder.with_name(f"damaged-{folder.name}")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(folder.rename(target))
    return renamed


def locate_checkpoint(path: Path, warn: Callable[[str], None]) -> Path:
    """The checkpoint that a person means by a path: a checkpoint, a folder of them, or the output folder of a run.

    Raises:
        ValueError: there is none, or the one named is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a checkpoint (step-...) or the output folder of a run")
    if (path / COMPLETE).exists():
        verify_checkpoint(path)
        return path
    for parent in (path / "checkpoints", path):
        if (found := find_newest(parent, warn)) is not None:
            return found
    if (path / "running_states.json").is_file():
        raise ValueError(
            f"{path} is a checkpoint of Open-Sora's own trainer; --init-from {path} starts from its weights"
        )
    raise ValueError(
        f"{path} holds no complete checkpoint; give a checkpoint (step-...) or the output folder of a run that has one"
    )


def get_step(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(FOLDER_NAME.fullmatch(folder.name)[1])


def read_step(checkpoint: Path) -> int:
    """The step of a whole checkpoint, whatever a person has called its folder."""
    step, _ = _read_marker(checkpoint)
    return step
