"""The page that the demo writes: what went in, how it was sorted, how training went, what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from opensora_fast.benchmarks.profiles.attention import plot_attention
from opensora_fast.benchmarks.rows import Row
from opensora_fast.data.buckets.explain import Explanation
from opensora_fast.data.video_files import make_contact_sheet, read_reference
from opensora_fast.html_report import HtmlReport

# Steps that the smoothed loss averages over.
SMOOTHING = 15
# Height and width, and frames, of the clips on the contact sheet.
SHOWN_SIZE = (144, 256)
SHOWN_FRAMES = 16


def write_demo_report(
    path: Path,
    explanation: Explanation,
    metrics: Sequence[dict],
    real_clips: Sequence[Path],
    samples: Sequence[tuple[Path, str]],
    profiles: dict[str, Sequence[Row]],
    device: str,
    minutes: float,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        explanation: of the buckets.
        metrics: one row per training step.
        real_clips: videos to show beside the samples.
        samples: (file, caption) of each sample.
        profiles: kind of attention → measured rows.
        device: "cpu" or "cuda", on which all was run.
        minutes: the demo has taken so far.
    """
    first, last = mean_loss(metrics[:SMOOTHING]), mean_loss(metrics[-SMOOTHING:])
    report = HtmlReport(
        "opensora_fast demo",
        "Real clips in, a small ST-DiT-2 trained on them, samples out. The model is tiny and trained for seconds: the "
        "samples show that every part works, not what the full model can do.",
    )
    report.section("In short")
    report.numbers(
        [
            ("clips and images", str(explanation.clips)),
            ("training steps", str(len(metrics))),
            (f"loss, mean of the first {SMOOTHING} steps", f"{first:.3f}"),
            (f"loss, mean of the last {SMOOTHING} steps", f"{last:.3f}"),
            ("tokens trained on", f"{sum(row['tokens'] for row in metrics):,}"),
            ("minutes", f"{minutes:.1f}"),
        ]
    )
    report.section(
        "Training", "Every point is one step on one bucket; buckets and noise levels differ, so points scatter."
    )
    report.figure(plot_loss(metrics), f"Loss of each step and its mean over {SMOOTHING} steps.")
    report.section("Samples beside real clips", "Real clips first, then what the model made of a text and of an image.")
    shown = [(file, f"real: {file.name}") for file in real_clips] + list(samples)
    sheet = make_contact_sheet(
        [read_reference(file, SHOWN_SIZE)[:, :SHOWN_FRAMES] for file, _ in shown], [text for _, text in shown]
    )
    report.pictures([(sheet, "Frames over time, from left to right.")])
    report.clips([(file, caption) for file, caption in samples if file.suffix == ".mp4"])
    report.section(
        "Buckets",
        f"{explanation.used_clips} of {explanation.clips} clips are used; a micro-batch holds clips of one bucket.",
    )
    report.table(
        ["bucket", "size", "clips", "batch size", "micro-batches", "tokens of a micro-batch"],
        [
            [line.name, f"{line.height} × {line.width}", line.clips, line.batch_size, line.micro_batches, line.tokens]
            for line in explanation.buckets
        ],
        filtered=True,
    )
    for reason, count in explanation.dropped.items():
        report.paragraph(f"Left out: {count}, {reason}.")
    measured = "CPU, with small sizes; they say nothing about a GPU" if device == "cpu" else "GPU, in a few seconds"
    report.section("Attention over length", f"Milliseconds, measured just now on this machine's {measured}.")
    for kind, rows in profiles.items():
        report.figure(plot_attention(rows, kind), f"{kind} attention, forward alone and with backward")
    report.write(path)


def mean_loss(metrics: Sequence[dict]) -> float:
    return sum(row["loss"] for row in metrics) / len(metrics)


def plot_loss(metrics: Sequence[dict]) -> Figure:
    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    smooth = [mean_loss(metrics[max(0, index - SMOOTHING + 1) : index + 1]) for index in range(len(metrics))]
    figure = Figure(figsize=(9, 3.4), layout="tight")
    axis = figure.subplots()
    axis.plot(steps, losses, ".", markersize=3, alpha=0.4, label="step")
    axis.plot(steps, smooth, linewidth=2, label=f"mean of {SMOOTHING}")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
