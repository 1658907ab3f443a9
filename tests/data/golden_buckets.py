"""Bucket configurations for the tests: the golden files and random tables."""

import json
from pathlib import Path

from hypothesis import strategies as st

from opensora_fast.data.buckets.aspect import load_aspect_tables

GOLDEN = Path(__file__).parents[1] / "golden"


def read_golden_buckets(stage: int) -> tuple[dict, list[dict]]:
    """Bucket configuration of a stage and the clips with their buckets."""
    content = json.loads((GOLDEN / f"buckets_stage{stage}.json").read_text())
    config = {
        resolution: {int(frames): tuple(pair) for frames, pair in entries.items()}
        for resolution, entries in content["bucket_config"].items()
    }
    return config, content["rows"]


def bucket_configs() -> st.SearchStrategy[dict]:
    """Random tables: any resolutions, frame counts, keep probabilities and batch sizes."""
    frames = st.sampled_from([1, 2, 3, 8, 16, 17, 32, 64, 128])
    sometimes = st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(1, 5))
    never = st.just((0.0, None))
    entries = st.dictionaries(frames, st.one_of(sometimes, never), min_size=1, max_size=4)
    return st.dictionaries(st.sampled_from(list(load_aspect_tables())), entries, min_size=1, max_size=4)
