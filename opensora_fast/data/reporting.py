"""Where the loaders tell what a user should know, unless they are given another place."""

from __future__ import annotations

import sys


def print_line(text: str) -> None:
    """One line on standard error, like progress: standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)
