"""From a configuration to an order of batches: table, buckets and sampler."""

import hashlib
from dataclasses import dataclass

import numpy as np

from opensora_fast.config import TrainConfig
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.explain import Explanation
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.manifest import Manifest
from opensora_fast.train.costs import RunCosts


@dataclass
class TrainingData:
    """Table, buckets and sampler of a run. `explanation` is of epoch 0."""

    manifest: Manifest
    bucket: Bucket
    sampler: BucketSampler
    explanation: Explanation

    def get_fingerprint(self) -> str:
        """Hash of all that decides the order of batches beside the seed: sizes of clips, the bucket table, costs."""
        digest = hashlib.sha256()
        for column in (self.manifest.num_frames, self.manifest.height, self.manifest.width):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        sampler = self.sampler
        order = (self.bucket.config, sampler.frame_interval, sampler.drop_last, sampler.seed, type(sampler).__name__)
        digest.update(repr(order).encode())
        if sampler.costs is not None:
            # Only which bucket costs more than which decides: better counts that agree on it change nothing.
            _, ranks = np.unique(sampler.costs, return_inverse=True)
            digest.update(np.ascontiguousarray(ranks, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]


def read_data(config: TrainConfig, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Read the table and put its clips into buckets.

    Raises:
        ValueError: no or a broken table, broken buckets, or an entry of bucket_config whose clips give no batch.
    """
    bucket = Bucket(config.bucket_config)
    if config.dataset.data_path is None:
        raise ValueError(
            "dataset.data_path is missing: add --data-path META, a table of clips "
            "(`opensora-fast data probe FOLDER --out META` makes one)"
        )
    manifest = Manifest.read(config.dataset.data_path)
    sampler = BucketSampler(
        manifest,
        bucket,
        frame_interval=config.dataset.frame_interval,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        drop_last=config.drop_last,
        costs=RunCosts(config, bucket).get_order_costs() if config.balance else None,
    )
    data = TrainingData(manifest, bucket, sampler, sampler.explain(config.model.patch_size[1]))
    starved = [pair for pair in data.explanation.get_empty_pairs() if pair.clips > 0]
    if starved and not config.allow_empty_buckets:
        names = "\n".join(
            f"  bucket_config[{pair.resolution!r}][{pair.frames}]: {pair.clips} clips, batch size {pair.batch_size}"
            for pair in starved
        )
        raise ValueError(
            f"these entries would give zero batches, their clips too few for one batch of any aspect ratio:\n{names}\n"
            "Fix: lower their batch sizes, remove them, set drop_last=False to fill a batch by repeating clips, or set "
            "allow_empty_buckets=True to train without these clips"
        )
    return data
