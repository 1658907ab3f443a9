"""Train from latents and text embeddings that were computed once: neither videos, VAE nor T5 are needed then.

What is stored. A *draw* is one pass over the clips as training would make it: in draw d every clip is put into the
bucket that epoch d puts it into (keep probabilities), and the frames that epoch d takes are taken (random start). Its
latents are stored under (d, row); captions do not depend on the draw and are stored once. Training reads draw e mod
`draws` in epoch e. So with n draws, the first n epochs see exactly the clips that training from the videos would see,
and later epochs see the same clips again in other micro-batches and another order. (A clip that
cannot be decoded is missing here, where training from videos would replace it.) The latents are what the video
encoder returned: for the SD VAE one sample of its posterior per draw.

Batch sizes are free: they may differ between writing and training. Resolutions, frames and keep probabilities may not;
the folder knows them. The draws and their order are those of the seed that they were made with, whatever that of the
training is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opensora_fast.data.batch import Batch
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.data.buckets.plan import ClipSizes, EpochPlan, balance_plan
from opensora_fast.data.buckets.sampler import BucketSampler, MicroBatch
from opensora_fast.data.epoch_loader import EpochLoader
from opensora_fast.data.feature_store import FeatureError, FeatureIndex, FeatureReader, FeatureWriter
from opensora_fast.data.loader import ClipLoader
from opensora_fast.data.manifest import Manifest
from opensora_fast.encoders import TextEncoder, VideoEncoder
from opensora_fast.progress import Progress


def write_features(
    loader: ClipLoader,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder,
    folder: str | os.PathLike[str],
    *,
    draws: int = 1,
    encoders: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = 1 << 28,
) -> FeatureIndex:
    """Encode all clips of a loader and store the features. Started again after a stop, it makes what is missing.

    Args:
        loader: over all clips, of one process (world size 1), its sampler without `drop_last`.
        video_encoder: to latents; it draws from a generator seeded with (seed, draw, number of the micro-batch).
        text_encoder: to embeddings.
        folder: is made.
        draws: passes over the clips, see above.
        encoders: what the encoders are (their configuration), kept with the features and compared when going on.
        device: where the encoders are.
        shard_bytes: size of a file, about.

    Raises:
        FeatureError: the folder holds features made in another way, or they cannot be written.
        ValueError: the loader is not as it should be.
    """
    sampler = loader.sampler
    if sampler.world_size != 1 or sampler.drop_last:
        raise ValueError("features are written by one process with drop_last=False, or clips would be missing")
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}")
    settings = {
        "draws": draws,
        "seed": loader.seed,
        "sampler_seed": sampler.seed,
        "frame_interval": sampler.frame_interval,
        "buckets": describe_buckets(sampler.bucket),
        "manifest": fingerprint(loader.manifest),
        "text_length": text_encoder.model_max_length,
        "text_channels": text_encoder.output_dim,
        "encoders": encoders or {},
    }
    writer = FeatureWriter(folder, settings, shard_bytes)

    def is_missing(micro_batch: MicroBatch) -> bool:
        draw, rows = micro_batch.epoch, micro_batch.rows
        return not all(writer.has_latents(draw, row) and writer.has_text(row) for row in rows)

    try:
        for draw in range(draws):
            total, done = len(sampler.get_plan(draw)), 0
            with Progress(f"encode clips, draw {draw + 1}/{draws}", total=total, unit="micro-batches") as progress:
                for batch in loader.load(filter(is_missing, sampler.iterate(draw, 0))):
                    _encode(batch, video_encoder, text_encoder, writer, loader.seed, device)
                    progress.advance(batch.index + 1 - done)
                    done = batch.index + 1
                progress.advance(total - done)
    finally:
        writer.flush()
    writer.flush(complete=True)
    return writer.index


def _encode(
    batch: Batch,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder,
    writer: FeatureWriter,
    seed: int,
    device: torch.device | str,
) -> None:
    (state,) = np.random.SeedSequence((seed, batch.epoch, batch.index)).generate_state(1, np.uint64)
    generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
    with torch.no_grad():
        latents = video_encoder.encode(batch.video.to(device), generator=generator)
    for row, clip_latents in zip(batch.rows, latents, strict=True):
        writer.add_latents(batch.epoch, row, clip_latents)
    # By row: a micro-batch that is filled up holds some clips twice.
    captions = {row: text for row, text in zip(batch.rows, batch.text, strict=True) if not writer.has_text(row)}
    if not captions:
        return
    with torch.no_grad():
        encoding = text_encoder.encode(list(captions.values()))
    for row, embeddings, mask in zip(captions, encoding["y"], encoding["mask"], strict=True):
        length = int(mask.sum())
        if not bool(mask[:length].all()):
            raise ValueError("the text encoder must put the real tokens first")
        writer.add_text(row, embeddings[0, :length])


def describe_buckets(bucket: Bucket) -> list[list]:
    """What decides in which bucket a clip is: [resolution, frames, keep probability], in the order of trying."""
    return [
        [resolution.name, entry.frames, entry.keep_probability]
        for resolution in bucket.resolutions
        for entry in resolution.frames
    ]


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 of the columns that features depend on: path, text and sizes of every row."""
    digest = hashlib.sha256()
    for column in (manifest.num_frames, manifest.height, manifest.width):
        digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    for name in ("path", "text"):
        for value in manifest.table[name]:
            digest.update(value.encode() + b"\0")
    return digest.hexdigest()


