"""Show a configuration with the origin of each value.

`config show CONFIG [key.sub=value ...]` reads the file as data, checks it and prints every key, given or default.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from opensora_fast.cli._options import ANY_CONFIG_HELP, Overrides

app = typer.Typer(no_args_is_help=True)


@app.callback()
def config() -> None:
    """Configurations in Open-Sora's format."""


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help=ANY_CONFIG_HELP)],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print every key of a configuration, its value and where the value comes from."""
    from opensora_fast.config import format_values, list_values, load_any_config
    from opensora_fast.train.locate_config import locate_config

    loaded = load_any_config(locate_config(config), overrides or [])
    if as_json:
        values = {key: {"value": value, "origin": loaded.get_origin(key)} for key, value in list_values(loaded.config)}
        kind = type(loaded.config).__name__
        print(json.dumps({"kind": kind, "values": values, "notes": loaded.notes}, indent=2))
        return
    print(format_values(loaded))
    for note in loaded.notes:
        print(f"note: {note}")
