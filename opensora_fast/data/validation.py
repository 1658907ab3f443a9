"""Check a manifest against the files it names: every bad row with its place and reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opensora_fast.data.decoding.clips import ClipError, is_image_path
from opensora_fast.data.manifest import BadRow, check_table, find_places, read_table, write_table
from opensora_fast.data.probe import MediaInfo, map_files, probe_media
from opensora_fast.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

Check = Literal["table", "files", "deep"]
"""table: only the cells. files: every file is also opened and its header compared. deep: every file is decoded."""


@dataclass(frozen=True)
class Validation:
    """What was found in a manifest.

    Attributes:
        folder: of the manifest.
        table: the manifest as it stands in its file.
        bad_rows: rows that cannot be used, in order.
        remarks: what is odd but works, for a person to read.
    """

    folder: Path
    table: pd.DataFrame
    bad_rows: list[BadRow]
    remarks: list[str]

    def write_good_rows(self, path: str | Path) -> int:
        """Write a manifest without the bad rows, whose relative paths lead to the same files; returns how many stay.

        Raises:
            ValueError: no row is good, or the ending is not that of a manifest.
        """
        path = Path(path)
        good = self.table.drop(index=[bad_row.row for bad_row in self.bad_rows])
        if len(good) == 0:
            raise ValueError(f"{path} was not written: not one row is good")
        if path.parent.resolve() != self.folder.resolve():
            start = path.parent.resolve()
            good["path"] = [_rebase(old, self.folder.resolve(), start) for old in good["path"]]
        write_table(good, path)
        return len(good)


def validate_manifest(path: str | Path, *, check: Check = "files", workers: int | None = None) -> Validation:
    """Find all rows of a manifest that cannot be used.

    Args:
        path: CSV or Parquet file.
        check: how far to look.
        workers: files opened side by side; one per core by default.

    Raises:
        ValueError: the file cannot be read as a manifest at all.
    """
    path = Path(path)
    table = read_table(path).reset_index(drop=True)
    checked, bad_rows = check_table(table, str(path))
    remarks = _find_remarks(checked)
    if check != "table":
        bad = {bad_row.row for bad_row in bad_rows}
        rows = [row for row in range(len(table)) if row not in bad]
        bad_rows = sorted(bad_rows + _check_files(path, checked, rows, check, workers), key=lambda bad_row: bad_row.row)
        relative = (bad_row.path for bad_row in bad_rows if not os.path.isabs(bad_row.path))
        if not all((path.parent / name).exists() for name in relative):
            remarks.append(f"relative paths count from the folder of the manifest, {path.parent.resolve()}")
    return Validation(path.parent, table, bad_rows, remarks)


def _check_files(
    path: Path, table: pd.DataFrame, rows: Sequence[int], check: Check, workers: int | None
) -> list[BadRow]:
    paths = table["path"].array
    depth = "header" if check == "files" else "frames"

    def look(row: int) -> MediaInfo:
        return probe_media(os.path.join(path.parent, paths[row]), depth)

    bad_rows = []
    with Progress("check files", total=len(rows), unit="files") as progress:
        for row, result in zip(rows, map_files(look, rows, workers), strict=True):
            reason = str(result) if isinstance(result, ClipError) else _compare(table.iloc[row], result)
            if reason:
                bad_rows.append(BadRow(row, "", paths[row], reason))
            progress.advance(1, bad=len(bad_rows))
    places = find_places(str(path), [bad_row.row for bad_row in bad_rows])
    return [replace(bad_row, place=places[bad_row.row]) for bad_row in bad_rows]


def _compare(row: pd.Series, found: MediaInfo) -> str:
    """What the manifest says wrongly about a file; empty if nothing."""
    reasons = []
    if (row["height"], row["width"]) != (found.height, found.width):
        reasons.append(
            f"the manifest says {row['height']} x {row['width']} pixels, the file {found.height} x {found.width}"
        )
    if row["num_frames"] == 1 and not is_image_path(row["path"]) and found.num_frames > 1:
        reasons.append(f"num_frames is 1, which means an image, but the file is a video of {found.num_frames} frames")
    elif row["num_frames"] > found.num_frames:
        reasons.append(f"the manifest says {row['num_frames']} frames, the file has only {found.num_frames}")
    return "; ".join(reasons)


def _find_remarks(table: pd.DataFrame) -> list[str]:
    remarks = []
    without_caption = int((table["text"].str.strip() == "").sum())
    if without_caption:
        remarks.append(f"{without_caption} of {len(table)} rows have no caption; they train as clips without text")
    repeated = int(table["path"].duplicated().sum())
    if repeated:
        remarks.append(f"{repeated} of {len(table)} rows name a file that an earlier row names, too")
    return remarks


def _rebase(path: str, old_folder: Path, new_folder: Path) -> str:
    return path if os.path.isabs(path) else os.path.relpath(old_folder / path, new_folder)
