"""Predicts the time of every kernel on a GPU from its machine code, without running it.

    python -m opensora_fast.benchmarks.predictions.kernels [--gpu H100] [--builds rows.json]

writes `benchmarks/predictions/h100.csv`; without --gpu that of an H200. `rows.json` is what `opensora-fast kernels
compile --arch sm_90 --json` prints; without it the kernels are built here.
Every number written is a PREDICTION, none was measured.

For each launch five times are counted, each as if the launch needed nothing else: issue (slots of all instructions),
mufu (exponentials), matrix (multiply-adds, padding included), dram (bytes that must move) and l2 (bytes that the
programs of an attention kernel stream, each for itself). The limiter is the longest. A kernel cannot be faster:
`floor_us`. What waits for other work of the same program is hidden by the other programs of a multiprocessor only, so

    predicted_us = floor + (matrix + max(issue, mufu) - the larger of the two) / programs

which is a hypothesis to be held against measured rows: `benchmarks/LOG.md` says how it fared. Of the instructions
outside the loop the shortest way through the kernel is counted. Tails of waves and of launches are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_fast.kernels.attention.cross_backward import CHUNK_SUMS
from opensora_fast.kernels.attention.cross_tiles import chunk_length
from opensora_fast.kernels.attention.spatial_forward import LONGEST_MEDIUM_FRAME, LONGEST_SMALL_FRAME, is_prepared
from opensora_fast.kernels.attention.temporal_backward import tiles_of_a_program
from opensora_fast.kernels.attention.tiles import row_width
from opensora_fast.kernels.compilation import compile_kernels
from opensora_fast.kernels.layout import PLACE_TILE_ROWS

from ..shapes import VIDEO_SIZES, Workload, fill

TOKENS, FRAMES, TEXT = 50_000, 16, 120  # tokens of a launch, frames of a video, text tokens of a video
HEADS, HEAD_SIZE = 16, 72
HIDDEN, MLP = HEADS * HEAD_SIZE, 4 * HEADS * HEAD_SIZE


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU, `name` as in `costs/hardware.py`; `sources` says where they are from.

    Attributes:
        clock: Hz of the multiprocessors under load.
        mufu: special functions a clock and multiprocessor.
        matrix: bf16 FLOP/s of the whole GPU, measured on large products.
        dram, l2: bytes/s.
    """

    name: str
    multiprocessors: int
    clock: float
    mufu: int
    matrix: float
    dram: float
    l2: float
    sources: str


SOURCES = "matrix and dram: measured elsewhere; mufu: CUDA programming guide, 9.0; clock and l2: assumed"
H200 = Machine("H200", 132, clock=1.755e9, mufu=16, matrix=790e12, dram=4.3e12, l2=5.5e12, sources=SOURCES)
H100 = Machine("H100", 132, clock=1.755e9, mufu=16, matrix=798e12, dram=3.0e12, l2=5.5e12, sources=SOURCES)
MACHINES = {machine.name: machine for machine in (H200, H100)}


