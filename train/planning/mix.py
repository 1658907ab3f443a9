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
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_fast.config import TrainConfig
from opensora_fast.data.buckets.aspect import get_aspect_table
from opensora_fast.data.buckets.balance import WINDOW
from opensora_fast.data.buckets.bucket import Bucket, BucketId
from opensora_fast.data.buckets.plan import count_steps
from opensora_fast.train.inputs.data import read_data

NAMES = ("resolution", "frames", "aspect_ratio", "clips", "share")
VIDEO_RATIO, IMAGE_RATIO = 9 / 16, 1.0
# Micro-batches that shares are turned into: enough that the idle share does not depend on the number.
MADE_UP = 2 * WINDOW
LARGEST_NUMBER = 1e12
MOST_BATCHES = 10_000_000


@dataclass(frozen=True)
class Mix:
    """Micro-batches of an epoch, shuffled.

    Attributes:
        source: where they come from, in words.
        bucket_of: [micro-batches], index into `bucket.ids`.
        steps: of the epoch, where its length is known. What is missing in the last one comes from the front again, as
            in training without `drop_last`.
    """

    source: str
    bucket_of: np.ndarray
    steps: int | None


def mix_of_table(config: TrainConfig, world_size: int) -> Mix:
    """The first epoch of the configuration's table of clips; ValueError as training would raise."""
    data = read_data(config.model_copy(update={"balance": False}), world_size=world_size)
    plan = data.sampler.get_plan(0)
    return Mix(_describe(len(plan), config.dataset.data_path), plan.bucket_of, data.explanation.steps)


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
    count = int(batches.sum())
    if count > MOST_BATCHES:
        raise ValueError(f"{path}: {count} micro-batches are too many to be planned one by one: give share, not clips")
    steps = count_steps(count, world_size, config.drop_last)
    if steps == 0:
        raise ValueError(
            f"{path}: {_count_batches(count)} cannot fill one step of {world_size} processes with drop_last=True: use "
            "fewer processes, smaller batch sizes, or drop_last=False"
        )
    return Mix(_describe(count, path), _shuffle(batches, config.seed), steps)


def mix_assumed(config: TrainConfig, bucket: Bucket) -> Mix:
    """As many micro-batches of every (resolution, frames) pair; ValueError if none keeps clips."""
    weights = np.zeros(len(bucket))
    for resolution in bucket.resolutions:
        for entry in resolution.frames:
            if entry.keep_probability > 0:
                weights[bucket.ids.index(choose_ratio(bucket, resolution.name, entry.frames))] = 1.0
    if not weights.any():
        raise ValueError("bucket_config keeps no clip: every keep probability is 0, raise one")
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
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from None
    records = _read_csv(path, text) if path.suffix == ".csv" else _read_json(path, text)
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
        raise ValueError(f"{path}: {kinds.pop()} is 0 everywhere")
    return weights, kinds == {"clips"}


def _read_csv(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    records = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more values than names in the header")
            records.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return records


def _read_json(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(text)
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
    given = None if ratio in (None, "") else _read_number(place, "aspect_ratio", ratio)
    try:
        probability = bucket.get_prob((resolution, int(frames)))
        if given is None:
            bucket_id = choose_ratio(bucket, resolution, int(frames))
        else:
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
        number = -1.0 if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    whole = name in ("frames", "clips")
    if not 0 <= number <= LARGEST_NUMBER or (whole and number != int(number)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{place}: {name} is {value!r}; write a {kind} from 0 to {LARGEST_NUMBER:.0e}")
    return number


def _describe(count: int, path: Path | str) -> str:
    return f"{_count_batches(count)} of {path}"


def _count_batches(count: int) -> str:
    return f"{count} micro-batch{'es' * (count != 1)}"


def _make_up(weights: np.ndarray, seed: int) -> np.ndarray:
    """`MADE_UP` micro-batches, or a few less, in the proportion of the weights."""
    return _shuffle(np.floor(weights / weights.sum() * MADE_UP), seed)


def _shuffle(batches: np.ndarray, seed: int) -> np.ndarray:
    """`bucket_of` of so many micro-batches [buckets]."""
    bucket_of = np.repeat(np.arange(len(batches)), batches.astype(np.int64))
    return bucket_of[np.argsort(np.random.PCG64(seed).random_raw(len(bucket_of)), kind="stable")]
