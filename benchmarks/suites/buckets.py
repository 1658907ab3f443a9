"""Putting a table of clips into buckets: this project's vectorised assignment beside Open-Sora's loop over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from opensora_fast.config import load_train_config
from opensora_fast.data.buckets.assignment import DROPPED, assign_buckets
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.train.locate_config import locate_config

from ..measuring.case import Case, Outcome, make_template
from ..measuring.provider import own_version
from ..measuring.race import Check, Entry, run_race
from ..measuring.session import Session
from ..measuring.timing import Call, Sampling
from .scale import Scale

VALUE = 380.0
CONFIGURATIONS = ("stage1", "stage3")
SEED, FRAME_INTERVAL = 42, 3
LOOPED_ROWS = 2000  # a loop over Python rows is timed on so many
CHECKED_ROWS = 200


def list_cases(scale: Scale) -> list[Case]:
    """The shipped configurations, at a row count for each provider to manage in seconds."""
    many = 1_000_000 if scale.device == "cuda" else 20_000
    return [
        _case(scale, configuration, rows, providers)
        for configuration in CONFIGURATIONS
        for rows, providers in ((LOOPED_ROWS, ("loop", "vectorised")), (many, ("vectorised",)))
    ]


def _case(scale: Scale, configuration: str, rows: int, providers: tuple[str, ...]) -> Case:
    template = make_template("buckets", configuration, op="assignment", shape=f"{rows} clips")

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        entries = [Entry(name, own_version(), "assign", partial(_prepare, name, configuration, rows)) for name in names]
        sampling = Sampling(session.sampling_seconds(min(2.0, 4 * scale.seconds)), 10, warm_up=1)
        return run_race(template, entries, sampling, session, clock="cpu")

    return Case(template, ("assign",), providers, VALUE, measure)


def _prepare(provider: str, configuration: str, rows: int) -> tuple[Call, Callable[[], Check]]:
    bucket = Bucket(load_train_config(locate_config(configuration)).config.bucket_config)
    clips = make_clip_sizes(rows)
    assigned: list[list[int]] = []

    def find(row: int) -> tuple[str, int, str] | None:
        num_frames, height, width = (int(column[row]) for column in clips)
        return bucket.get_bucket_id(num_frames, height, width, FRAME_INTERVAL, SEED + row * bucket.num_bucket)

    def loop() -> None:
        found = [find(row) for row in range(rows)]
        index = {identity: number for number, identity in enumerate(bucket.ids)} | {None: DROPPED}
        assigned[:] = [[index[identity] for identity in found]]

    def vectorised() -> None:
        assigned[:] = [assign_buckets(*clips, bucket, frame_interval=FRAME_INTERVAL, seed=SEED)]

    def check() -> Check:
        """The share of rows that Open-Sora's rule, row by row, puts elsewhere."""
        wrong = 0
        checked = np.linspace(0, rows - 1, min(rows, CHECKED_ROWS), dtype=int).tolist()
        for row in checked:
            found = int(assigned[0][row])
            wrong += find(row) != (None if found == DROPPED else bucket.ids[found])
        return Check(wrong / len(checked), 0.0)

    return {"loop": loop, "vectorised": vectorised}[provider], check


def make_clip_sizes(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """num_frames, height and width (pixels) of made-up clips, int32 [rows] each: one in five is an image."""
    generator = np.random.default_rng(0)
    num_frames = generator.integers(2, 600, rows, dtype=np.int32)
    num_frames[generator.random(rows) < 0.2] = 1
    height = generator.integers(100, 2200, rows, dtype=np.int32)
    width = generator.integers(100, 3900, rows, dtype=np.int32)
    return num_frames, height, width
