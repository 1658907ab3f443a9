"""Make the next items in a thread while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LOOKS = 0.1
"""How long a full queue may keep the thread from noticing that it should stop."""


class Prefetcher(Generic[Item]):
    """Iterates over what another iterator gives, which runs ahead in a thread of its own.

    An exception of the iterator is raised in the consumer, after the items before it. Leaving the loop early and
    calling `close` ends the thread; the item it is working on is finished first.

    Args:
        make_items: called in the thread; gives the iterator.
        depth: items made ahead, at most; 0 makes them when they are asked for, without a thread.
    """

    def __init__(self, make_items: Callable[[], Iterator[Item]], depth: int) -> None:
        if depth < 0:
            raise ValueError(f"prefetch must be 0 or more, got {depth}")
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(1, depth))
        self._thread: threading.Thread | None = None
        self._items: Iterator[Item] | None = None
        if depth == 0:
            self._items = make_items()
        else:
            self._thread = threading.Thread(target=self._work, args=(make_items,), name="make batches", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        if self._items is not None:
            return next(self._items)
        kind, value = self._queue.get()
        if kind == "item":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it. May be called twice."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = self._items = None

    def _work(self, make_items: Callable[[], Iterator[Item]]) -> None:
        try:
            for item in make_items():
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:  # it travels to the consumer
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        """Hand something over; False if nobody wants it any more."""
        while not self._stop.is_set():
            try:
                self._queue.put((kind, value), timeout=SECONDS_BETWEEN_LOOKS)
                return True
            except queue.Full:
                continue
        return False


_END_OF_EPOCH = object()


class EpochPrefetcher(Generic[Item]):
    """One `Prefetcher` after the other, for something that is iterated over once an epoch.

    Args:
        depth: see `Prefetcher`.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._running: Prefetcher[Any] | None = None
        # Where the running one is at the start of an epoch that was begun ahead: (epoch, 0).
        self._begun: tuple[int, int] | None = None

    def run(self, make_items: Callable[[], Iterator[Item]]) -> Iterator[Item]:
        """The items of an iterator. The thread ends with the iterator, or when another epoch or `close` is called for.

        Args:
            make_items: gives the iterator.
        """
        self.close()
        running = self._running = Prefetcher(make_items, self.depth)
        with closing(running):
            yield from running

    def run_on(self, make_items: Callable[[int, int], Iterator[Item]], epoch: int, start: int) -> Iterator[Item]:
        """The items of an epoch. Behind them the thread goes on with the next epoch, and so does the next call if it is
        for that; it ends when another place or `close` is called for, or when an iterator is left before its end.

        Args:
            make_items: make_items(epoch, start) gives the iterator of an epoch from a place in it.
            epoch: number of the epoch.
            start: place in it.
        """
        if self._begun != (epoch, start):
            self.close()
            self._running = Prefetcher(lambda: _chain_epochs(make_items, epoch, start), self.depth)
        running, self._begun = self._running, None
        try:
            for item in running:
                if item is _END_OF_EPOCH:
                    self._begun = (epoch + 1, 0)
                    return
                yield item
        finally:
            if running is self._running and self._begun is None:
                self.close()

    def close(self) -> None:
        """End the thread, if one runs."""
        if self._running is not None:
            self._running.close()
            self._running = self._begun = None


def _chain_epochs(make_items: Callable[[int, int], Iterator[Item]], epoch: int, start: int) -> Iterator[Any]:
    """The items of an epoch and of all that follow, with a mark behind each."""
    while True:
        yield from make_items(epoch, start)
        yield _END_OF_EPOCH
        epoch, start = epoch + 1, 0
