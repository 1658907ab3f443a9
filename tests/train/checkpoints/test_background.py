"""A job beside the training loop: what it raises is told exactly once, by raising or in a line."""

import os
import signal
import threading

import pytest

from opensora_fast.parallel.collectives import ProcessLostError
from opensora_fast.train.checkpoints.background import Background


def fail():
    raise ValueError("the disk is full")


@pytest.mark.parametrize(
    ("own", "raised", "reported"),
    [
        (None, "the disk is full", []),
        (ProcessLostError("rank 1 has ended"), "the disk is full", []),
        (RuntimeError("of its own"), "of its own", ["error: the disk is full"]),
        (KeyboardInterrupt("pressed"), "pressed", ["error: the disk is full"]),
    ],
)
def test_what_a_job_raises_is_told_however_its_block_ends(own, raised, reported):
    lines = []
    with pytest.raises(BaseException, match=raised), Background(lines.append) as background:
        background.start(fail)
        if own is not None:
            raise own
    assert lines == reported


def test_what_has_been_raised_is_not_told_again():
    lines = []
    with pytest.raises(RuntimeError, match="another"), Background(lines.append) as background:
        background.start(fail)
        with pytest.raises(ValueError, match="the disk is full"):
            background.wait()
        background.check()
        raise RuntimeError("another")
    assert lines == []
    with pytest.raises(RuntimeError), Background(lines.append) as background:
        background.start(lambda: {}["a"])  # a fault of the program keeps its class
        raise RuntimeError("another")
    assert lines == ["error: KeyError('a')"]


def test_the_next_job_does_not_begin_where_the_one_before_has_failed():
    done = []
    with Background(print) as background:
        background.start(fail)
        with pytest.raises(ValueError, match="the disk is full"):
            background.start(lambda: done.append("next"))
    assert done == []


def test_who_presses_ctrl_c_while_waiting_is_told_what_the_job_raises():
    lines, pressed = [], threading.Event()

    def fail_late():
        pressed.wait(30)
        fail()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell; here it may be ignored
    try:
        with pytest.raises(KeyboardInterrupt), Background(lines.append) as background:
            background.start(fail_late)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                background.wait()
            finally:
                pressed.set()
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines == ["error: the disk is full"]
