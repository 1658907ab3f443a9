"""The figure and the tables of the README, from committed rows: `python -m opensora_fast.benchmarks.readme`.

Rewrites the block between two markers of README.md, and its figure `benchmarks/results/training.svg`. With --check it
writes nothing and exits with 1 where either is out of date.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from opensora_fast import kernels

from .jobs.convergence import AGAINST_ROUNDING
from .providers.variants import VARIANT_OF
from .report.results import Results, Work, is_ours
from .report.training_figure import NOT_MEASURED, NOTHING, build_figure, thousands, wrong
from .report.training_lines import AS_SHIPPED, FRAMES, PEERS, PUBLISHED_ON, Line, OnGpu, training_lines
from .rows import Row, read_folder

BEGIN = "<!-- measured: begin; `python -m opensora_fast.benchmarks.readme` writes what follows -->"
END = "<!-- measured: end -->"
FIGURE = "benchmarks/results/training.svg"
SHARES = {0.25: "a quarter", 0.5: "half", 0.75: "three quarters", 1.0: "all"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the figure and the tables of the README from committed rows.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where they are out of date")
    check = parser.parse_args(arguments).check
    root = Path(kernels.__file__).parent.parent
    readme = root / "README.md"
    if not readme.exists():
        raise SystemExit(f"{readme} does not exist: run this in a checkout of the repository")
    folders = read_results(root / "benchmarks" / "results")
    wanted = {readme: replace_block(readme.read_text(encoding="utf-8"), build_block(folders))}
    wanted[root / FIGURE] = build_figure(training_lines(folders))
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(root)) for path in old)
    if check:
        print(f"out of date: {names}; `python -m opensora_fast.benchmarks.readme` rewrites" if old else "up to date")
        return 1 if old else 0
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    print(f"rewritten: {names}" if old else "up to date")
    return 0


def read_results(results: Path) -> list[Results]:
    """The folders of committed rows, by name."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return [Results.read(folder) for folder in folders if read_folder(folder)]


