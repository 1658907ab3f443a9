"""Made-up rows of every planned case of a GPU, for tests of the report. No run produced these numbers."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache

from bench_toys import ENVIRONMENT

from opensora_fast.benchmarks.rows import Row
from opensora_fast.benchmarks.suites import list_cases

RATE, BANDWIDTH, CHANNELS = 8e14, 4.3e12, 1152  # FLOP/s and bytes/s
# Share of the floor that a provider reaches.
SHARES = {
    "upstream": 0.2,
    "upstream-flash": 0.3,
    "upstream-flash-stored": 0.35,
    "eager": 0.38,
    "compile": 0.5,
    "ours-norms": 0.48,
    "ours-norms-gelu": 0.52,
    "ours-norms-gelu-temporal": 0.58,
    "ours-norms-gelu-temporal-spatial": 0.65,
    "ours": 0.68,
    "cublas": 0.85,
    "torch-cuda": 1.0,
    "sdpa-math": 0.08,
    "flash-attn-4": 0.6,
}
ABSENT = {"flash-attn-2": "flash-attn is not installed", "xformers": "xformers is not installed"}


@cache
def gpu_like_rows() -> tuple[Row, ...]:
    """A row for each planned one of suite "all": most with a time, some failed or unavailable."""
    draw = random.Random(0)
    planned = [row for case in list_cases("all", "cuda") for row in case.planned_rows().values()]
    return tuple(_fill(row, draw) for row in planned)


def _fill(row: Row, draw: random.Random) -> Row:
    row = replace(row, environment=ENVIRONMENT, provider_version="2.11.0")
    if row.provider in ABSENT:
        return row.without_time("unavailable", ABSENT[row.provider])
    if row.level == "step" and row.provider == "eager" and row.workload == "720p×16":
        return row.without_time("failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 GiB")
    flops, moved = _count(row)
    together = row.level in ("block", "step", "sampling")
    floor = flops / RATE + moved / BANDWIDTH if together else max(flops / RATE, moved / BANDWIDTH)
    share = SHARES.get(row.provider, 0.45) * draw.uniform(0.92, 1.08)
    p50 = 1e3 * floor / share if floor else draw.uniform(0.002, 200)
    limit = 4e-3
    return replace(
        row,
        status="ok",
        reason="",
        samples=30,
        p20_ms=0.99 * p50,
        p50_ms=p50,
        p80_ms=1.02 * p50,
        memory_bytes=int(row.tokens * draw.uniform(1.5e6, 3e6)) if row.level in ("step", "sampling") else 2**20,
        flops=flops,
        bytes=moved,
        roofline_share=share if floor else float("nan"),
        error=limit * draw.uniform(0.2, 0.8),
        error_limit=limit,
        sm_clock_mhz="1980",
    )


def _count(row: Row) -> tuple[float, float]:
    sizes = {name: int(number) for name, number in re.findall(r"\b([A-Za-z]+)=(\d+)", row.shape)}
    if row.level == "copy":
        return 0.0, 2.0 * 4 * 2**30
    if row.level == "gemm":
        # All products of a block are 3 · 18 of C × C.
        n, k, o = (
            (sizes["N"], sizes["K"], sizes["O"]) if row.op != "block" else (sizes["N"], sizes["C"], 54 * sizes["C"])
        )
        return 2.0 * n * k * o, 2.0 * (n * k + k * o + n * o)
    if row.level in ("step", "sampling", "block"):
        part = {"step": 3.0, "sampling": 1.0, "block": 1 / 28 if row.direction == "forward" else 3 / 28}[row.level]
        return part * row.tokens * 1.42e9, part * row.tokens * 0.77e6
    if row.level != "op":
        return 0.0, 0.0
    if row.op == "adamw":
        return 0.0, 38.0 * sizes["P"]
    back = row.direction != "forward"
    moved = row.tokens * CHANNELS * 2.0 * (12 if back else 4)
    if not row.op.endswith("_attention"):
        return 0.0, moved
    name = {"spatial_attention": "S", "temporal_attention": "T", "cross_attention": "L"}[row.op]
    return row.tokens * 4.0 * CHANNELS * sizes.get(name, sizes.get("length", 100)) * (3.5 if back else 1), moved
