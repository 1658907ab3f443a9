"""Work that goes on beside the training loop."""

from collections.abc import Callable
from concurrent import futures
from types import TracebackType
from typing import Any

from opensora_fast.parallel.collectives import ProcessLostError


class Background:
    """Runs one job at a time in a thread of its own. Leaving its block waits for the job.

    What a job raises comes out of `check`, `wait` or the end of the block. Where the block ends with an error of its
    own, that one is raised and the job's is reported. That another process is lost is no error of its own: it may have
    ended because of what the job raised.

    Args:
        report: is given a line for a person.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._pool = futures.ThreadPoolExecutor(max_workers=1)
        self._job: futures.Future[Any] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job goes on."""
        return self._job is not None and not self._job.done()

    def start(self, job: Callable[[], Any]) -> None:
        """Begin a job, when the one before has ended."""
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise what the job has raised, if it has ended."""
        if not self.is_busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise what it raises."""
        if self._job is not None:
            futures.wait([self._job])  # a second Ctrl-C ends it; the job is not forgotten then
            job, self._job = self._job, None
            job.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._pool.shutdown(wait=True)
        if kind is None or issubclass(kind, ProcessLostError):
            self.wait()
        elif self._job is not None and (raised := self._job.exception()) is not None:
            self._report(f"error: {raised if isinstance(raised, ValueError) else repr(raised)}")