def path_of(machine: Machine) -> Path:
    """The file of its kernels' predictions."""
    return Path(__file__).with_name(f"{machine.name.lower()}.csv")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on a workload.

    Attributes:
        kernel, note: which build.
        programs: of the launch.
        loops: iterations of the hot loop in one program (1 for a kernel without one); a step over fewer rows counts
            as its share.
        dram_bytes: that must move between memory and the GPU.
        l2_bytes: that all programs together read from the L2 cache in their loops.
        useful_flops: of attention, at head size 72.
    """

    kernel: str
    note: str
    programs: float
    loops: float
    dram_bytes: float
    l2_bytes: float = 0.0
    useful_flops: float = 0.0


def config_of(build: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in (part.split("=") for part in build["config"].split())}


def steps(length: int, config: dict[str, int]) -> float:
    """Iterations over `length` rows: whole steps, and the rest in shares of one."""
    whole, rest = divmod(length, config["STEP"])
    return whole + -(-rest // config["REMAINDER"]) * config["REMAINDER"] / config["STEP"]


def launches(workload: Workload, builds: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Launch]:
    """Each kernel of one block once, forward and backward, but for matrix products and the small second reductions."""
    tokens, length = workload.tokens, workload.frame_tokens
    row = 2.0 * HIDDEN * tokens  # bytes of one row of all tokens
    pair = 2 * 2 * HEAD_SIZE  # bytes of a row of k and one of v, of a head

    size = "small" if length <= LONGEST_SMALL_FRAME else "medium" if length <= LONGEST_MEDIUM_FRAME else "large"
    note = f"QK-norm; {size} frames"
    scores = 1.0 * tokens * HEADS * length
    # Padded rows: keys and values, and in the backward pass queries and gradients.
    wide = row_width(HEAD_SIZE) / HEAD_SIZE if is_prepared(size) else 1.0
    if is_prepared(size):
        yield Launch("spatial_attention_preparation", "", tokens * HEADS / 64, 1, (2 + 2 * wide) * row)
    for kernel, rows, flops, streamed_row in (
        ("spatial_attention_forward", 2 + 2 * wide, 4, wide * pair),
        ("spatial_attention_queries_backward", 4 + 4 * wide if is_prepared(size) else 7, 5, wide * pair),
        ("spatial_attention_keys_backward", 3 + 4 * wide if is_prepared(size) else 6, 5, wide * pair),
    ):
        config = config_of(builds[kernel, note])
        programs = workload.batch * workload.frames * HEADS * -(-length // config["ROWS"])
        streamed = programs * length * streamed_row
        useful = flops * HEAD_SIZE * scores
        yield Launch(kernel, note, programs, steps(length, config), rows * row, streamed, useful)

    tile = next(rows for rows in PLACE_TILE_ROWS if FRAMES <= rows)
    scores = 1.0 * tokens * HEADS * FRAMES
    for kernel, loops, rows, flops in (
        ("temporal_attention_forward", 1, 4, 4),
        ("temporal_attention_backward", tiles_of_a_program(tile), 7, 10),
    ):
        programs = tokens * HEADS / (tile // FRAMES * FRAMES * loops)
        yield Launch(kernel, f"{tile} rows", programs, loops, rows * row, 0.0, flops * HEAD_SIZE * scores)

    scores = 1.0 * tokens * HEADS * TEXT
    video = workload.frames * length
    text_bytes = workload.batch * TEXT * HEADS * pair  # of keys and values
    videos = workload.batch, video
    note = "text of 1 tile"
    config = config_of(builds["cross_attention_forward", note])
    chunks = workload.batch * -(-video // chunk_length(videos, HEADS, H200.multiprocessors * config["programs"]))
    streamed = row + chunks * text_bytes / workload.batch
    loops = workload.batch * -(-video // config["ROWS"]) / chunks
    yield Launch("cross_attention_forward", note, chunks * HEADS, loops, 2 * row, streamed, 4 * HEAD_SIZE * scores)
    note = "first tile of text"
    config = config_of(builds["cross_attention_short_backward", note])
    chunks = workload.batch * -(-video // chunk_length(videos, HEADS, H200.multiprocessors, CHUNK_SUMS))
    streamed = 3 * row + chunks * text_bytes / workload.batch
    loops = workload.batch * -(-video // config["ROWS"]) / chunks
    moved = 4 * row + chunks * TEXT * 2 * HIDDEN * 4.0
    useful = 10 * HEAD_SIZE * scores
    yield Launch("cross_attention_short_backward", note, chunks * HEADS, loops, moved, streamed, useful)

    tile = 64  # about what the launcher chooses
    for kernel, parts, rows in (
        ("modulated_norm_forward", "norm", 2),
        ("gate_residual_forward", "branch gate bias", 3),
        ("gate_residual_modulated_norm_forward", "branch gate bias norm", 4),
        ("modulated_norm_backward", "norm", 3),
        ("gate_residual_backward", "branch gate bias", 3),
        ("gate_residual_modulated_norm_backward", "branch gate bias norm", 6),
    ):
        yield Launch(kernel, parts, tokens / tile, tile, rows * row)
    for kernel, element in (("gelu_tanh_forward", 4), ("gelu_tanh_backward", 6)):
        config = config_of(builds[kernel, "with bias"])
        program = config.get("TILE_TOKENS", config["BLOCK_TOKENS"])
        programs = tokens / program * MLP / config["BLOCK_COLUMNS"]
        yield Launch(kernel, "with bias", programs, program / config["BLOCK_TOKENS"], element * MLP * tokens)


def predict(launch: Launch, build: dict[str, Any], machine: Machine) -> dict[str, float | str]:
    """The times of a launch in µs, what limits it, and what that makes of its useful work."""
    warps = build["num_warps"]
    loop = build["loop"]
    looped, once = launch.programs * launch.loops, launch.programs * bool(build["in_loop"])
    slots = (looped * sum(loop.values()) + once * build["outside"]) * warps
    functions = looped * loop["mufu"] * warps * 32
    products = looped * build["loop_products"] * warps
    clocks = machine.multiprocessors * machine.clock
    times = {
        "issue": slots / 4 / clocks,
        "mufu": functions / machine.mufu / clocks,
        "matrix": 2 * products / machine.matrix,
        "dram": launch.dram_bytes / machine.dram,
        "l2": launch.l2_bytes / machine.l2,
    }
    limiter = max(times, key=lambda name: times[name])
    floor = times[limiter]
    exposed = min(times["matrix"], max(times["issue"], times["mufu"])) / build["programs"]
    predicted = floor + exposed
    return {
        **{f"{name}_us": round(1e6 * seconds, 2) for name, seconds in times.items()},
        "limiter": limiter,
        "floor_us": round(1e6 * floor, 2),
        "predicted_us": round(1e6 * predicted, 2),
        "predicted_tflops": round(launch.useful_flops / predicted / 1e12, 1) if launch.useful_flops else "",
        "predicted_share_of_copy": round(times["dram"] / predicted, 3),
    }


def predict_all(rows: list[dict[str, Any]], machine: Machine = H200) -> list[dict[str, Any]]:
    """One row for each launch of a block at each of the video resolutions, from the rows of `compile_kernels`.

    Raises:
        ValueError: `rows` lacks a build that the model needs.
    """
    wanted = (row for row in rows if (row.get("arch"), row.get("dtype")) == ("sm_90", "bf16"))
    builds = {(row["kernel"], row["note"]): row for row in wanted}
    predictions = []
    for resolution in VIDEO_SIZES:
        workload = fill(resolution, FRAMES, TOKENS)
        try:
            for launch in launches(workload, builds):
                build = builds[launch.kernel, launch.note]
                predictions.append(
                    {
                        "kind": "prediction",
                        "machine": f"NVIDIA {machine.name}",
                        "workload": workload.name,
                        "tokens": workload.tokens,
                        "frame_tokens": workload.frame_tokens,
                        "kernel": launch.kernel,
                        "note": launch.note,
                        "config": build["config"],
                        "registers": build["registers"],
                        "resident_programs": build["programs"],
                        "resident_warps": build["warps"],
                        "slots": "" if build["slots"] is None else round(build["slots"], 2),
                        "unit": build["unit"],
                        **predict(launch, build, machine),
                    }
                )
        except KeyError as error:
            raise ValueError(f"the rows have no bf16 build of {error} for sm_90") from error
    return predictions


def write_predictions(predictions: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(predictions[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(predictions)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Predict the time of every kernel on a GPU from its machine code.")
    parser.add_argument("--gpu", choices=list(MACHINES), default=H200.name, help="whose rates; default: %(default)s")
    parser.add_argument("--builds", type=Path, help="rows of `kernels compile --json`; default: build for sm_90")
    arguments = parser.parse_args(words)
    machine = MACHINES[arguments.gpu]
    path = path_of(machine)
    try:
        if arguments.builds:
            rows = json.loads(arguments.builds.read_text(encoding="utf-8"))
        else:
            rows = list(compile_kernels(["sm_90"])[1])
        predictions = predict_all(rows, machine)
    except (OSError, ValueError) as error:
        parser.error(f"{error}; --builds takes a file of what `kernels compile --arch sm_90 --json` prints")
    write_predictions(predictions, path)
    print(f"Predictions for {machine.name}, not measurements ({machine.sources}); ns for each token, limiter:")
    for workload in dict.fromkeys(row["workload"] for row in predictions):
        of_workload = [row for row in predictions if row["workload"] == workload]
        total = 1000 * sum(row["predicted_us"] for row in of_workload) / of_workload[0]["tokens"]
        print(f"{workload}: {total:.1f} ns for each token, every launch once")
        for row in of_workload:
            figure = f"{row['predicted_tflops']} TFLOP/s" if row["predicted_tflops"] else ""
            share = f"{100 * row['predicted_share_of_copy']:.0f} % of copy"
            time = 1000 * row["predicted_us"] / row["tokens"]
            print(f"  {row['kernel']:<40} {time:6.2f} ns  {row['limiter']:<7}{share:<15} {figure}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
