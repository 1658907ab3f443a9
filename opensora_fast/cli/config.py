"""Show a configuration with the origin of each value.

`config show CONFIG [key.sub=value ...]` reads the file as data, checks it and prints every key, given or default.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def config() -> None:
    """Configurations in Open-Sora's format."""


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="Configuration file (.py in Open-Sora's format, or .json).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print every key of a configuration, its value and where the value comes from."""
    from opensora_fast.config import list_values, load_any_config

    loaded = load_any_config(config, overrides or [])
    rows = [(key, value, loaded.get_origin(key)) for key, value in list_values(loaded.config)]
    if as_json:
        values = {key: {"value": value, "origin": origin} for key, value, origin in rows}
        kind = type(loaded.config).__name__
        print(json.dumps({"kind": kind, "values": values, "notes": loaded.notes}, indent=2))
        return
    print_rows(rows)
    for note in loaded.notes:
        print(f"note: {note}")


def print_rows(rows: list[tuple[str, object, str]]) -> None:
    """Print key, value and origin in columns; a table of buckets or masks takes one line for each entry."""
    key_width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{key_width}}  {_format(value, key_width)}  [{origin}]")


def _format(value: object, indent: int) -> str:
    if not isinstance(value, dict) or not value:
        return repr(value)
    lines = [f"{name!r}: {inner!r}" for name, inner in value.items()]
    return ("\n" + " " * (indent + 2)).join(lines)
