"""The main job, small, on any machine: real clips, buckets, training, samples, a report."""

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

TEXT = "A big gray cartoon rabbit stretches its arms on a bright green meadow in front of its burrow"
IMAGE_TEXT = "A man walks past an old bicycle that leans on a gray wall in a cobbled street"
PROFILED_KINDS = ("spatial", "temporal", "cross")
# Without those that a compiler prepares anew for each length: on a GPU that takes longer than all the rest.
PROFILED_PROVIDERS = "upstream,eager,ours"


def command(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")],
    steps: Annotated[int, typer.Option(min=30, help="Training steps.")] = 500,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
) -> None:
    """The main job, small, on any machine: real clips, buckets, training, samples, a report.

    Runs the commands that a person would, one after another, and prints each. In the end DIR/report.html shows it all.
    """
    from opensora_fast.device import choose_device

    started = time.monotonic()
    device = choose_device(device).type  # one that is not here is told before anything is made
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder, or remove this one")
    clips, table, run_folder, samples = out / "clips", out / "clips.csv", out / "train", out / "samples"
    on_device = ["--device", device]

    _run("data", "demo", "--out", clips)
    _run("data", "probe", clips, "--out", table)
    _run("data", "validate", table)
    _run("buckets", "explain", table, "--config", "demo")
    _run("train", "demo", "--data-path", table, "--out", run_folder, "--steps", steps, *on_device)
    sample = [
        "sample",
        "demo_sample",
        f"vae.from_pretrained={run_folder / 'encoders' / 'vae'}",
        "--ckpt-path",
        run_folder,
    ]
    _run(*sample, "--prompt", TEXT, "--save-dir", samples, "--sample-name", "text", *on_device)
    _run(
        *sample, "--prompt", IMAGE_TEXT, "--reference-path", clips / "bicycle.png", "--mask-strategy", "0",
        "--save-dir", samples, "--sample-name", "image", *on_device,
    )  # fmt: skip
    for kind in PROFILED_KINDS:
        _run(
            "profile", "attention", "--kind", kind, "--providers", PROFILED_PROVIDERS, "--budget", 4,
            "--out", out / "profile", *on_device,
        )  # fmt: skip

    from opensora_fast.benchmarks.rows import read_rows
    from opensora_fast.cli._demo_report import mean_loss, write_demo_report
    from opensora_fast.train.monitoring.metrics import read_metrics

    metrics = read_metrics(run_folder / "metrics.jsonl")
    report = out / "report.html"
    write_demo_report(
        report,
        explanation=_explain(table),
        metrics=metrics,
        real_clips=[clips / "rabbit_half_size.mp4", clips / "bicycle_at_wall.mp4"],
        samples=[
            (samples / "text_0.mp4", f"text: {TEXT}"),
            (samples / "image_0.mp4", f"first frame given: {IMAGE_TEXT}"),
        ],
        profiles={kind: read_rows(out / "profile" / f"attention_{kind}.csv") for kind in PROFILED_KINDS},
        device=device,
        minutes=(time.monotonic() - started) / 60,
    )
    tenth = max(len(metrics) // 10, 1)
    first, last = mean_loss(metrics[:tenth]), mean_loss(metrics[-tenth:])
    print(json.dumps({"loss_first": round(first, 4), "loss_last": round(last, 4), "report": str(report)}))
    if not last < first:
        raise ValueError(
            f"the loss did not fall: {first:.4f} at first, {last:.4f} at last; see {run_folder}/metrics.jsonl"
        )
    print(f"open {report}")


def _run(*words: object) -> None:
    """Runs one opensora-fast command in this process, as a person would type it."""
    from opensora_fast.cli import run

    arguments = [str(word) for word in words]
    print(f"\n$ opensora-fast {shlex.join(arguments)}", flush=True)
    code = run(arguments)
    if code != 0:
        raise ValueError(f"the step above failed (exit code {code}): opensora-fast {shlex.join(arguments)}")


def _explain(table: Path):
    from opensora_fast.config import load_train_config
    from opensora_fast.train.inputs.data import read_data
    from opensora_fast.train.locate_config import locate_config

    config = load_train_config(locate_config(Path("demo")), options={"dataset.data_path": str(table)}).config
    return read_data(config).explanation
