"""Standard output of whatever encoding."""

import io
import sys


def escape_on_stdout() -> None:
    """Have a character that the terminal's encoding lacks escaped, as on stderr: it must not end a run behind its last
    step."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not that of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
