"""Profile attention over lengths, or the kernels of a training step."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import parse_budget, parse_names

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.callback()
def callback() -> None:
    """Profile attention over lengths, or the kernels of a training step."""


@app.command()
def attention(
    out: Annotated[Path, typer.Option(help="Folder for the rows (CSV) and the plot (SVG).")],
    kind: Annotated[str, typer.Option(help="spatial, temporal or cross.")] = "spatial",
    seqlens: Annotated[str | None, typer.Option(help="Attended lengths, for example 144,405,1590.")] = None,
    providers: Annotated[
        str | None, typer.Option(help="Implementations to compare, for example upstream,ours.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Time for all samples together, such as 60s or 2m. Checks come on top, and three samples of each "
            "implementation are taken however long they last."
        ),
    ] = "60s",
    trace: Annotated[
        bool, typer.Option(help="Also write a trace of each implementation at the longest length, for ui.perfetto.dev.")
    ] = False,
) -> None:
    """Time, speed and error of every implementation, length by length: a table, a plot, the rows as CSV."""
    from opensora_fast.benchmarks.profiles.attention import (
        DEFAULT_LENGTHS,
        format_rows,
        profile_attention,
        profile_paths,
        trace_attention,
    )
    from opensora_fast.device import choose_device

    device = choose_device(device).type
    try:
        lengths = None if seqlens is None else [int(part) for part in seqlens.split(",")]
    except ValueError:
        raise ValueError(f"--seqlens {seqlens!r}: write whole numbers with commas between them") from None
    names = parse_names("--providers", providers)
    report = profile_attention(kind, lengths, names, device, out, parse_budget(budget))
    typer.echo(f"{kind} attention on {device}\n{format_rows(report.rows)}")
    for item in report.refused:
        typer.echo(f"wrong, so no time: {item}")
    csv_path, plot_path = profile_paths(kind, out)
    typer.echo(f"rows: {csv_path}\nplot: {plot_path if plot_path.exists() else 'none, as matplotlib is not installed'}")
    if not any(row.status == "ok" for row in report.rows):
        raise ValueError("no provider could be measured; the table says why for each")
    if trace:
        longest = max(lengths or DEFAULT_LENGTHS[kind, device])
        for path in trace_attention(report.rows, kind, longest, device, out):
            typer.echo(f"trace: {path}")


@app.command()
def step(
    out: Annotated[Path, typer.Option(help="Folder for the rows (CSV).")],
    resolutions: Annotated[
        str | None, typer.Option(help="Such as 240p,720p; default: all that the suites measure.")
    ] = None,
    provider: Annotated[str, typer.Option(help="Implementation of the step, such as ours or compile.")] = "ours",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """The kernels of a training step, the longest first: share of the step, ns for each token, launches.

    Where the activations of ours or compile do not fit, as few blocks as possible recompute them, and the name says so.
    """
    from opensora_fast.benchmarks.profiles.step import format_profile, profile_steps, write_profile
    from opensora_fast.benchmarks.suites.scale import scale_of
    from opensora_fast.device import choose_device

    scale = scale_of(choose_device(device).type)
    known = {workload.resolution: workload for workload in scale.steps}
    names = parse_names("--resolutions", resolutions) or list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--resolutions {name!r}: choose among {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    for profile in profile_steps([known[name] for name in names], provider, scale):
        path = out / f"step_{profile.workload.resolution}_{profile.provider}.csv"
        write_profile(profile, path)
        typer.echo(f"{format_profile(profile)}\nrows: {path}")