def refuse_other_clips(index: FeatureIndex, manifest: Manifest, bucket: Bucket) -> None:
    """FeatureError if features were made from another table, or for other buckets."""
    settings = index.settings
    if settings["manifest"] != fingerprint(manifest):
        raise FeatureError(
            f"the features in {index.folder} belong to another table than {manifest.source}: paths, captions or "
            "sizes differ; use the table they were made from, or make them anew in another folder"
        )
    if settings["buckets"] != describe_buckets(bucket):
        raise FeatureError(
            f"the features in {index.folder} belong to other buckets: {settings['buckets']}, here "
            f"{describe_buckets(bucket)}; batch sizes may differ, nothing else"
        )


class FeatureSampler(BucketSampler):
    """Micro-batches of the clips whose features are stored; used like a `BucketSampler`.

    Args:
        manifest: the table of clips that the features were made from.
        bucket: resolutions, frames and keep probabilities as when they were made; batch sizes are free.
        reader: of the features.
        rank, world_size, drop_last, costs: as for `BucketSampler`.

    Raises:
        FeatureError: the features belong to other clips or buckets, or are not complete.
    """

    def __init__(self, manifest: Manifest, bucket: Bucket, reader: FeatureReader, **options: Any) -> None:
        index = reader.index
        settings = index.settings
        if not index.complete:
            raise FeatureError(f"the features in {index.folder} are not complete: run what writes them again")
        refuse_other_clips(index, manifest, bucket)
        self.reader = reader
        self.draws = int(settings["draws"])
        super().__init__(
            manifest, bucket, frame_interval=settings["frame_interval"], seed=settings["sampler_seed"], **options
        )

    def _make_plan(self, epoch: int) -> EpochPlan:
        """The micro-batches of the epoch's draw, in the first `draws` epochs in the draw's own order."""
        draw = epoch % self.draws
        plan = self._plan_clips(self._find_stored(draw), draw)
        if epoch != draw:
            plan = _shuffle_again(plan, self.seed, epoch)
        plan = dataclasses.replace(plan, epoch=epoch)
        if self.costs is not None:
            plan = balance_plan(plan, self.costs, self.seed)
        return plan

    def _has_equal_epochs(self) -> bool:
        return self.draws == 1

    def _find_stored(self, draw: int) -> ClipSizes:
        """The table in which clips without features in this draw have no frames, so that no bucket takes them."""
        stored = np.zeros(len(self.clips.num_frames), bool)
        rows = [row for written_draw, row in self.reader.latent_places if written_draw == draw]
        if not all(0 <= row < len(stored) for row in rows):
            self.reader.verify_all()  # one of the shards is damaged: this says which
        stored[rows] = True
        return _Sizes(np.where(stored, self.clips.num_frames, 0), self.clips.height, self.clips.width)


@dataclass(frozen=True)
class _Sizes:
    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray


def _shuffle_again(plan: EpochPlan, seed: int, epoch: int) -> EpochPlan:
    """The same clips in the same buckets, in other micro-batches and another order."""
    random = np.random.PCG64(np.random.SeedSequence((seed, epoch, 2)))
    within_buckets = np.lexsort((random.random_raw(len(plan.rows)), plan.assigned[plan.rows]))
    order = np.argsort(random.random_raw(len(plan)), kind="stable")
    return dataclasses.replace(
        plan, rows=plan.rows[within_buckets], bucket_of=plan.bucket_of[order], number_of=plan.number_of[order]
    )


class FeatureLoader(EpochLoader):
    """Makes batches from cached features; used like a `ClipLoader`, without a decoder or encoders.

    `Batch.video` is None; `latents`, `text_embeddings` [B, 1, L, C] and `text_mask` [B, L] are set. The manifest is
    that which the features were made from, the sampler a `FeatureSampler`.
    """

    sampler: FeatureSampler

    def _make_batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[Batch]:
        return map(self._read, micro_batches)

    def _read(self, micro_batch: MicroBatch) -> Batch:
        """One micro-batch. FeatureError if a shard cannot be used."""
        settings, reader = self.sampler.reader.index.settings, self.sampler.reader
        rows = micro_batch.rows
        latents = torch.stack([reader.get_latents(micro_batch.epoch % self.sampler.draws, row) for row in rows])
        texts = [reader.get_text(row) for row in rows]
        embeddings = texts[0].new_zeros(len(rows), 1, settings["text_length"], settings["text_channels"])
        mask = torch.zeros(len(rows), settings["text_length"], dtype=torch.int64)
        for place, text in enumerate(texts):
            embeddings[place, 0, : len(text)] = text
            mask[place, : len(text)] = 1
        return self._make_batch(
            micro_batch, rows, video=None, latents=latents, text_embeddings=embeddings, text_mask=mask
        )
