"""How many micro-batches there are of each bucket: of a table of clips, a file of shares, or assumed.

A mix file says how the clips fall into the buckets, where there is no table yet. CSV with a header, or JSON with a list
of objects; in both the same names:

    resolution    as in bucket_config: 144p, 256, …
    frames        as in bucket_config
    aspect_ratio  of the table of the resolution (height / width); may be missing: the one nearest to 16:9, to 1:1 for
                  images
    clips         clips of the bucket in an epoch; or in its place
    share         their share of all clips, in any unit. The length of an epoch is not known then.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_fast.config import TrainConfig
from opensora_fast.data.aspect import get_aspect_table
from opensora_fast.data.balance import WINDOW
from opensora_fast.data.bucket import Bucket, BucketId
from opensora_fast.train.data import read_data

NAMES = ("resolution", "frames", "aspect_ratio", "clips", "share")
VIDEO_RATIO, IMAGE_RATIO = 9 / 16, 1.0
# Micro-batches that shares are turned into: enough that the idle share does not depend on the number.
MADE_UP = 2 * WINDOW


@dataclass(frozen=True)
class Mix:
    """Micro-batches of an epoch, shuffled.

    Attributes:
        source: where they come from, in words.
        bucket_of: [micro-batches], index into `bucket.ids`.
        steps: of the epoch, where its length is known.
    """

    source: str
    bucket_of: np.ndarray
    steps: int | None


def mix_of_table(config: TrainConfig, bucket: Bucket, world_size: int) -> Mix:
    """The first epoch of the configuration's table of clips; ValueError as training would raise."""
    data = read_data(config.model_copy(update={"balance": False}), world_size=world_size)
    plan = data.sampler.get_plan(0)
    return Mix(f"{len(plan)} micro-batches of {config.dataset.data_path}", plan.bucket_of, data.explanation.steps)


def mix_of_file(path: Path, config: TrainConfig, bucket: Bucket, world_size: int) -> Mix:
    """What a mix file says (see above).

    Raises:
        ValueError: the file, line and name of what is wrong, and the fix.
    """
    weights, counted = read_mix(path, bucket)
    batch_size = np.array([bucket.get_batch_size(bucket_id) or 1 for bucket_id in bucket.ids])
    if not counted:
        return Mix(f"shares of {path}", _make_up(weights / batch_size, config.seed), None)
    batches = np.floor(weights / batch_size) if config.drop_last else np.ceil(weights / batch_size)
    bucket_of = _shuffle(batches, config.seed)
    steps = len(bucket_of) // world_size if config.drop_last else -(-len(bucket_of) // world_size)
    return Mix(f"{len(bucket_of)} micro-batches of {path}", bucket_of, steps)


def mix_assumed(config: TrainConfig, bucket: Bucket) -> Mix:
    """As many micro-batches of every (resolution, frames) pair."""
    weights = np.zeros(len(bucket))
    for resolution in bucket.resolutions:
        for entry in resolution.frames:
            if entry.keep_probability > 0:
                weights[bucket.ids.index(choose_ratio(bucket, resolution.name, entry.frames))] = 1.0
    source = "assumed, as no --data-path or --mix is given: as many micro-batches of every entry of bucket_config"
    return Mix(source, _make_up(weights, config.seed), None)


def choose_ratio(bucket: Bucket, resolution: str, frames: int) -> BucketId:
    """The bucket of a pair whose aspect ratio is nearest to 16:9, or to 1:1 for images."""
    table = next(entry.table for entry in bucket.resolutions if entry.name == resolution)
    wanted = IMAGE_RATIO if frames == 1 else VIDEO_RATIO
    return resolution, frames, min(table.names, key=lambda name: abs(float(name) - wanted))


def read_mix(path: Path, bucket: Bucket) -> tuple[np.ndarray, bool]:
    """(clips or shares [buckets], whether they are clips) of a mix file."""
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"--mix {path}: write a .csv or a .json file with {', '.join(NAMES)}")
    records = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    if not records:
        raise ValueError(f"{path}: holds no bucket")
    weights = np.zeros(len(bucket))
    kinds = set()
    for place, record in records:
        unknown = [name for name in record if name not in NAMES]
        if unknown:
            raise ValueError(f"{path}, {place}: unknown {unknown[0]!r}; known are {', '.join(NAMES)}")
        bucket_id = _read_bucket(f"{path}, {place}", record, bucket)
        given = [name for name in ("clips", "share") if record.get(name) not in (None, "")]
        kinds.update(given)
        if len(given) != 1 or len(kinds) > 1:
            raise ValueError(f"{path}, {place}: give clips in all lines, or share in all lines")
        weights[bucket.ids.index(bucket_id)] += _read_number(f"{path}, {place}", given[0], record[given[0]])
    if not weights.any():
        raise ValueError(f"{path}: all {kinds.pop()} are 0")
    return weights, kinds == {"clips"}


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return [(f"line {reader.line_num}", {str(name): value for name, value in row.items()}) for row in reader]


def _read_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ValueError(f"{path}: write a list of objects with {', '.join(NAMES)}")
    return [(f"object {number}", item) for number, item in enumerate(content, 1)]


def _read_bucket(place: str, record: dict[str, Any], bucket: Bucket) -> BucketId:
    missing = [name for name in ("resolution", "frames") if record.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{place}: {missing[0]} is missing")
    frames = _read_number(place, "frames", record["frames"])
    resolution, ratio = str(record["resolution"]), record.get("aspect_ratio")
    try:
        probability = bucket.get_prob((resolution, int(frames)))
        if ratio in (None, ""):
            bucket_id = choose_ratio(bucket, resolution, int(frames))
        else:
            given = _read_number(place, "aspect_ratio", ratio)
            names = {float(name): name for name in get_aspect_table(resolution).names}  # "1.0", "0.56"
            bucket_id = (resolution, int(frames), names.get(given, str(ratio)))
        bucket.get_thw(bucket_id)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if probability == 0:
        raise ValueError(f"{place}: bucket_config[{resolution!r}][{int(frames)}] keeps no clip (probability 0)")
    return bucket_id


def _read_number(place: str, name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf") or (name in ("frames", "clips") and number != int(number)):
        raise ValueError(f"{place}: {name} is {value!r}; write a number of 0 or more")
    return number


def _make_up(weights: np.ndarray, seed: int) -> np.ndarray:
    """`MADE_UP` micro-batches, or a few less, in the proportion of the weights."""
    return _shuffle(np.floor(weights / weights.sum() * MADE_UP), seed)


def _shuffle(batches: np.ndarray, seed: int) -> np.ndarray:
    """`bucket_of` of so many micro-batches [buckets]."""
    bucket_of = np.repeat(np.arange(len(batches)), batches.astype(np.int64))
    return bucket_of[np.argsort(np.random.PCG64(seed).random_raw(len(bucket_of)), kind="stable")]
