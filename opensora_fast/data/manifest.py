"""The table of clips: a CSV or Parquet file with one row per clip, checked when it is read.

Columns, as Open-Sora's tools write them; others are kept:

| column     | holds |
|------------|-------|
| path       | the file; a relative path counts from the folder of the manifest |
| text       | the caption; a missing one is the empty caption |
| num_frames | frames in the file; 1 is an image |
| height     | pixels |
| width      | pixels |
| fps        | frames per second; may be missing for an image, which counts as 120 |
"""

from __future__ import annotations

import contextlib
import csv
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

from opensora_fast.files import whole_file

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
WHOLE_NUMBER_COLUMNS = ("num_frames", "height", "width")
IMAGE_FPS = 120.0
LARGEST_NUMBER = 2**31 - 1
SHOWN_ROWS = 10


@dataclass(frozen=True)
class Clip:
    """One row of a manifest; `path` is resolved, sizes are in pixels, `fps` in frames per second."""

    row: int
    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `place` says where it stands: "line 7" of a CSV file, "row 6" of a Parquet file."""

    row: int
    place: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.path})" if self.path else "")


class Manifest:
    """A checked table of clips.

    Attributes:
        table: pandas table with the columns above and any others of the file, rows numbered from 0.
        folder: from which relative paths count.
        num_frames, height, width: int64 [rows].
        fps: float64 [rows].
    """

    def __init__(self, table: pd.DataFrame, folder: str | Path = ".", source: str = "table") -> None:
        """Check a table.

        Args:
            table: with the columns above, and any others.
            folder: from which relative paths count.
            source: what error messages call the table; the path of its file if it came from one.

        Raises:
            ValueError: rows cannot be used; it lists them.
        """
        checked, bad_rows = check_table(table, source)
        if bad_rows:
            raise ValueError(_describe_bad_rows(source, bad_rows, len(table)))
        self.table = checked
        self.folder = Path(folder)
        self.source = source
        self.num_frames, self.height, self.width = (checked[name].to_numpy() for name in WHOLE_NUMBER_COLUMNS)
        self.fps = checked["fps"].to_numpy()
        self._paths, self._texts = checked["path"].array, checked["text"].array

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a CSV or Parquet file. ValueError that names the file, and the lines of bad rows."""
        path = Path(path)
        return cls(read_table(path), folder=path.parent, source=str(path))

    def __len__(self) -> int:
        return len(self.table)

    def clip(self, row: int) -> Clip:
        return Clip(
            row=row,
            path=os.path.join(self.folder, self._paths[row]),
            text=self._texts[row],
            num_frames=int(self.num_frames[row]),
            height=int(self.height[row]),
            width=int(self.width[row]),
            fps=float(self.fps[row]),
        )


