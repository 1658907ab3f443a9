import json

import pytest

from opensora_fast.train.monitoring.metrics import MetricsWriter, read_metrics


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
