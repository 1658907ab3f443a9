"""The list of clips that could not be used: one JSON object a line, written at once, appended to over restarts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from opensora_fast.data.decoding.clips import BadClip
from opensora_fast.files import naming_file


class BadClipLog:
    """Counts bad clips and writes them to a file.

    Args:
        path: of the file, made with its folder when the first clip is bad; None only counts.

    Attributes:
        count: clips recorded so far by this object.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.count = 0

    def add(self, clip: BadClip, *, epoch: int, micro_batch: int) -> None:
        """Record a clip that was to be part of a micro-batch (its number in the epoch). OSError if it cannot be."""
        self.count += 1
        if self.path is None:
            return
        entry = {
            "row": clip.row,
            "path": clip.path,
            "reason": clip.reason,
            "epoch": epoch,
            "micro_batch": micro_batch,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One unbuffered write of one line, opened for appending: lines of several processes do not mix.
        with naming_file(self.path), open(self.path, "ab", buffering=0) as file:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())


def read_bad_clips(path: str | os.PathLike[str]) -> list[dict]:
    """The entries of a list, oldest first; none if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
