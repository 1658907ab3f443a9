"""Whether training with the kernels converges as training with the reference does.

A small ST-DiT-2 is trained on the demo's clips, by `opensora_fast.train` itself, with three seeds and three providers:

- eager: every op by its reference;
- eager-perturbed: the same, but each initial weight is changed by one eps of the dtype, relative, at random: what
  rounding alone does to a run;
- ours: every op by its Triton kernel. On the CPU they run under Triton's interpreter, in a process of its own.

All three see the same batches, noise and initial weights at equal seed. The distance of two runs is the largest
relative difference of their smoothed loss curves. The distance between ours and eager, the largest of the seeds, is
judged twice: it must be below the smallest distance between two seeds of eager, and below what rounding does. Seeds
differ by tens of per cent, so the first finds gross faults only; the second finds an op whose result is wrong by a few
thousandths or whose gradient is wrong by a few hundredths (`tests/benchmarks/jobs/test_convergence.py`).
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch

from opensora_fast.device import DTYPES
from opensora_fast.files import whole_file

from ..processes import end_with_parent

SEEDS = (42, 43, 44)
EAGER, PERTURBED = "eager", "eager-perturbed"
AGAINST_SEEDS, AGAINST_ROUNDING = "against seeds", "against rounding"
DIRECTIONS = (AGAINST_SEEDS, AGAINST_ROUNDING)
# As `measuring/accuracy.py` judges: so many times what eager errs by, and a few eps of the loss, which is float32.
ROUNDING_FACTOR, FLOOR = 3.0, 4 * torch.finfo(torch.float32).eps
FOLDER = "convergence"  # in the folder of results: the curves


@dataclass(frozen=True)
class Curve:
    """One run, step by step.

    Attributes:
        provider: who computed the ops.
        settings: what was trained; runs of other settings cannot be compared.
        commit: of the sources, "" where they differ from every commit.
    """

    provider: str
    seed: int
    settings: str
    commit: str
    loss: tuple[float, ...]
    tokens: tuple[int, ...]
    step_ms: tuple[float, ...]
    memory_bytes: int = 0

    @property
    def file_name(self) -> str:
        return f"{self.provider}-seed-{self.seed}.csv"


@dataclass(frozen=True)
class Job:
    """Runs that a process of its own makes, one after another.

    Attributes:
        runs: (provider, seed).
        overrides: of the demo's configuration.
        curves: folder for the curves.
        work: folder for clips, features and the runs themselves.
        table: of clips; "": those of the demo.
    """

    runs: list[tuple[str, int]]
    overrides: list[str]
    steps: int
    device: str
    curves: str
    work: str
    commit: str = ""
    table: str = ""

    @property
    def settings(self) -> str:
        return " ".join([f"steps={self.steps}", *self.overrides])


@dataclass(frozen=True)
class Verdict:
    """How far ours is from eager, and how far it may be: direction → relative distance of smoothed loss curves."""

    error: float
    limits: dict[str, float]


def judge(curves: Sequence[Curve], ours: str, window: int) -> Verdict:
    """Compares the runs of a provider with eager's.

    Args:
        curves: of eager, eager-perturbed and `ours`, each with the same seeds.
        ours: the provider.
        window: steps of the moving average.

    Raises:
        ValueError: a run is missing, or runs of different settings or lengths.
    """
    if len({(curve.settings, len(curve.loss)) for curve in curves}) != 1:
        raise ValueError("the runs have different settings or lengths: they cannot be compared")
    by_provider: dict[str, dict[int, Curve]] = {}
    for curve in curves:
        by_provider.setdefault(curve.provider, {})[curve.seed] = curve
    eager = by_provider.get(EAGER, {})
    for name in (PERTURBED, ours):
        if set(by_provider.get(name, {})) != set(eager) or len(eager) < 2:
            raise ValueError(f"{name} and {EAGER} need runs of the same seeds, two at least")

    def from_eager(provider: str) -> float:
        return max(distance(curve, eager[seed], window) for seed, curve in by_provider[provider].items())

    between_seeds = min(distance(*pair, window) for pair in combinations(eager.values(), 2))
    return Verdict(
        from_eager(ours),
        {AGAINST_SEEDS: between_seeds, AGAINST_ROUNDING: ROUNDING_FACTOR * from_eager(PERTURBED) + FLOOR},
    )


def distance(first: Curve, second: Curve, window: int) -> float:
    """Largest relative difference of two smoothed loss curves; infinite where a loss is not finite."""
    if not all(map(math.isfinite, first.loss + second.loss)):
        return math.inf
    pairs = zip(smooth(first.loss, window), smooth(second.loss, window), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of `window` values in a row."""
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


# ---- curves on the disk ----


