"""A configuration as text for a person."""

from typing import Any

from opensora_fast.config.load import LoadedConfig, list_values


def format_values(loaded: LoadedConfig[Any]) -> str:
    """Key, value and origin in columns; a table of buckets or masks takes one line for each entry."""
    rows = [(key, value, loaded.get_origin(key)) for key, value in list_values(loaded.config)]
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:<{width}}  {_format_value(value, width)}  [{origin}]" for key, value, origin in rows)


def _format_value(value: object, indent: int) -> str:
    if not isinstance(value, dict) or not value:
        return repr(value)
    lines = [f"{name!r}: {inner!r}" for name, inner in value.items()]
    return ("\n" + " " * (indent + 2)).join(lines)
