"""Measured steps of a results folder, as the cost model takes them. The rows are made from known numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_toys import ENVIRONMENT
from gpu_like_rows import gpu_like_rows

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.report.step_rows import find_committed_rows, read_step_rows
from opensora_fast.benchmarks.rows import Row, append_rows
from opensora_fast.benchmarks.suites import list_cases
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.memory import MemoryModel, ModelSize
from opensora_fast.costs.operations import Count, VideoBatch, count_optimizer, count_recomputation
from opensora_fast.costs.operations import count_training_step as count_step
from opensora_fast.costs.step_time import StepTime, fit_step_time

H200 = DATASHEETS["H200"]
XL = STDiT2Config.xl_2()
SIZE = ModelSize(767_500_000, 767_500_000, 27_000_000)
TRUTH = StepTime(H200, matrix=1.5, bandwidth=1.25, constant=0.006)
MEMORY = MemoryModel(XL, SIZE, text=120)


def parse(shape: str) -> list[VideoBatch]:
    parts = [part.split() for part in shape.split(" L=")[0].split(" + ")]
    return [VideoBatch(*(int(word.partition("=")[2]) for word in part[:3])) for part in parts]


def measure(row: Row, factor: float = 1.1) -> Row:
    """A row of a planned step as a GPU of known rates would give it."""
    videos = parse(row.shape)
    useful = sum((count_step(XL, part, 120, 0.0) for part in videos), count_optimizer(SIZE.trained))
    done, recomputed = useful, 0
    if row.provider != "ours":
        recomputed = {"ours-recompute-half": 14, "ours-recompute": 28}[row.provider]
        done = sum((count_recomputation(XL, part, 120, recomputed) for part in videos), useful)
    peak = MEMORY.standing + factor * MEMORY.activations(videos[0], recomputed)
    return replace(
        row,
        status="ok",
        reason="",
        p50_ms=1e3 * TRUTH.seconds(done),
        flops=useful.flops,
        bytes=useful.bytes,
        memory_bytes=int(peak),
        error=0.0,
        error_limit=1.0,
        environment=replace(ENVIRONMENT, device_name="nvidia-h200"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All planned steps of a GPU by ours, and rows that are none of them."""
    folder = tmp_path_factory.mktemp("rows")
    planned = [row for case in list_cases("step", "cuda") for row in case.planned_rows().values()]
    rows = [measure(row) for row in planned if row.provider in ("ours", "ours-recompute") and not row.op]
    assert len(rows) > 20 and len({row.provider for row in rows}) == 2
    rows += [
        measure(replace(row, provider="ours-recompute-half")) for row in planned if row.provider == "ours-recompute"
    ]
    others = [row for row in gpu_like_rows() if not row.provider.startswith("ours") and row.level == "step"]
    rows += [replace(row, environment=replace(row.environment, device_name="nvidia-h200")) for row in others]
    failed = replace(rows[0], shape=rows[0].shape.replace("B=", "B=9")).without_time("failed", "OutOfMemoryError")
    append_rows(folder / "step.csv", [*rows, failed])
    return folder


def test_the_fit_finds_the_rates_behind_the_rows(folder):
    """Rows round to six digits. Those that recompute are among them, with what they did twice."""
    measured = read_step_rows(folder, XL, "bfloat16")
    assert measured.gpu is H200
    assert {step.recomputed for step in measured.rows} == {0, 14, 28}
    time = fit_step_time(measured.gpu, measured.list_steps(XL, element=2))
    assert (time.matrix, time.bandwidth) == pytest.approx((TRUTH.matrix, TRUTH.bandwidth), rel=0.01)
    assert time.constant == pytest.approx(TRUTH.constant, abs=2e-4)
    assert time.rows == len(measured.rows) and time.worst_residual < 1e-4


def test_measured_memory_is_compared_with_the_count(folder):
    ratios = read_step_rows(folder, XL, "bfloat16").compare_memory(MEMORY)
    assert len(ratios) > 15
    assert ratios == pytest.approx([1.1] * len(ratios), rel=1e-3)


def test_rows_of_another_model_or_dtype_are_left_out(folder):
    assert read_step_rows(folder, XL, "float32").rows == ()
    assert read_step_rows(folder, STDiT2Config.small(), "bfloat16").rows == ()


def test_rows_of_a_cpu_are_refused():
    with pytest.raises(ValueError, match="rows of cpu-x86_64, whose rates are not known"):
        read_step_rows(Path(__file__).parents[3] / "benchmarks/results/cpu-x86_64", XL, "bfloat16")


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no benchmark rows"):
        read_step_rows(tmp_path, XL, "bfloat16")


def test_committed_rows_are_found_by_the_name_of_their_folder(tmp_path, monkeypatch):
    (tmp_path / "results" / "nvidia-h100-80gb-hbm3").mkdir(parents=True)
    (tmp_path / "results" / "cpu-x86_64").mkdir()
    monkeypatch.setattr("opensora_fast.benchmarks.report.step_rows.files", lambda package: tmp_path)
    assert find_committed_rows(DATASHEETS["H100"]) == tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    assert find_committed_rows(H200) is None
    # The same chip, until it has rows of its own.
    assert find_committed_rows(DATASHEETS["H800"]) == tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    (tmp_path / "results" / "nvidia-h800").mkdir()
    assert find_committed_rows(DATASHEETS["H800"]) == tmp_path / "results" / "nvidia-h800"


def test_counts_are_those_of_the_rows(folder):
    measured = read_step_rows(folder, XL, "bfloat16")
    step = next(step for step in measured.rows if not step.recomputed)
    (first, *_) = [one for one in measured.list_steps(XL, 2) if one.name == step.row.name]
    assert first.count == Count(step.row.flops, step.row.bytes)