def read_table(path: str | Path, needed: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The table of a CSV or Parquet file as it stands, with all needed columns but unchecked rows.

    Raises:
        ValueError: the file is missing, of another kind, or broken, lacks a column, has one twice, or has no rows.
    """
    path = Path(path)
    if path.is_dir():
        command = f"opensora-fast data probe {quote(str(path))} --out META"
        raise ValueError(f"{path} is a folder; `{command}` makes a manifest of it")
    check_ending(path)
    if not path.is_file():
        command = f"opensora-fast data probe FOLDER --out {quote(str(path))}"
        raise ValueError(f"manifest {path} does not exist; `{command}` makes one")
    table = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"it has {', '.join(map(repr, table.columns))}. "
            + (
                "Give every row its path and its caption under these names"
                if {"path", "text"} & set(missing)
                else f"`opensora-fast data probe {quote(str(path))} --out NEW.csv` takes what is missing from the files"
            )
        )
    if len(table) == 0:
        raise ValueError(f"{path} has no rows")
    return table


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV or Parquet, by its ending, into a folder that is made; it appears whole or not at all.

    Raises:
        ValueError: it is no name for a manifest, or the file cannot be written.
    """
    path = Path(path)
    check_ending(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            if path.suffix.lower() == ".csv":
                # A carriage return ends a line for readers, but is nothing that the writer quotes by itself.
                texts = table.select_dtypes(exclude="number")
                returns = any(texts[name].astype(str).str.contains("\r", regex=False).any() for name in texts)
                table.to_csv(part, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)
            else:
                table.to_parquet(part, index=False)
    except OSError as error:  # that of a full disk has no name of a file
        raise ValueError(f"manifest {path} could not be written: {error}") from error


def check_target(path: Path) -> None:
    """ValueError unless a manifest may be written to this path; to be asked before hours of work for it. One that is
    there may hold such work, captions for example, and is never overwritten."""
    check_ending(path)
    if path.is_dir():
        raise ValueError(f"manifest {path} is a folder; give the name of a file")
    if path.exists():
        raise ValueError(f"manifest {path} exists already, and is not overwritten: give another name, or remove it")
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise ValueError(f"manifest {path} cannot be written: {home} is no folder that this user may write into")


def check_ending(path: Path) -> None:
    """ValueError unless the ending is that of a manifest."""
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"manifest {path} must end in .csv or .parquet")


def check_table(table: pd.DataFrame, source: str) -> tuple[pd.DataFrame, list[BadRow]]:
    """The table with the types that `Manifest` promises, and the rows that cannot be used, in order.

    Cells of bad rows are replaced (0, 0.0 or the empty text) where they do not fit the type of their column.
    """
    import pandas as pd

    checked = table.reset_index(drop=True).copy(deep=False)
    reasons: dict[int, list[str]] = {}
    for name in ("path", "text"):
        if checked[name].dtype == object:
            # As text, they would read b'...' or [...].
            other = checked[name].map(lambda value: isinstance(value, (bytes, list, dict, np.ndarray)))
            _note(reasons, other, lambda row, name=name: f"{name} is {_show(table, row, name)}, not text")
        checked[name] = to_text(checked[name])
    _note(reasons, checked["path"] == "", lambda row: "path is empty")
    for name in WHOLE_NUMBER_COLUMNS:
        numbers = pd.to_numeric(checked[name], errors="coerce").astype(float)
        good = (numbers >= 1) & (numbers <= LARGEST_NUMBER) & (numbers == np.floor(numbers))
        _note(reasons, ~good, lambda row, name=name: f"{name} is {_show(table, row, name)}, not a whole number > 0")
        checked[name] = numbers.where(good, 0).astype(np.int64)
    fps = pd.to_numeric(checked["fps"], errors="coerce").astype(float)
    fps = fps.where(~(checked["num_frames"] == 1) | (fps > 0), IMAGE_FPS)
    good = (fps > 0) & (fps <= LARGEST_NUMBER)
    _note(reasons, ~good, lambda row: f"fps is {_show(table, row, 'fps')}, not a number > 0")
    checked["fps"] = fps.where(good, 0.0)
    places = find_places(source, reasons)
    bad_rows = [BadRow(row, places[row], checked["path"][row], "; ".join(reasons[row])) for row in sorted(reasons)]
    return checked, bad_rows


def find_places(source: str, rows: Iterable[int]) -> dict[int, str]:
    """Where rows stand in their file: the line of a CSV file, in which quoted captions may span lines, or the row."""
    rows = set(rows)
    if not rows or not source.lower().endswith(".csv"):
        return {row: f"row {row}" for row in rows}
    places = {row: f"row {row}" for row in rows}
    left = len(rows)
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        row, first_line = -1, 1
        try:
            for record in reader:
                # pandas skips blank lines; the header is the record before row 0.
                if len(record) > 1 or (record and record[0].strip()):
                    if row in rows:
                        places[row] = f"line {first_line}"
                        left -= 1
                    row += 1
                first_line = reader.line_num + 1
                if left == 0:
                    break
        except csv.Error:
            # A cell beyond what Python's reader takes (128 KB): the rows after it keep their numbers.
            return places
    return places


def to_text(column: pd.Series) -> pd.Series:
    """Every cell as text; a missing one is empty."""
    import pandas as pd

    if isinstance(column.dtype, pd.StringDtype):
        return column.fillna("")
    values = column.to_numpy(dtype=object)
    missing = column.isna().to_numpy()
    return pd.Series(
        ["" if gone else str(value) for value, gone in zip(values, missing, strict=True)],
        index=column.index,
        dtype=object,
    )


def _note(reasons: dict[int, list[str]], bad: pd.Series, describe) -> None:
    for row in np.flatnonzero(bad.to_numpy()):
        reasons.setdefault(int(row), []).append(describe(int(row)))


def _show(table: pd.DataFrame, row: int, name: str) -> str:
    import pandas as pd

    value = table[name].iloc[row]
    if np.ndim(value) == 0 and pd.isna(value):
        return "missing"
    # One missing cell makes a column of whole numbers one of floats; show them as they stand in the file.
    return repr(f"{value:g}" if isinstance(value, float) else str(value))


def _describe_bad_rows(source: str, bad_rows: list[BadRow], total: int) -> str:
    lines = [f"{source}: {len(bad_rows)} of {total} rows cannot be used:"]
    lines += [f"  {bad_row}" for bad_row in bad_rows[:SHOWN_ROWS]]
    if len(bad_rows) > SHOWN_ROWS:
        lines.append(f"  and {len(bad_rows) - SHOWN_ROWS} more")
    file = quote(source)
    lines.append(f"`opensora-fast data validate {file} --keep GOOD.csv` lists all and writes the good rows")
    lines.append(f"`opensora-fast data probe {file} --out NEW.csv` takes frames, sizes and fps from the files")
    return "\n".join(lines)


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # Lines longer than the header would lose their end with no more than this warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path,
                encoding="utf-8-sig",
                index_col=False,
                low_memory=False,
                dtype={"path": str, "text": str},
                # Only an empty cell is missing: "None" and "NA" are captions like any other.
                keep_default_na=False,
                na_values=[""],
            )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty; its first line must name the columns {','.join(COLUMNS)}") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} is not a well-formed CSV file: {_describe_long_lines(path) or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, save it as that: {error}") from None
    if len(table.columns) == 1 and table.columns[0] not in COLUMNS:
        raise ValueError(f"{path} is not a well-formed CSV file: {_describe_one_cell(table.columns[0])}")
    # pandas renames a column that comes twice.
    header = pd.read_csv(path, encoding="utf-8-sig", header=None, nrows=1, dtype=str).iloc[0].tolist()
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise ValueError(f"{path} has more than one column {', '.join(twice)}: keep the one that is meant")
    return table


def _describe_one_cell(header: str) -> str:
    """What is wrong with a CSV file where its header is one cell, which is no name of a column."""
    return f"its header is one cell, {header!r}: the cells of a line must have commas between them"


def _describe_long_lines(path: Path) -> str:
    """Which lines of a CSV file have more cells than its header, and why that usually is; empty if none has."""
    found = []
    with open(path, newline="", encoding="utf-8-sig") as file, contextlib.suppress(csv.Error):
        reader = csv.reader(file)
        header = next(reader)
        columns = len(header)
        if columns == 1:
            return _describe_one_cell(header[0])
        line = reader.line_num + 1
        for record in reader:
            if len(record) > columns:
                found.append(f"line {line} has {len(record)}")
            line = reader.line_num + 1
    if not found:
        return ""
    more = f" and {len(found) - SHOWN_ROWS} more have too many" if len(found) > SHOWN_ROWS else ""
    return (
        f"its header has {columns} cells, {', '.join(found[:SHOWN_ROWS])}{more}. A caption with a comma must stand in "
        "double quotes"
    )


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow

    try:
        return pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
