"""Make, check and probe the table of clips: `data demo`, `data probe`, `data validate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Tables of clips."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the clips to.")],
) -> None:
    """Write the clips of the demo."""
    from opensora_fast.data.demo_clips import write_demo_clips

    print(write_demo_clips(out))


@app.command()
def probe(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER_OR_TABLE",
            help="Folder with videos and images, folders in it are searched, too; or a table with the columns path and "
            "text, .csv or .parquet.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write, .csv or .parquet; a new one.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Files probed side by side; one per core.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Believe the files' headers; decode and count nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a manifest of all videos and images in a folder, or of those that a table names.

    In a folder the caption of clip.mp4 is the text of clip.txt beside it, or else the words of its name. Of a table
    everything stays but frames, sizes and frame rates, which are those of the files. Files that cannot be read are
    listed and left out. Exits with 0 if a manifest was written.
    """
    from opensora_fast.data.probe import probe_folder, probe_table

    probe_source = probe_table if source.is_file() else probe_folder
    result = probe_source(source, out, depth="header" if fast else "packets", workers=workers)
    if as_json:
        unreadable = [{"path": path, "reason": reason} for path, reason in result.unreadable]
        print(json.dumps({"manifest": str(out), "rows": len(result.table), "unreadable": unreadable}, indent=2))
        return
    for path, reason in result.unreadable:
        print(f"left out: {path}: {reason}")
    print(f"{out}: {len(result.table)} rows, {len(result.unreadable)} left out")


@app.command()
def validate(
    meta: Annotated[Path, typer.Argument(help="Manifest, .csv or .parquet.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every file and count its frames.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Check the cells; open no file.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Write the good rows to this manifest, a new one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Files opened side by side; one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List every bad row of a manifest with its line and the reason.

    Without options every file is opened and its header compared with the row. Exits with 1 if there is a bad row.
    """
    from opensora_fast.data.manifest import check_target
    from opensora_fast.data.validation import validate_manifest

    if deep and table_only:
        raise ValueError("--deep and --table-only contradict each other; give one")
    if keep is not None:
        check_target(keep)  # told before hours of checking, not after
    validation = validate_manifest(meta, check="deep" if deep else "table" if table_only else "files", workers=workers)
    if as_json:
        rows = [vars(bad_row) for bad_row in validation.bad_rows]
        print(json.dumps({"rows": len(validation.table), "bad_rows": rows, "remarks": validation.remarks}, indent=2))
    else:
        for bad_row in validation.bad_rows:
            print(bad_row)
        for remark in validation.remarks:
            print(f"remark: {remark}")
        print(f"{meta}: {len(validation.table)} rows, {len(validation.bad_rows)} bad")
    if keep is not None:
        typer.echo(f"{keep}: {validation.write_good_rows(keep)} good rows written", err=True)
    if validation.bad_rows:
        raise typer.Exit(1)
