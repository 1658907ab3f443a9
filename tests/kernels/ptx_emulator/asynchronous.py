"""What goes on while other instructions run: copies to shared memory and products of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Copy:
    """A `cp.async` under way."""

    threads: np.ndarray
    to: np.ndarray
    source: np.ndarray
    sizes: np.ndarray
    size: int


@dataclass
class Product:
    """A `wgmma` under way."""

    threads: np.ndarray  # bool: those that have not waited for it
    blocks: np.ndarray  # of each warp
    warps: np.ndarray
    cells: np.ndarray  # of shared memory, that it reads: [warps, n]
    started: int


@dataclass
class Group:
    """What was committed together."""

    threads: np.ndarray  # bool: those that have committed it
    members: list


class Groups:
    """Asynchronous work in groups that threads commit and wait for."""

    def __init__(self) -> None:
        self._open: list = []
        self._groups: list[Group] = []

    def add(self, threads: np.ndarray, member: object) -> None:
        self._open.append((threads.copy(), member))

    def commit(self, threads: np.ndarray) -> None:
        members = [member for whose, member in self._open if (whose & threads).any()]
        self._groups.append(Group(threads.copy(), members))
        self._open = [(whose & ~threads, member) for whose, member in self._open if (whose & ~threads).any()]

    def wait(self, threads: np.ndarray, pending: int) -> list[tuple[object, np.ndarray]]:
        """What is complete once at most the last `pending` groups of the threads are not, and for which threads."""
        later = np.zeros(len(threads), dtype=np.int64)
        complete = []
        for group in reversed(self._groups):
            done = group.threads & threads & (later >= pending)
            later += group.threads
            if done.any():
                complete.append((group, done))
        for group, done in complete:
            group.threads = group.threads & ~done
        self._groups = [group for group in self._groups if group.threads.any()]
        return [(member, done) for group, done in reversed(complete) for member in group.members]

    def any(self, threads: np.ndarray) -> bool:
        """Whether something of these threads has not been waited for."""
        under_way = [group.threads for group in self._groups] + [whose for whose, _ in self._open]
        return any((whose & threads).any() for whose in under_way)
