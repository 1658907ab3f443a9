"""Work that goes on beside the training loop."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from opensora_fast.parallel.collectives import ProcessLostError


class Background:
    """Runs one job at a time in a thread of its own. Leaving its block waits for the job.

    What a job raises comes out of `check`, `wait` or the end of the block, unless the block ends with an error of its
    own. That another process is lost is none: it may have ended because of what the job raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._job: Future[Any] | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Begin a job, when the one before has ended."""
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise what the job has raised, if it has ended."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise what it raises."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._pool.shutdown(wait=True)
        if kind is None or issubclass(kind, ProcessLostError):
            self.wait()
