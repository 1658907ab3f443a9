"""List the kernels, build them for any GPU without having one, or measure their configurations on this one."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ._options import parse_budget

app = typer.Typer(no_args_is_help=True)


@app.callback()
def kernels() -> None:
    """The Triton kernels."""


@app.command("list")
def list_kernels(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False) -> None:
    """Print each op: its status, what it replaces in ST-DiT-2, its dtypes and its limits."""
    from dataclasses import asdict

    from opensora_fast.kernels.inventory import list_ops

    ops = [asdict(op) for op in list_ops()]
    if as_json:
        print(json.dumps(ops, indent=2))
        return
    for op in ops:
        print(f"{op['name']}: {op['status']}")
        for field in ("replaces", "dtypes", "limits"):
            if op[field]:
                print(f"    {field + ':':<10}{op[field]}")


@app.command("compile")
def compile_all(
    arch: Annotated[str, typer.Option(help="Architectures, with commas.")] = "sm_80,sm_90,sm_100",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Builds at a time; default: one on each CPU.")] = None,
    write_budget: Annotated[
        bool, typer.Option(help="Make this the budget; needs all architectures, the tests hold sm_90 to it.")
    ] = False,
    check_budget: Annotated[
        bool,
        typer.Option(
            help="Exit with 1 if a build spills, needs more than the budget, attends without the matrix units, or "
            "leaves their descriptors unwritten."
        ),
    ] = False,
) -> None:
    """Build every kernel as the model of hidden size 1152 and head size 72 uses it, and print what each build needs.

    No GPU is needed. Exits with 1 if a build fails.
    """
    from opensora_fast.kernels import compilation
    from opensora_fast.progress import Progress

    architectures = list(dict.fromkeys(name.strip() for name in arch.split(",") if name.strip()))
    if write_budget and set(architectures) != set(compilation.ARCHITECTURES):
        raise ValueError("--write-budget: the budget is of all architectures; leave --arch out")
    total, builds = compilation.compile_kernels(architectures, processes)
    rows = []
    with Progress("build kernels", total=total, unit="builds") as progress:
        for row in builds:
            rows.append(row)
            progress.advance(1, kernel=row["kernel"])
    rows.sort(key=lambda row: (architectures.index(row["arch"]), *compilation.build_key(row)))
    print(json.dumps(rows, indent=1) if as_json else format_builds(rows))
    failed = [row for row in rows if "error" in row]
    if failed:
        names = "\n".join(f"  {row['kernel']} {row['arch']} {row['dtype']}: {row['error']}" for row in failed)
        raise ValueError(f"{len(failed)} of {len(rows)} builds failed:\n{names}")
    if write_budget:
        compilation.write_budget(rows)
    if check_budget:
        faults = compilation.find_faults(rows)
        if faults:
            raise ValueError("\n  ".join([f"{len(faults)} faults:", *faults]))


def format_builds(rows: list[dict[str, Any]]) -> str:
    """One line for each build, in columns: bytes of an access × how many for loads and stores of global memory."""

    def show(row: dict[str, Any], name: str) -> str:
        value = row.get(name, "failed")
        if isinstance(value, dict):
            return " ".join(f"{width}×{count}" for width, count in value.items())
        if name == "slots" and isinstance(value, float):
            return f"{value:.1f}/{row['unit']}"
        return "" if value is None else str(value)

    columns = ("kernel", "arch", "dtype", "registers", "spills", "shared", "hgmma", "programs", "warps")
    columns += ("loads", "stores", "slots", "config", "note")
    table = [columns, *([show(row, name) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    lines = ("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


@app.command()
def autotune(
    out: Annotated[Path | None, typer.Option(help="File to write; default: the one that the kernels read.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    budget: Annotated[str | None, typer.Option(help="Begin nothing after this time, such as 5m; default: all.")] = None,
    timings: Annotated[Path | None, typer.Option(help="CSV to write with every candidate's times.")] = None,
) -> None:
    """Measure every candidate configuration on this GPU and write the fastest of each shape class.

    The kernels read `kernels/configurations/<gpu>.json`. Both files are written anew after every workload. What an
    earlier run measured over more workloads than this one got through is kept. Needs a CUDA GPU.
    """
    import torch

    from opensora_fast.benchmarks.environment import describe_environment
    from opensora_fast.kernels.autotune import TUNED_OPS, choose_fastest, tune, write_measured, write_timings
    from opensora_fast.progress import Progress

    deadline = time.time() + parse_budget(budget) if budget else None
    total, measured = tune(op or TUNED_OPS, torch.device("cuda"), deadline)
    about = describe_environment("cuda")
    versions = {"torch": about.torch, "triton": about.triton, "commit": about.commit, "date": about.date}
    found = []
    # First of all, so that a place where nothing can be written costs no measurement.
    gpu = torch.cuda.get_device_name()
    path, stay = write_measured(found, gpu, versions, out)
    if timings is not None:
        write_timings(found, timings)
    with Progress("measure configurations", total=total, unit="workloads") as progress:
        for of_workload in measured:
            found += of_workload
            path, stay = write_measured(found, gpu, versions, out)
            if timings is not None:
                write_timings(found, timings)
            progress.advance(1, op=of_workload[0].op if of_workload else "nothing to choose")
    for failed in found:
        if failed.reason:
            print(f"{failed.kernel} / {failed.shape_class} on {failed.pack}, {failed.configuration}: {failed.reason}")
    rows = choose_fastest(found)
    if not rows:
        raise ValueError("every candidate failed" if found else "no candidate was measured: give a longer --budget")
    kept = {(row["kernel"], row["shape_class"]): row["workloads"] for row in stay}
    for row in rows:
        choice = " ".join(f"{name}={value}" for name, value in row["configuration"].items())
        default = row["default_microseconds"]
        gain = "the default does not run" if default is None else f"{default / row['microseconds']:.2f} x the default"
        before = kept.get((row["kernel"], row["shape_class"]))
        over = f"; not written: on {row['workloads']} workloads, and what was chosen on {before} before stays"
        print(f"{row['kernel']} / {row['shape_class']}: {choice}  ({gain}{over if before else ''})")
    print(f"wrote {path}")
