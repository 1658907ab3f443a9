"""Rows as files: they come back as they were, say where they are from, and never mix devices."""

import csv
import math
import resource
import signal

import pytest
from bench_toys import make_row

from opensora_fast.benchmarks.rows import COLUMNS, LEVELS, append_rows, check_folder, level_path, read_folder, read_rows


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        make_row(),
        make_row(provider="flash-attn-3").without_time("unavailable", 'not installed, says "pip"'),
        make_row(
            provider="eager", roofline_share=0.5, checked_on="240p×2", sm_clock_mhz="1980", power_w="698", timed="graph"
        ),
    ]
    path = tmp_path / "a-new-device" / "op.csv"
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    found = read_rows(path)
    assert [row.key for row in found] == [row.key for row in rows]
    assert found[0].environment == rows[0].environment
    assert found[1].reason == rows[1].reason
    assert found[2].roofline_share == 0.5 and math.isnan(found[0].roofline_share)
    assert (found[2].checked_on, found[2].power_w) == ("240p×2", "698")
    assert [row.is_replayed for row in found] == [False, False, True]


def test_a_row_says_everything_a_reader_asks_for():
    asked = {
        "provider", "provider_version", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "memory_bytes", "error",
        "error_limit", "device_name", "driver", "torch", "triton", "commit", "dirty", "date", "roofline_share",
        "tflops_per_s", "gbytes_per_s", "tokens_per_s", "samples", "sm_clock_mhz", "power_w",
    }  # fmt: skip
    assert asked <= set(COLUMNS)


def test_speeds_are_worked_out_from_the_median(tmp_path):
    append_rows(tmp_path / "op.csv", [make_row(p50_ms=2.0, flops=4e9, bytes=6e9, tokens=1000)])
    with (tmp_path / "op.csv").open() as file:
        (record,) = csv.DictReader(file)
    assert float(record["tflops_per_s"]) == 2.0
    assert float(record["gbytes_per_s"]) == 3000.0
    assert float(record["tokens_per_s"]) == 500_000.0


@pytest.mark.parametrize("error", [0.1, math.nan, math.inf])
def test_a_wrong_result_cannot_become_a_row(error):
    with pytest.raises(ValueError, match="over its limit"):
        make_row(error=error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status 'fine'"),
        ({"status": "failed", "reason": ""}, "must give its reason"),
        ({"level": "galaxy"}, "level 'galaxy'"),
        ({"p50_ms": math.nan}, "p50_ms nan; a row with a time must have one"),
        ({"p50_ms": 0.0}, "p50_ms 0.0; a row with a time must have one"),
    ],
)
def test_broken_rows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_row(**changes)


def test_rows_of_another_device_go_elsewhere(tmp_path):
    append_rows(tmp_path / "op.csv", [make_row()])
    with pytest.raises(ValueError, match="holds rows of nvidia-h200; rows of cpu-x86_64 go elsewhere"):
        append_rows(tmp_path / "op.csv", [make_row(device_name="cpu-x86_64")])
    with pytest.raises(ValueError, match="holds rows of nvidia-h200"):
        check_folder(tmp_path, make_row(device_name="cpu-x86_64").environment)


def test_a_folder_holds_a_few_files_and_every_level(tmp_path):
    assert read_folder(tmp_path) == []
    for level in LEVELS:
        append_rows(level_path(tmp_path, level), [make_row(level=level)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["block.csv", "ceilings.csv", "convergence.csv", "data.csv", "op.csv", "sampling.csv", "step.csv"]
    assert sorted(row.level for row in read_folder(tmp_path)) == sorted(LEVELS)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "op.csv"
    append_rows(path, [make_row(), make_row()])
    path.write_text(path.read_text().replace(",ok,", ",fine,").replace(",fine,", ",ok,", 1))
    with pytest.raises(ValueError, match=r"op\.csv:3: not a benchmark row: .*status 'fine'"):
        read_rows(path)
    path.write_text("a,b\n1,2")
    with pytest.raises(ValueError, match="columns are not those of this version"):
        append_rows(path, [make_row()])
    assert path.read_text().splitlines() == ["a,b", "1,2"]


def test_a_reason_of_many_lines_leaves_no_half_of_its_row_where_that_is_cut_off(tmp_path):
    path, reason = tmp_path / "op.csv", "it cannot be imported:\nundefined symbol\n"
    append_rows(path, [make_row()])
    append_rows(path, [make_row().without_time("unavailable", reason)])
    assert read_rows(path)[1].reason == "it cannot be imported: undefined symbol"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    assert [row.status for row in read_rows(path)] == ["ok"]


@pytest.mark.parametrize("kept", [0, 5, 100, "header", "last cell", "no line end"])
def test_a_row_that_was_cut_off_is_neither_read_nor_continued(tmp_path, kept):
    path = tmp_path / "op.csv"
    append_rows(path, [make_row()])
    first = path.stat().st_size
    append_rows(path, [make_row()])
    sizes = {"header": 20, "last cell": path.stat().st_size - 6, "no line end": path.stat().st_size - 2}
    with path.open("r+b") as file:
        file.truncate(sizes.get(kept, first + kept if isinstance(kept, int) else 0))
    whole = {"header": 0, "no line end": 2}.get(kept, 1)
    assert len(read_rows(path)) == whole
    check_folder(tmp_path, make_row().environment)
    append_rows(path, [make_row(), make_row()])
    assert len(read_rows(path)) == whole + 2


@pytest.fixture
def small_disk():
    """Files may have 20 kB, as where the disk is full then: the first write beyond that writes what still fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_row_that_a_full_disk_cuts_off_is_no_row_that_was_written(tmp_path, small_disk):
    written = 0
    with pytest.raises(OSError, match=r"op\.csv") as full:  # not the silence of a run that loses row after row
        for _ in range(200):
            append_rows(tmp_path / "op.csv", [make_row()])
            written += 1
    assert full.value.filename == str(tmp_path / "op.csv")
    assert len(read_rows(tmp_path / "op.csv")) == written > 10


def test_a_row_within_a_file_that_lacks_cells_is_named(tmp_path):
    path = tmp_path / "op.csv"
    append_rows(path, [make_row(), make_row(), make_row()])
    header, first, second, third = path.read_text().splitlines()
    path.write_text("\n".join([header, first, second[:100], third, ""]))
    with pytest.raises(ValueError, match=r"op\.csv:3: not a benchmark row: it has fewer cells"):
        read_rows(path)


def test_files_of_before_a_column_are_read_and_not_added_to(tmp_path):
    path = tmp_path / "op.csv"
    append_rows(path, [make_row(timed="graph")])
    with path.open(newline="") as file:
        header, *records = csv.reader(file)
    kept = [index for index, name in enumerate(header) if name != "timed"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([record[index] for index in kept] for record in (header, *records))
    (old,) = read_rows(path)
    assert old.timed == "" and not old.is_replayed and old.p50_ms == 1.0
    with pytest.raises(ValueError, match="columns are not those of this version"):
        check_folder(tmp_path, make_row().environment)  # before anything is measured
    with pytest.raises(ValueError, match="columns are not those of this version"):
        append_rows(path, [make_row()])
