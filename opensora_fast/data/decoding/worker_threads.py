"""Threads for decoding that outlive a job which never returns.

A thread that is stuck in a C library cannot be stopped, so it is left behind and replaced; being a daemon it does not
keep the program from ending. `concurrent.futures` waits for its threads when the interpreter exits, hence this.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

SECONDS_TO_END = 5.0


class Overdue:
    """Stands for the result of a job that did not end within its time limit."""


@dataclass
class _Job:
    function: Callable[[Any], Any]
    item: Any
    started: float | None = None
    thread: threading.Thread | None = None
    result: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False


class WorkerThreads:
    """A fixed number of daemon threads.

    Args:
        count: threads.
        name: of the threads, for debuggers.
        start: run once by every thread before its first job.

    Attributes:
        abandoned: threads left behind so far because their job was overdue.
    """

    def __init__(self, count: int, name: str, start: Callable[[], None] | None = None) -> None:
        if count < 1:
            raise ValueError(f"threads must be 1 or more, got {count}")
        self.count = count
        self.abandoned = 0
        self._name = name
        self._start = start
        self._lock = threading.Lock()  # guards the choice between "done" and "abandoned" of a job
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._add_thread()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], time_limit: float) -> list[Any]:
        """Run function(item) for every item.

        Returns:
            The results in the order of the items; `Overdue()` in place of the result of a job that ran longer than
            `time_limit` seconds. The first exception of a job is raised here, after all jobs have ended.
        """
        if not self._threads:
            raise RuntimeError("the worker threads are closed")
        jobs = [_Job(function, item) for item in items]
        for job in jobs:
            self._jobs.put(job)
        results = [self._wait(job, time_limit) for job in jobs]
        for job in jobs:
            if job.error is not None:
                raise job.error
        return results

    def close(self) -> None:
        """Let the threads end, without what is left in the queue where `map` was interrupted, and wait for those that
        do so within `SECONDS_TO_END`."""
        threads, self._threads = self._threads, []
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in threads:
            self._jobs.put(None)
        deadline = time.monotonic() + SECONDS_TO_END
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        if self._start is not None:
            self._start()
        while (job := self._jobs.get()) is not None:
            job.thread = threading.current_thread()
            job.started = time.monotonic()
            try:
                job.result = job.function(job.item)
            except BaseException as error:  # it travels to the caller of map
                job.error = error
            with self._lock:
                job.done.set()
                if job.abandoned:
                    return

    def _wait(self, job: _Job, time_limit: float) -> Any:
        while not job.done.wait(self._seconds_left(job, time_limit)):
            if self._seconds_left(job, time_limit) > 0:
                continue
            with self._lock:
                if job.done.is_set():
                    break
                job.abandoned = True
            self.abandoned += 1
            self._threads.remove(job.thread)
            self._add_thread()
            return Overdue()
        return job.result

    @staticmethod
    def _seconds_left(job: _Job, time_limit: float) -> float:
        if job.started is None:  # still in the queue: its time has not begun
            return time_limit
        return max(0.0, job.started + time_limit - time.monotonic())
