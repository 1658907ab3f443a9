"""An order of micro-batches in which those that are taken at once cost about the same.

Several processes take consecutive micro-batches of one list, and each step waits for the slowest. In a shuffled list
that is a tenth to a half of the time (counted for Open-Sora's stages). Here the list is cut into windows, each window
is sorted by cost and cut into blocks, and the blocks are shuffled. They are nested: the blocks of 512 within one of
1536, those of 64 within one of 512 and those of 8 within one of 64 change places too. So

- nothing depends on the number of processes, and a run goes on with another number in the same order;
- a number of processes that divides a block never mixes two of them in a step; any other number mixes small blocks
  inside a larger one, which are alike, and now and then two of the largest;
- a step holds few buckets, where a shuffled one holds all, but every bucket comes up throughout the epoch: with 64
  processes 24 steps in a row are of similar cost, and a window of 768 steps takes its share of every bucket.
"""

from __future__ import annotations

import numpy as np

BLOCKS = (1536, 512, 64, 8)
WINDOW = 32 * BLOCKS[0]
PURPOSE = 3  # tells its random numbers from those of other draws of the same seed and epoch


def balance(costs: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The new order of a shuffled list: int64 [micro-batches], which one comes at each place.

    Args:
        costs: [micro-batches] in the shuffled order.
        seed, epoch: the same ones give the same order, in all versions of NumPy.
    """
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch, PURPOSE]))
    windows = []
    for first in range(0, len(costs), WINDOW):
        by_cost = first + np.argsort(costs[first : first + WINDOW], kind="stable")
        windows.append(_shuffle_blocks(by_cost[None], BLOCKS, random)[0])
    return np.concatenate(windows) if windows else np.arange(0)


def _shuffle_blocks(rows: np.ndarray, sizes: tuple[int, ...], random: np.random.PCG64) -> np.ndarray:
    """Shuffles the blocks of each row [rows, length]. Those of a length that is no multiple come last, at any cost."""
    if not sizes or rows.shape[1] <= sizes[-1]:
        return rows
    size, *smaller = sizes
    blocks, rest = divmod(rows.shape[1], size)
    if rest:
        place = int(random.random_raw()) % (blocks + 1) * size
        whole = np.concatenate([rows[:, :place], rows[:, place + rest :]], axis=1)
        parts = [_shuffle_blocks(whole, sizes, random)] if blocks else []
        return np.concatenate([*parts, _shuffle_blocks(rows[:, place : place + rest], tuple(smaller), random)], axis=1)
    keys = random.random_raw(len(rows) * blocks).reshape(len(rows), blocks)
    order = np.argsort(keys, axis=1, kind="stable")
    shuffled = np.take_along_axis(rows.reshape(len(rows), blocks, size), order[:, :, None], axis=1)
    return _shuffle_blocks(shuffled.reshape(-1, size), tuple(smaller), random).reshape(rows.shape)
