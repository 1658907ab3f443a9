"""What to say of a name that is not known."""

import difflib
from collections.abc import Iterable
from typing import Any


def suggest(name: Any, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest of the known names in any case, or the list of all where none is near."""
    names = {item.lower(): item for item in map(str, known)}
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(names.values())}"
