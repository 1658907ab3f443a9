"""First random number of many NumPy generators at once.

Open-Sora draws `numpy.random.default_rng(seed).random()` for every clip, with a seed of its own. Making a generator
takes many microseconds, so ten million clips take minutes; here the same arithmetic (SeedSequence, then PCG64) runs on
arrays of seeds, and gives the same numbers bit for bit. NumPy's compatibility rules freeze both algorithms.
"""

from __future__ import annotations

import numpy as np

# SeedSequence: constants of its hash, all modulo 2**32.
POOL_WORDS = 4
HASH_START_MIX, HASH_STEP_MIX = 0x43B0D7E5, 0x931E8875
HASH_START_OUTPUT, HASH_STEP_OUTPUT = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715

# PCG64: 128-bit multiplier of the linear congruential generator.
PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645

# Rows worked on at a time, so that all temporaries stay in the processor's cache.
BLOCK_ROWS = 1 << 14

Wide = tuple[np.ndarray, np.ndarray]
"""A 128-bit unsigned integer per row: (high, low), uint64 each."""


def draw_first_uniform(seeds: np.ndarray) -> np.ndarray:
    """`np.random.default_rng(seed).random()` for every seed.

    Args:
        seeds: uint64 [n].

    Returns:
        float64 [n] in [0, 1), bit-equal to NumPy's own.
    """
    seeds = np.asarray(seeds)
    if seeds.dtype != np.uint64:
        raise ValueError(f"seeds must be uint64, got {seeds.dtype}")
    uniform = np.empty(seeds.shape, np.float64)
    for start in range(0, len(seeds), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        uniform[block] = _first_pcg64_uniform(_seed_sequence_state(seeds[block]))
    return uniform


def _seed_sequence_state(seeds: np.ndarray) -> list[np.ndarray]:
    """The four uint64 words that `SeedSequence(seed).generate_state(4, np.uint64)` returns."""
    # Words that a small seed lacks count as zero in the pool, so one and two words need no telling apart.
    low = seeds.astype(np.uint32)
    high = (seeds >> np.uint64(32)).astype(np.uint32)
    zero = np.zeros_like(low)
    hash_mix = _Hash(HASH_START_MIX, HASH_STEP_MIX)
    pool = [hash_mix(word) for word in (low, high, zero, zero)]
    for source in range(POOL_WORDS):
        for target in range(POOL_WORDS):
            if source != target:
                pool[target] = _mix(pool[target], hash_mix(pool[source]))
    hash_output = _Hash(HASH_START_OUTPUT, HASH_STEP_OUTPUT)
    words = [hash_output(pool[index % POOL_WORDS]).astype(np.uint64) for index in range(8)]
    return [words[2 * index] | (words[2 * index + 1] << np.uint64(32)) for index in range(4)]


class _Hash:
    """SeedSequence's hash of a word; its constant changes with every call."""

    def __init__(self, start: int, step: int) -> None:
        self.constant = start
        self.step = step

    def __call__(self, word: np.ndarray) -> np.ndarray:
        hashed = word ^ np.uint32(self.constant)
        self.constant = self.constant * self.step & 0xFFFFFFFF
        hashed *= np.uint32(self.constant)
        hashed ^= hashed >> np.uint32(16)
        return hashed


def _mix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    mixed = left * np.uint32(MIX_LEFT)
    mixed -= right * np.uint32(MIX_RIGHT)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _first_pcg64_uniform(state_words: list[np.ndarray]) -> np.ndarray:
    """Seed PCG64 with (initial state, stream) of 128 bits each, high word first, and take its first double."""
    initial: Wide = (state_words[0], state_words[1])
    stream: Wide = (state_words[2], state_words[3])
    # The increment is 2 * stream + 1.
    increment = (stream[0] << np.uint64(1)) | (stream[1] >> np.uint64(63)), (stream[1] << np.uint64(1)) | np.uint64(1)
    # Seeding: state 0 takes a step (which leaves the increment), gets the initial state added, and takes another step.
    state = _step(_add(increment, initial), increment)
    # A draw takes a step, then folds the halves together and rotates right by the top six bits.
    high, low = _step(state, increment)
    folded = high ^ low
    rotation = high >> np.uint64(58)
    rotated = (folded >> rotation) | (folded << (-rotation & np.uint64(63)))
    return (rotated >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _step(state: Wide, increment: Wide) -> Wide:
    return _add(_multiply(state, PCG_MULTIPLIER), increment)


def _add(left: Wide, right: Wide) -> Wide:
    low = left[1] + right[1]
    carry = low < right[1]
    return left[0] + right[0] + carry, low


def _multiply(value: Wide, constant: int) -> Wide:
    """Product modulo 2**128, from 32-bit halves of the low words."""
    constant_high = np.uint64(constant >> 64)
    constant_low = np.uint64(constant & 0xFFFFFFFFFFFFFFFF)
    upper = np.uint64(constant >> 32 & 0xFFFFFFFF)
    lower = np.uint64(constant & 0xFFFFFFFF)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    high, low = value
    low_lower, low_upper = low & mask, low >> half
    middle = low_upper * lower + (low_lower * lower >> half)
    middle_low = (middle & mask) + low_lower * upper
    carry = low_upper * upper + (middle >> half) + (middle_low >> half)
    return carry + high * constant_low + low * constant_high, low * constant_low
