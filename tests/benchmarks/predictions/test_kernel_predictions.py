"""Predicted times from counts: the arithmetic by hand, and what the committed file says of itself."""

import csv
import re
from dataclasses import replace

import pytest

from opensora_fast.benchmarks.predictions.kernels import (
    H200,
    MACHINES,
    Launch,
    main,
    path_of,
    predict,
    predict_all,
    steps,
)
from opensora_fast.benchmarks.shapes import VIDEO_SIZES

# One multiprocessor of 1 GHz and round rates.
TOY = replace(H200, multiprocessors=1, clock=1e9, mufu=16, matrix=2e12, dram=1e9, l2=1e9)
BUILD = {
    "num_warps": 4,
    "programs": 2,
    "in_loop": True,
    "outside": 100,
    "loop": {"mufu": 10, "float": 90},
    "loop_products": 25_000,
}


def test_times_are_counts_over_rates() -> None:
    predicted = predict(Launch("a", "", programs=10, loops=3, dram_bytes=500, l2_bytes=250), BUILD, TOY)
    assert predicted["issue_us"] == 10 * (3 * 100 + 100) * 4 / 4 / 1000
    assert predicted["mufu_us"] == 10 * 3 * 10 * 4 * 32 / 16 / 1000
    assert predicted["matrix_us"] == 10 * 3 * 25_000 * 4 * 2 / 2e6
    assert (predicted["dram_us"], predicted["l2_us"]) == (0.5, 0.25)
    assert (predicted["limiter"], predicted["floor_us"]) == ("issue", 4.0)
    assert predicted["predicted_us"] == 4.0 + 3.0 / 2  # the other program hides half of the matrix products
    assert predicted["predicted_tflops"] == ""


def test_the_longest_time_limits() -> None:
    predicted = predict(Launch("a", "", 10, 3, dram_bytes=9e3, useful_flops=1.05e7), BUILD, TOY)
    assert (predicted["limiter"], predicted["floor_us"], predicted["predicted_us"]) == ("dram", 9.0, 10.5)
    assert predicted["predicted_share_of_copy"] == round(9 / 10.5, 3)
    assert predicted["predicted_tflops"] == 1.0
    predicted = predict(Launch("a", "", 10, 3, dram_bytes=0), BUILD | {"in_loop": False}, TOY)
    assert predicted["issue_us"] == 3.0  # without a loop there is nothing outside of it


@pytest.mark.parametrize(("length", "iterations"), [(128, 2), (144, 2.25), (129, 2.25), (10, 0.25)])
def test_a_shorter_step_counts_as_its_share(length, iterations) -> None:
    assert steps(length, {"STEP": 64, "REMAINDER": 16}) == iterations


def test_a_missing_build_is_named() -> None:
    with pytest.raises(ValueError, match="no bf16 build of .*spatial_attention_forward"):
        predict_all([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("no JSON", "Expecting value"),
        ("[{}]", "no bf16 build of .*spatial_attention_forward"),
    ],
)
def test_builds_that_cannot_be_used_are_one_message(tmp_path, capsys, content, message) -> None:
    path = tmp_path / "builds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["--builds", str(path)])
    assert re.search(f"error: .*{message}.*; --builds takes a file of what", capsys.readouterr().err)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_the_committed_files_say_that_they_predict(machine) -> None:
    with path_of(machine).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"prediction"}
    assert {row["workload"] for row in rows} == {f"{name}×16" for name in VIDEO_SIZES}
    assert all(float(row["predicted_us"]) >= float(row["floor_us"]) > 0 for row in rows)
    times = ("issue", "mufu", "matrix", "dram", "l2")
    assert all(float(row[f"{row['limiter']}_us"]) == max(float(row[f"{name}_us"]) for name in times) for row in rows)
    assert {row["machine"] for row in rows} == {f"NVIDIA {machine.name}"}
    for row in rows:
        if row["kernel"] == "modulated_norm_forward":  # reads a row of 1152 bf16 numbers and writes one
            assert float(row["dram_us"]) == pytest.approx(1e6 * 2 * 2304 * int(row["tokens"]) / machine.dram, rel=1e-3)
