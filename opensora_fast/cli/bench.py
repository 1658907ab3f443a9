"""Benchmark every implementation on the same work: ops, blocks, training steps, sampling, decoding."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import parse_budget, parse_names

MULTIPLE_VALUES = ("--only", "--report")


def command(
    out: Annotated[Path | None, typer.Option(help="Folder for the rows; finished rows in it are kept.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="all, push, kernels, step, loader or convergence; default: all.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for everything, such as 9m; the most valuable rows come first.")
    ] = None,
    providers: Annotated[str | None, typer.Option(help="Only these, for example eager,ours.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only cases with words that begin so, for example spatial 240p.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the planned cases and measure nothing.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --list: for such a GPU, H100 for example; default: the one here, or H200."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option(help="Measure again what has no time, and rows not known to be of these sources.")
    ] = False,
    commit: Annotated[
        str | None,
        typer.Option(help="Commit of a copied tree: what `git describe --always --abbrev=40 --dirty` prints."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two result folders, before and after; measure nothing.")
    ] = None,
    report: Annotated[
        list[Path] | None, typer.Option(help="Write report.html from the rows of these folders; measure nothing.")
    ] = None,
    relative: Annotated[
        float | None, typer.Option(help="With --compare: slower by more than this share (default: 0.05) …")
    ] = None,
    absolute_ms: Annotated[
        float | None,
        typer.Option(help="… and by more than so many milliseconds (default: 0.01) is a regression."),
    ] = None,
) -> None:
    """Benchmark every implementation on the same work: ops, blocks, training steps, sampling, decoding.

    Rows are written as they come, so a run may be stopped at any time and continued with the same --out. At its end it
    writes report.html beside them. Exits with 1 if --compare finds a regression, with 3 if a kernel of this project
    computes something wrong, with 130 when stopped.
    """
    if compare and report:
        raise ValueError("--compare and --report each do one thing and measure nothing; give one of them")
    if compare or report:
        of_runs = {
            "--out": out,
            "--suite": suite,
            "--device": device,
            "--budget": budget,
            "--providers": providers,
            "--only": only,
            "--list": show,
            "--gpu": gpu,
            "--refresh": refresh,
            "--commit": commit,
        }
        given = ", ".join(name for name, value in of_runs.items() if value)
        if given:
            raise ValueError(
                f"--compare and --report measure nothing and name their folders themselves; leave out {given}"
            )
    thresholds = {
        name: value for name, value in (("relative", relative), ("absolute_ms", absolute_ms)) if value is not None
    }
    if thresholds and compare is None:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in thresholds)
        raise ValueError(f"only --compare takes {given}: add it, or leave that out")
    if compare is not None:
        _compare(*compare, thresholds)
        return
    if report:
        for folder in report:
            _write_report(folder)
        return
    from opensora_fast.benchmarks.suites import list_cases
    from opensora_fast.costs.hardware import find_gpu
    from opensora_fast.device import check_device_name, choose_device

    if gpu is not None and not show:
        raise ValueError("--gpu is what --list plans for; a run is on the GPU that is here: add --list or leave it out")
    if gpu is not None and device == "cpu":
        raise ValueError("--gpu plans for a GPU, and --device is cpu; leave one of them out")
    # What is listed may be measured on another machine.
    device = "cuda" if gpu is not None else device
    device = check_device_name(device) if show and device else choose_device(device).type
    words = [word for text in only or () for word in text.split()]
    if only is not None and not words:
        raise ValueError("--only '': give words of the cases, or leave the option out")
    names = parse_names("--providers", providers)
    chosen = find_gpu(gpu) if gpu else None
    suite = suite or "all"
    cases = list_cases(suite, device, names, words, chosen)
    if show:
        from opensora_fast.benchmarks.report.summary import format_plan
        from opensora_fast.benchmarks.suites.scale import scale_of

        planned_for = scale_of(device, chosen).gpu
        typer.echo(format_plan(cases, planned_for.name if planned_for else ""))
        return
    if out is None:
        raise ValueError("--out is missing: give a folder for the rows, for example --out outputs/bench")
    raise typer.Exit(_measure(out, suite, device, budget, names, words, commit, refresh))


def _measure(
    out: Path,
    suite: str,
    device: str,
    budget: str | None,
    providers: list[str] | None,
    words: list[str],
    commit: str | None,
    refresh: bool,
) -> int:
    import datetime
    import importlib.util
    import time

    from opensora_fast.benchmarks.environment import find_source_state
    from opensora_fast.benchmarks.processes import DONE, ERROR, INTERRUPTED, WRONG, Plan
    from opensora_fast.benchmarks.running.supervise import supervise
    from opensora_fast.folder_lock import hold_folder

    deadline = time.time() + parse_budget(budget) if budget else None
    known, dirty = find_source_state(commit)  # a wrong --commit is told before anything starts
    if dirty or not known:  # found out at the end, a GPU's time may have been for nothing
        state = f"differ from commit {known[:12]}" if known else "are of a commit that nobody knows; --commit names it"
        typer.echo(f"note: the sources {state}; every row says so, and benchmarks/results takes no such rows")
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        suite=suite,
        device=device,
        folder=str(out.resolve()),
        started=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        providers=providers,
        words=words,
        commit=commit,
        refresh=refresh,
        deadline=deadline,
    )
    with hold_folder(out, typer.echo):
        code = supervise(plan)
    if code == INTERRUPTED:
        over = deadline is not None and time.time() >= deadline
        why = "--budget was over while the process that measures was loading, or stuck" if over else "stopped"
        fix = ", or with a longer --budget" if over else ""
        typer.echo(f"opensora-fast: error: {why}; run again with the same --out to go on{fix}", err=True)
    if code not in (DONE, ERROR, WRONG, INTERRUPTED):
        typer.echo(
            f"opensora-fast: error: the process that measures died before it came to anything new (exit code {code}); "
            "run again with the same --out to go on",
            err=True,
        )
    if code != ERROR and any(out.glob("*.csv")):
        if importlib.util.find_spec("matplotlib") is None:  # rows are worth more than their page
            typer.echo(f"no report.html: matplotlib is not installed; where it is, `bench --report {out}` writes it")
        else:
            _write_report(out)
    return code


def _write_report(folder: Path) -> None:
    from opensora_fast.benchmarks.report.page import write_report

    typer.echo(f"report: {write_report(folder)}")


def _compare(before: Path, after: Path, thresholds: dict[str, float]) -> None:
    from opensora_fast.benchmarks.report.compare import Thresholds, compare

    comparison = compare(before, after, Thresholds(**thresholds))
    typer.echo(str(comparison))
    if comparison.regressions:
        raise typer.Exit(1)
