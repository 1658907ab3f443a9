"""Worker threads: order, limits, errors, and nothing left behind but what hangs."""

import os
import signal
import threading
import time

import pytest

from opensora_fast.data.decoding import worker_threads
from opensora_fast.data.decoding.worker_threads import Overdue, WorkerThreads


def test_results_in_order_and_in_parallel():
    workers = WorkerThreads(2, "test")
    barrier = threading.Barrier(2, timeout=10)  # passed only if two jobs run at the same time
    assert workers.map(lambda item: (barrier.wait(), item)[1] ** 2, [1, 2, 3, 4], 10) == [1, 4, 9, 16]
    assert workers.map(str, [], 10) == []
    workers.close()


def test_overdue_jobs_are_left_behind_and_the_others_go_on():
    release = threading.Event()
    workers = WorkerThreads(1, "test")
    results = workers.map(lambda item: release.wait(20) if item == 1 else item, [0, 1, 2], 1.0)
    assert results[0] == 0 and isinstance(results[1], Overdue) and results[2] == 2
    assert workers.abandoned == 1
    assert workers.map(str, [5], 10) == ["5"]
    workers.close()  # does not wait for the one that hangs
    release.set()


def test_waiting_in_the_queue_is_not_overdue():
    workers = WorkerThreads(1, "test")
    assert workers.map(lambda item: time.sleep(0.5) or item, [1, 2, 3], 1.3) == [1, 2, 3]
    assert workers.abandoned == 0
    workers.close()


def test_errors_are_raised_after_all_jobs_have_ended():
    ended = []

    def work(item):
        if item == 0:
            raise KeyError("first")
        time.sleep(0.05)
        ended.append(item)

    workers = WorkerThreads(2, "test")
    with pytest.raises(KeyError, match="first"):
        workers.map(work, [0, 1, 2], 10)
    assert sorted(ended) == [1, 2]
    workers.close()


def test_start_runs_once_in_every_thread_and_close_ends_them(count_begun_threads):
    started = []
    workers = WorkerThreads(3, "test", start=lambda: started.append(threading.get_ident()))
    workers.map(time.sleep, [0.05] * 6, 10)
    assert len(set(started)) == 3
    workers.close()
    assert count_begun_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        workers.map(str, [1], 10)


def test_after_ctrl_c_neither_the_queue_nor_what_hangs_is_waited_for(monkeypatch, count_begun_threads):
    monkeypatch.setattr(worker_threads, "SECONDS_TO_END", 0.5)
    begun, release = [], threading.Event()
    workers = WorkerThreads(1, "test")

    def interrupt_and_hang(item):
        begun.append(item)
        time.sleep(0.3)  # until all items are in the queue
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(20)

    with pytest.raises(KeyboardInterrupt):
        workers.map(interrupt_and_hang, range(16), 20)
    workers.close()
    assert count_begun_threads() == 1
    release.set()
    while count_begun_threads() > 0:
        time.sleep(0.01)
    assert begun == [0]


def test_count():
    with pytest.raises(ValueError, match="1 or more"):
        WorkerThreads(0, "test")