def replace_block(readme: str, block: str) -> str:
    """The README with another block between its markers.

    Raises:
        ValueError: there are no markers, or not in this order.
    """
    if not -1 < readme.find(BEGIN) < readme.find(END):
        raise ValueError(f"README.md has no block between {BEGIN} and {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


# ---- the block ----


def build_block(folders: list[Results]) -> str:
    parts = [_training_text(training_lines(folders))]
    parts += [_cpu_text(results) for results in folders if not results.is_gpu]
    return "\n\n".join(parts)


def _training_text(lines: Sequence[Line]) -> str:
    table = [["thousand tokens/s", *(line.resolution for line in lines)]]
    for index, gpu in enumerate(on.gpu for on in lines[0].measured):
        measured = [line.measured[index] for line in lines]
        ours = ["**" + thousands(on.ours.tokens_per_s) + "**" if on.ours else NOT_MEASURED for on in measured]
        table += [
            [f"limit of one {gpu}, counted", *(thousands(on.floor) for on in measured)],
            [f"**ours on one {gpu}**", *ours],
        ]
        for attribute, name in PEERS:
            cells = [_peer_cell(on, attribute) for on in measured]
            if any(cell != NOTHING for cell in cells):
                table.append([f"{name}, same {gpu} and run", *cells])
    table += [
        [f"limit of one {PUBLISHED_ON}, counted", *(thousands(line.published_floor) for line in lines)],
        [f"Open-Sora on {PUBLISHED_ON}, published", *(thousands(line.published) for line in lines)],
    ]
    return f"{_wrap(_caption(lines))}\n\n{_table(table)}"


def _peer_cell(on: OnGpu, attribute: str) -> str:
    row = getattr(on, attribute)
    return wrong(on.refused[attribute]) if attribute in on.refused else thousands(row and row.tokens_per_s)


def _caption(lines: Sequence[Line]) -> str:
    text = (
        f"Training ST-DiT-2 on videos of {FRAMES} frames. The limits are counted operations and bytes at the "
        "datasheets' rates; nothing reaches them. The published figures include VAE and T5, ours do not."
    )
    everywhere = [on for line in lines for on in line.measured]
    commits = {on.gpu: set() for on in everywhere if on.ours}
    for on in everywhere:
        if on.ours and on.ours.environment:
            commits[on.gpu].add(on.ours.environment.commit[:9])
    found = "; ".join(f"{gpu} at {', '.join(sorted(names))}" for gpu, names in commits.items())
    text += f" Measured: {found}." if found else " **No speed on a GPU has been measured yet.**"
    again = [
        f"{line.resolution} on one {on.gpu} ({shares})"
        for line in lines
        for on in line.measured
        if (shares := _recomputed(on.ours, on.compiled))
    ]
    if again:
        text += f" Blocks recompute what does not fit: {'; '.join(again)}."
    text += _recomputed_by_open_sora(lines)
    shipped = [on.as_shipped for on in everywhere if on.as_shipped]
    if shipped:
        names = {row.provider for row in shipped}
        whose = "in our writing" if AS_SHIPPED[0] not in names else "its own code"
        whose = f"{whose}, or our writing where that is faster" if len(names) > 1 else whose
        text += (
            f" As shipped ({whose}): plain attention, as v1.1.0's configurations give flash attention a name that its "
            "model no longer knows. The published figures are older than that change, and so had flash attention on."
        )
    lacking = [gpu for gpu in commits if not any(on.with_flash for on in everywhere if on.gpu == gpu)]
    if shipped and lacking:
        text += f" **Open-Sora with flash attention has not been measured on one {' or '.join(lacking)} yet.**"
    return text


def _recomputed_by_open_sora(lines: Sequence[Line]) -> str:
    """Which of Open-Sora's rows recompute all blocks whether they must or not, "" for none."""
    rows = [
        (line.resolution, VARIANT_OF[row.provider].recompute)
        for line in lines
        for on in line.measured
        for row in (on.with_flash, on.as_shipped)
        if row
    ]
    again = dict.fromkeys(resolution for resolution, share in rows if share)
    kept = dict.fromkeys(resolution for resolution, share in rows if not share)
    if not again:
        return ""
    text = " Open-Sora's rows recompute all blocks, as its stages 2 and 3 do"
    return f"{text}; with flash attention none at {', '.join(kept)}, as in its stage 1." if kept else f"{text}."


def _recomputed(*rows: Row | None) -> str:
    """Whose blocks recompute, and how many of them: "ours half, compile three quarters"."""
    known = [(row.provider.partition("-")[0], VARIANT_OF.get(row.provider)) for row in rows if row]
    return ", ".join(f"{name} {SHARES[variant.recompute]}" for name, variant in known if variant and variant.recompute)


def _cpu_text(results: Results) -> str:
    """What rows of a CPU can show: that results are right."""
    works = [work for work in results.works("op") if work.measured]
    lines = []
    for op in dict.fromkeys(work.first.op for work in works):
        rows = [row for work in works if work.first.op == op for row in work.measured if row.error_limit > 0]
        worst = max(rows, key=lambda row: row.error / row.error_limit)
        lines.append(
            [
                f"`{op}`",
                str(len(rows)),
                worst.workload,
                worst.provider,
                f"{worst.error:.1e}",
                f"{worst.error_limit:.1e}",
            ]
        )
    environment = results.latest[0].environment
    assert environment is not None
    unmeasured = (
        ""
        if any(is_ours(row) for work in works for row in work.measured)
        else (" (this project's kernels are timed on GPUs only; `tests/kernels` holds them to the same limits)")
    )
    caption = (
        f"On a CPU ({results.device_name}, torch {environment.torch}, commit {environment.commit[:9]}) the suite shows "
        f"that results are right{unmeasured}; its times say nothing about a GPU. Of each op the row nearest to its "
        "limit:"
    )
    text = f"{_wrap(caption)}\n\n{_table([['op', 'rows', 'worst at', 'provider', 'error', 'may be'], *lines])}"
    trained = [work for work in results.works("convergence") if work.first.direction == AGAINST_ROUNDING]
    return "\n\n".join([text, *(_wrap(_convergence_text(work)) for work in trained if work.measured)])


def _convergence_text(work: Work) -> str:
    row = work.measured[0]
    return (
        f"Trained with the kernels and with the reference ({row.workload}, {row.dtype}; {row.checked_on}), the loss "
        f"curves are {row.error:.1e} apart, relative; rounding alone may part them by {row.error_limit:.1e}."
    )


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    aligned = ["---"] + ["--:" if column[:1].isdigit() else "---" for column in head[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, aligned, *body))


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
