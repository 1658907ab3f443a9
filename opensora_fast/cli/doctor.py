"""Check this machine: versions, GPU, kernels usable, what is missing and how to get it."""

import json
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: versions, GPU, kernels usable, what is missing and how to get it.

    Exits with 1 if something that is required is missing or cannot work.
    """
    from opensora_fast.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if report.problems:
        raise typer.Exit(1)


def _print(report) -> None:  # noqa: ANN001 - importing the type would load torch for --help
    for name, value in report.machine.items():
        print(f"{name:<22} {value}")
    for gpu in report.gpus:
        print(f"{'GPU':<22} {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    if not report.gpus:
        print(f"{'GPU':<22} none that torch can use: everything runs on the CPU, slowly")
    print(f"{'kernels on the CPU':<22} {report.kernels['cpu']}")
    print(f"{'kernels on CUDA':<22} {report.kernels['cuda']}")
    print(f"{'video decoders':<22} {', '.join(report.decoders)}")
    print()
    for package in report.packages:
        line = f"{package.name:<22} {package.version or '-':<14} {package.state:<12} {package.purpose}"
        print(line if package.fix is None else f"{line}\n{'':<22} -> {package.fix}")
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print("\nall that is required is here" if not report.problems else "\nnot ready: see the problems above")
