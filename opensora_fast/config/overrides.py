"""`key.sub=value` of the command line, laid over the values of a configuration file."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from opensora_fast.config.upstream_file import parse_literal


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Split `model.depth=4` into (("model", "depth"), 4).

    The value is read as in a configuration file (`1e-4`, `(1.0, 2)`, `dict(type="linear")`, `None`); what is no value
    there is taken as a string, so that `dtype=bf16` and `dataset.data_path=a/b.csv` need no quotes.
    """
    key, separator, value = text.partition("=")
    path = tuple(key.split("."))
    if not separator or not all(part.strip() == part and part for part in path):
        raise ValueError(f"override {text!r}: write key=value or key.sub=value, for example lr=1e-4 or model.depth=4")
    if value.strip() == "":
        raise ValueError(f"override {text!r}: the value is missing; write {key}=None or {key}='' for an empty one")
    try:
        return path, parse_literal(value)
    except (SyntaxError, ValueError):
        if value.lstrip()[0] in "([{\"'" or value.startswith("dict("):
            raise ValueError(f"override {text!r}: cannot read the value {value!r}") from None
        return path, value


def apply_overrides(
    values: dict[str, Any], overrides: Iterable[tuple[tuple[str, ...], Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lay (path, value) over the values, in order; returns a new dictionary and {dotted key: its new value}.

    A dictionary given as a value replaces the one that was there. Raises ValueError for a key below something that is
    not a dictionary.
    """
    values = deepcopy(values)
    given: dict[str, Any] = {}
    for path, value in overrides:
        dotted = ".".join(path)
        parent = values
        for depth, part in enumerate(path[:-1], start=1):
            name = _find_name(parent, part)
            if parent.get(name) is None:
                parent[name] = {}
            if not isinstance(parent[name], dict):
                raise ValueError(f"override of {dotted}: {'.'.join(path[:depth])} has no keys below it")
            parent = parent[name]
        parent[_find_name(parent, path[-1])] = value
        given = {key: old for key, old in given.items() if not key.startswith(f"{dotted}.")} | {dotted: value}
    return values, given


def _find_name(parent: dict[Any, Any], part: str) -> Any:
    """The key of `parent` that is written like `part`: frame counts of a bucket table are integers in files."""
    return next((name for name in parent if str(name) == part), part)
