"""The row of the last finished step is written also where the run ends with an error, which nothing hides."""

import math
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from toy_steps import make_trainer

from opensora_fast.train import loop
from opensora_fast.train.checkpoints.state import Position
from opensora_fast.train.monitoring.metrics import read_metrics
from opensora_fast.train.monitoring.not_finite import NonFiniteError
from opensora_fast.train.monitoring.trackers import Trackers
from opensora_fast.train.step.host_values import HostValues


class Shown:
    key = "shown"

    def __init__(self):
        self.steps = {}

    def write(self, step, numbers):
        self.steps[step] = numbers

    def close(self, failed):
        self.failed = failed


class Never:
    """An event of a device that waits for a lost process."""

    def query(self):
        return False


def run(trainer, happen, step=3):
    """Train until `happen()` in the losses of a step."""
    real = trainer.compute_losses

    def compute_losses(batch, number):
        if number == step:
            happen()
        return real(batch, number)

    trainer.compute_losses = compute_losses
    trainer.run()


def fail(error):
    raise error


@pytest.mark.parametrize("error", [RuntimeError("something else"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_the_last_finished_step_has_its_row_and_trackers_are_given_it(tmp_path, error):
    expected = tmp_path / "expected"
    make_trainer(expected, 2).run()
    shown = Shown()
    trainer = make_trainer(tmp_path / "run", 9)
    with ExitStack() as stack:
        raised = stack.enter_context(pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)))
        trainer.trackers = stack.enter_context(Trackers([shown]))
        run(trainer, lambda: fail(error))
    assert error in (raised.value, raised.value.__cause__)
    rows, expected_rows = (read_metrics(out / "metrics.jsonl") for out in (tmp_path / "run", expected))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        assert all(row[key] == expected_row[key] for key in ("step", "loss", "grad_norm", "tokens", "bucket"))
    assert list(shown.steps) == [1, 2] and shown.steps[2]["grad_norm"] == rows[1]["grad_norm"] and shown.failed


def test_an_error_between_two_steps_leaves_the_row_of_the_first(tmp_path):
    trainer = make_trainer(tmp_path / "run", 9)
    batches = trainer.batches

    def list_batches(epoch, consumed):
        for batch in batches(epoch, consumed):
            if batch.index == 2:
                raise ValueError("no clip is left")
            yield batch

    trainer.batches = list_batches
    with pytest.raises(ValueError, match="no clip is left"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("numbers that never come", "the device has not computed it within 0.05 seconds"),
        ("a gradient that is not finite", "its gradient norm is nan"),
        ("a full disk", "metrics.jsonl could not be written: [Errno 28] No space left on device"),
    ],
)
def test_a_second_failure_is_told_and_does_not_hide_the_first(tmp_path, monkeypatch, capsys, second, reason):
    trainer = make_trainer(tmp_path / "run", 9)
    monkeypatch.setattr(loop, "SECONDS_AFTER_ERROR", 0.05)

    def happen():
        if second == "numbers that never come":
            trainer._taken.norm._event = Never()
        elif second == "a gradient that is not finite":
            trainer._taken.norm = HostValues(torch.tensor(math.nan))
        else:
            trainer._rows._metrics._file = Path("/dev/full").open("a")
        raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        run(trainer, happen)
    told = capsys.readouterr().err
    assert re.search(rf"warning: metrics.jsonl lacks the last finished step, 2: \S*{re.escape(reason)}", told), told
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_gradient_that_is_not_finite_at_the_end_of_an_epoch_goes_back_to_that_epoch(tmp_path):
    trainer = make_trainer(tmp_path / "run", 15)  # an epoch has 10

    def lose_norm():
        trainer._taken.norm = HostValues(torch.tensor(math.nan))

    with pytest.raises(NonFiniteError, match="step 10: the gradient norm is nan"):
        run(trainer, lose_norm, step=11)
    assert trainer.position == Position(step=9, epoch=0, consumed=9)


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    trainer = make_trainer(tmp_path / "run", 9)

    def fill_disk():
        trainer._rows._metrics._file = Path("/dev/full").open("a")

    message = f"^{tmp_path / 'run' / 'metrics.jsonl'} could not be written: .*No space left.*--resume auto continues"
    with pytest.raises(ValueError, match=message):
        run(trainer, fill_disk)
