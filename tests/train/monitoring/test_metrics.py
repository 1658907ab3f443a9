import json
import time

import pytest
import torch
from toy_steps import make_trainer

from opensora_fast.train import loop
from opensora_fast.train.monitoring.metrics import MetricsWriter, join_parts, peak_memory, read_metrics


def test_rows_are_on_disk_at_once_and_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": 0.5})
    writer.write({"step": 2, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]
    writer.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write({"step": step, "run": 1})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "ru')  # cut off by a kill
    writer = MetricsWriter(path, last_step=3)
    writer.write({"step": 4, "run": 2})
    writer.close()
    assert [(row["step"], row["run"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsWriter(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("damaged", [b"\0\0\0", b"\xff", b"[2]", b"null", b"{}", b'{"step": "2"}'])
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no row of a step: .*; remove that line"):
        MetricsWriter(path, last_step=3)
    assert path.read_text(errors="replace").endswith('{"step": 3}\n')


def test_a_row_says_how_long_its_step_has_waited_for_the_batch(tmp_path):
    trainer = make_trainer(tmp_path, 3)
    batches = trainer.batches

    def list_batches(epoch, consumed):
        for batch in batches(epoch, consumed):
            time.sleep(0.5 if batch.index == 1 else 0)
            yield batch

    trainer.batches = list_batches
    trainer.run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["data_wait"] >= 0.5 for row in rows] == [False, True, False]
    assert all(row["step_time"] > row["data_wait"] for row in rows)
    assert all(row["tokens_per_s"] == row["tokens"] / row["step_time"] for row in rows)  # the wait is part of a step


def test_a_row_has_the_most_memory_of_its_step_the_optimizer_included(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, 2)
    peaks = iter([10, 20, 20, 20])  # before and behind the optimizer of each step
    monkeypatch.setattr(loop, "peak_memory", lambda device: next(peaks))
    trainer.run()
    assert [row["memory"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [20, 20]


def test_the_memory_of_a_process_on_a_cpu_is_in_bytes():
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40


def test_a_row_has_each_micro_batch_once_and_the_worst_of_all_processes():
    """Of four processes, of which each two share a micro-batch."""

    def describe(loss, bucket, wait, memory, retries):
        part = {"losses": {"loss": loss, "mse": loss / 2}, "tokens": 100 * bucket, "clips": bucket, "bucket": [bucket]}
        return part | {"data_wait": wait, "memory": memory, "memory_retries": retries}

    first = [describe(1.0, 1, 0.0, 5, 0), describe(1.0, 1, 2.0, 5, 0)]
    second = [describe(4.0, 3, 0.0, 5, 1), describe(4.0, 3, 0.0, 6, 0)]
    assert join_parts(first + second, 2) == {
        "loss": 2.5,
        "mse": 1.25,
        "tokens": 400,
        "data_wait": 2.0,
        "bucket": [1],
        "buckets": [[1], [3]],
        "batch_size": 4,
        "memory": 6,
        "memory_retries": 1,
    }
