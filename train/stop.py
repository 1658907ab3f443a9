"""Stopping between two steps when a person or a scheduler asks for it."""

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM only sets `received`; a second one of the same kind acts as usual.

    with StopSignals() as stop:
        for ...:
            if stop.received: ...  # the number of the signal
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread only; whoever runs it there handles them
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
