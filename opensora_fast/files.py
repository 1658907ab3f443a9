"""Writing files where the disk may be full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Put the name of a file into an OSError of the block: that of a full disk lacks it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave what was there before it. OSError names it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with naming_file(path):
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
