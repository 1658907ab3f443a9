"""The encoders of a run. A linear autoencoder without a folder is fitted on the run's own clips and kept with it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from opensora_fast.config import SampleConfig, TrainConfig
from opensora_fast.data.decoding.clips import BadClip, ClipRequest, Decoder, choose_frames
from opensora_fast.data.feature_store import INDEX_NAME
from opensora_fast.encoders import TextEncoder, VideoEncoder, build_text_encoder, build_video_encoder, choose_text_dtype
from opensora_fast.encoders.linear_autoencoder import WEIGHTS_NAME, LinearAutoencoder
from opensora_fast.progress import Progress
from opensora_fast.train.inputs.data import TrainingData

FITTED = Path("encoders") / "vae"
# Clips and frames of each that the components are fitted on: a few hundred thousand patches, a few seconds.
CLIPS_TO_FIT = 32
FRAMES_TO_FIT = 4


def needs_fit(config: TrainConfig | SampleConfig) -> bool:
    """Whether the run has its own linear autoencoder, in `DIR/encoders/vae`."""
    return config.vae.type == "linear" and config.vae.from_pretrained is None


def build_encoders(
    config: TrainConfig, folder: Path, data: TrainingData, decoder: Decoder, device: torch.device, dtype: torch.dtype
) -> tuple[VideoEncoder, TextEncoder]:
    """Video and text encoder on the device, frozen; fits the linear autoencoder first if the run has none yet."""
    keys = config.vae.get_keys()
    if needs_fit(config):
        fitted = folder / FITTED
        if not fitted.is_dir():
            autoencoder = fit_linear_autoencoder(data, decoder, config.seed)
            _place(fitted, autoencoder.save_pretrained)
        keys["from_pretrained"] = fitted
    video_encoder = build_video_encoder(keys, device=device, dtype=dtype)
    text_dtype = choose_text_dtype(config.text_encoder.shardformer, dtype)
    return video_encoder, build_text_encoder(config.text_encoder.get_keys(), device=device, dtype=text_dtype)


def adopt_fitted(source: Path, folder: Path) -> None:
    """Copy the fitted autoencoder that lies in a checkpoint or run into this run, unless it has one."""
    if (source / FITTED).is_dir() and not (folder / FITTED).is_dir():
        _place(folder / FITTED, lambda part: shutil.copytree(source / FITTED, part, dirs_exist_ok=True))


def discard_fitted(folder: Path, report: Callable[[str], None]) -> None:
    """Remove the autoencoder that a run without a step has left, as it may be of other clips. Cached features in the
    folder need theirs, and what else lies there is not ours."""
    if (folder / FITTED / WEIGHTS_NAME).is_file() and not (folder / INDEX_NAME).exists():
        shutil.rmtree(folder / FITTED)
        report(f"note: {folder / FITTED}, left by a run without a step, is not used, but removed")


def holds_other_fitted(source: Path, folder: Path) -> bool:
    """Whether both have a fitted autoencoder, and not the same one."""
    one, other = source / FITTED / WEIGHTS_NAME, folder / FITTED / WEIGHTS_NAME
    return one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes()


def copy_fitted(folder: Path, target: Path) -> None:
    """Copy the run's fitted autoencoder, if it has one, into a checkpoint, which can then be used by itself."""
    if (folder / FITTED).is_dir():
        shutil.copytree(folder / FITTED, target / FITTED)


def fit_linear_autoencoder(data: TrainingData, decoder: Decoder, seed: int) -> LinearAutoencoder:
    """Fit on frames of some clips of the first epoch, at the sizes of their buckets; the same for the same seed."""
    plan = data.sampler.get_plan(0)
    rows = np.sort(plan.rows)
    rows = rows[np.linspace(0, len(rows) - 1, min(CLIPS_TO_FIT, len(rows)), dtype=int)]
    with Progress("fit the linear autoencoder", total=len(rows), unit="clips") as progress:

        def read_clips():
            for row in rows.tolist():
                request = _make_request(data, row, int(plan.assigned[row]), seed)
                (clip,) = decoder.decode([request])
                progress.advance(1)
                if isinstance(clip, BadClip):
                    progress.note(f"left out of the fit: {clip.path}: {clip.reason}")
                else:
                    yield clip.cpu()

        return LinearAutoencoder.fit(read_clips())


def _make_request(data: TrainingData, row: int, bucket_index: int, seed: int) -> ClipRequest:
    clip = data.manifest.clip(row)
    _, height, width = data.bucket.get_thw(data.bucket.ids[bucket_index])
    rng = np.random.default_rng((seed, row))
    frames = choose_frames(clip.num_frames, min(FRAMES_TO_FIT, clip.num_frames), 1, rng)
    return ClipRequest(row=row, path=clip.path, frames=frames, size=(height, width))


def _place(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let a folder appear whole or not at all. ValueError if the disk does not take it."""
    part = folder.with_name(f".unfinished-{folder.name}")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        fill(part)
        os.rename(part, folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise ValueError(f"the autoencoder {folder} could not be written: {error}") from error
        raise