def write_curve(curve: Curve, folder: Path) -> Path:
    """Writes a curve as CSV; it appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / curve.file_name
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        fixed = (curve.provider, curve.seed, curve.settings, curve.commit, curve.memory_bytes)
        for index, values in enumerate(zip(curve.loss, curve.tokens, curve.step_ms, strict=True)):
            loss, tokens, step_ms = values
            writer.writerow([index + 1, repr(loss), tokens, f"{step_ms:.6g}", *fixed])
    return path


_COLUMNS = ["step", "loss", "tokens", "step_ms", "provider", "seed", "settings", "commit", "memory_bytes"]


def read_curve(path: Path) -> Curve:
    """Reads a curve.

    Raises:
        ValueError: a file of another form, by name.
    """
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    try:
        first = records[0]
        return Curve(
            provider=first["provider"],
            seed=int(first["seed"]),
            settings=first["settings"],
            commit=first["commit"],
            loss=tuple(float(record["loss"]) for record in records),
            tokens=tuple(int(record["tokens"]) for record in records),
            step_ms=tuple(float(record["step_ms"]) for record in records),
            memory_bytes=int(first["memory_bytes"]),
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a loss curve: {error!r}") from error


def read_curves(results: Path) -> dict[str, list[Curve]]:
    """The curves of a folder of results: workload and dtype, as its sub-folders are called → curves."""
    found: dict[str, list[Curve]] = {}
    for path in sorted((results / FOLDER).glob("*/*.csv")):
        found.setdefault(path.parent.name, []).append(read_curve(path))
    return found


# ---- training ----


def run_job(job: Job) -> None:
    """Trains every run of a job and writes its curve as soon as it is there."""
    work = Path(job.work)
    table = Path(job.table) if job.table else make_demo_table(work)
    for provider, seed in job.runs:
        write_curve(train_once(job, provider, seed, table), Path(job.curves))


def make_demo_table(work: Path) -> Path:
    """Writes the demo's clips and their table."""
    from opensora_fast.data.demo_clips import write_demo_clips
    from opensora_fast.data.probe import probe_folder

    clips, table = work / "clips", work / "clips.csv"
    if not table.exists():
        write_demo_clips(clips)
        probe_folder(clips, table)
    return table


def train_once(job: Job, provider: str, seed: int, table: Path) -> Curve:
    """One run, as `opensora-fast train demo` makes it."""
    from opensora_fast.train.monitoring.metrics import read_metrics

    work = Path(job.work)
    out = work / f"{provider}-{seed}"
    weights = None
    if provider == PERTURBED:
        weights = perturb(_train(job, "reference", seed, table, work / f"initial-{seed}", steps=0))
    backend = "reference" if provider in (EAGER, PERTURBED) else "triton"
    on_gpu = job.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _train(job, backend, seed, table, out, job.steps, weights)
    _check_backend(out / "kernels.json", backend)
    rows = read_metrics(out / "metrics.jsonl")
    curve = Curve(
        provider=provider,
        seed=seed,
        settings=job.settings,
        commit=job.commit,
        loss=tuple(row["loss"] for row in rows),
        tokens=tuple(row["tokens"] for row in rows),
        step_ms=tuple(1e3 * (row["step_time"] - row["data_wait"]) for row in rows),
        memory_bytes=max(row["memory"] for row in rows) if on_gpu else 0,
    )
    for folder in (out, work / f"initial-{seed}"):
        shutil.rmtree(folder, ignore_errors=True)
    return curve


def _train(job: Job, backend: str, seed: int, table: Path, out: Path, steps: int, weights: Path | None = None) -> Path:
    """Trains into a new folder; returns it."""
    from opensora_fast.config import load_train_config
    from opensora_fast.train.locate_config import locate_config
    from opensora_fast.train.train import train

    shutil.rmtree(out, ignore_errors=True)  # of a job that was stopped
    # Clips are decoded and encoded once for all runs; no checkpoint but the last.
    overrides = [*job.overrides, f"features={Path(job.work) / 'features'}", "feature_draws=4", "ckpt_every=0"]
    options = {"dataset.data_path": str(table), "steps": steps, "seed": seed}
    loaded = load_train_config(locate_config("demo"), overrides, options)
    interpreted = backend == "triton" and job.device == "cpu"
    if interpreted:
        from .interpreter import interpret_quickly
    with interpret_quickly() if interpreted else nullcontext():
        stopped = train(
            loaded,
            out,
            device=job.device,
            backend=backend,
            init_from=None if weights is None else str(weights),
            report=lambda text: None,
        )
    if stopped is not None:
        raise KeyboardInterrupt
    return out


def perturb(run: Path) -> Path:
    """Changes each weight of a run's last checkpoint by one eps of the run's dtype, relative; returns the new model."""
    from opensora_fast.model import STDiT2

    (checkpoint,) = sorted((run / "checkpoints").iterdir())[-1:]
    eps = torch.finfo(DTYPES[json.loads((run / "config.json").read_text())["dtype"]]).eps
    model = STDiT2.from_pretrained(checkpoint / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + eps * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(run / "perturbed")
    return run / "perturbed"


def _check_backend(path: Path, backend: str) -> None:
    """The ops of the model must have been what the curve will be called after; the optimizer is never interpreted."""
    rows = json.loads(path.read_text())
    used: Mapping[str, str] = {row["op"]: row["backend"] for row in rows if row["op"] != "adamw"}
    others = [op for op, name in used.items() if name != backend]
    if others or not used:
        raise ValueError(f"a run with backend {backend!r} computed {', '.join(others) or 'no op'} otherwise")


def main() -> None:
    """Runs the job in the first argument; standard input has to stay open meanwhile."""
    end_with_parent()
    values = json.loads(sys.argv[1])
    values["runs"] = [tuple(run) for run in values["runs"]]
    try:
        run_job(Job(**values))
    except Exception as error:  # the process that started this one writes it into a row
        lines = str(error).strip().splitlines() or [""]
        (Path(values["work"]) / "error.txt").write_text(f"{type(error).__name__}: {lines[0][:300]}")
        raise


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
