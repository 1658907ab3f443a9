"""Where batches come from: clips, decoded and encoded at every step, or features that were encoded once."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opensora_fast.config import TrainConfig
from opensora_fast.data.buckets.sampler import BucketSampler
from opensora_fast.data.decoding.decoders import build_decoder
from opensora_fast.data.feature_store import FeatureError, FeatureIndex, FeatureReader, describe_differences
from opensora_fast.data.features import FeatureLoader, FeatureSampler, refuse_other_clips, write_features
from opensora_fast.data.loader import ClipLoader
from opensora_fast.encoders import fingerprint_weights, get_model_keys
from opensora_fast.folder_lock import hold_folder
from opensora_fast.train.inputs.data import TrainingData
from opensora_fast.train.inputs.encoders import FITTED, adopt_fitted, build_encoders, holds_other_fitted, needs_fit
from opensora_fast.train.inputs.model_inputs import ModelInputs

Report = Callable[[str], None]


@dataclass(frozen=True)
class SourceFacts:
    """What one must know of batches without reading them.

    Attributes:
        model_keys: of the model's configuration, which their encoders decided.
        steps: of the first epoch.
        fingerprint: of their order, see `TrainingData`.
    """

    model_keys: dict[str, int]
    steps: int
    fingerprint: str


@dataclass
class Source:
    """Batches and what turns them into the model's inputs.

    Attributes:
        data: table, buckets and the sampler that gives the order.
        inputs: encodes batches, or passes on their features.
        model_keys: of the model's configuration, which the encoders decide.
        loader: yields the batches, epoch by epoch.
    """

    data: TrainingData
    inputs: ModelInputs
    model_keys: dict[str, int]
    loader: ClipLoader | FeatureLoader

    def get_facts(self) -> SourceFacts:
        """Of the batches of this source."""
        return SourceFacts(self.model_keys, self.data.explanation.steps, self.data.get_fingerprint())

    def close(self) -> None:
        """End threads and processes of loader and decoder."""
        self.loader.close()


def open_clips(
    config: TrainConfig, data: TrainingData, out: Path, device: torch.device, dtype: torch.dtype, report: Report
) -> Source:
    """Clips, decoded ahead of the step; fits the run's own autoencoder first if it has none yet."""
    decoder = build_decoder(config.decoder, device=device.type, threads=config.num_workers or None, report=report)
    try:
        video_encoder, text_encoder = build_encoders(config, out, data, decoder, device, dtype)
    except BaseException:
        decoder.close()
        raise
    return Source(
        data=data,
        inputs=ModelInputs(video_encoder, text_encoder, device),
        model_keys=get_model_keys(video_encoder, text_encoder),
        loader=ClipLoader(
            data.manifest,
            data.sampler,
            decoder,
            seed=config.seed,
            prefetch=config.prefetch,
            bad_clips_path=out / "bad_clips.jsonl",
            fps_after_interval=config.dataset.fps_after_interval,
            pin_memory=device.type == "cuda",
            report=report,
        ),
    )


def open_features(
    config: TrainConfig, data: TrainingData, out: Path, device: torch.device, dtype: torch.dtype, report: Report
) -> Source:
    """Features in the folder `features` of the configuration; they are written first if they are not all there.

    Raises:
        ValueError: the folder holds features of other clips, buckets or encoders.
    """
    folder = Path(config.features)
    index = find_features(config, data, out, report)
    adopt_fitted(folder, out)
    if index is None or not index.complete:
        _write(config, data, out, folder, index, device, dtype, report)
        index = FeatureIndex.read(folder)
    data = sample_features(config, data, index)
    reader = data.sampler.reader
    latents = reader.get_latents(*next(iter(reader.latent_places)))
    report(f"features: {len(reader.latent_places)} clips and {len(reader.text_places)} captions in {folder}")
    return Source(
        data=data,
        inputs=ModelInputs(None, None, device),
        model_keys={
            "in_channels": latents.shape[0],
            "caption_channels": index.settings["text_channels"],
            "model_max_length": index.settings["text_length"],
        },
        loader=FeatureLoader(
            data.manifest,
            data.sampler,
            prefetch=config.prefetch,
            fps_after_interval=config.dataset.fps_after_interval,
            pin_memory=device.type == "cuda",
        ),
    )


def find_features(config: TrainConfig, data: TrainingData, holder: Path | None, report: Report) -> FeatureIndex | None:
    """What there is of the features that the configuration names; None where all of them are still to be made.

    Args:
        config, data: of the run.
        holder: the folder with its fitted autoencoder, if it has one yet.
        report: is told what cannot be compared.

    Raises:
        ValueError: the folder holds features of other clips, buckets or encoders.
    """
    folder = Path(config.features)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"features={folder} is a file; name the folder that holds them, or where to make them")
    if needs_fit(config) and holder is not None and holds_other_fitted(folder, holder):
        raise ValueError(
            f"features={folder} were made with another linear autoencoder than this run has, in {holder / FITTED}: "
            "name a folder that is not there yet, and they are made with this one"
        )
    try:
        index = FeatureIndex.read(folder)
    except FeatureError:
        if folder.exists() and any(folder.glob("*.safetensors")):
            raise
        return None
    if needs_fit(config) and not any(place and (place / FITTED).is_dir() for place in (folder, holder)):
        raise ValueError(
            f"features={folder} lack {folder / FITTED}, the linear autoencoder that they were made with, and nothing "
            "else can decode what is trained on them: copy it there, or name a folder that is not there yet"
        )
    made_with = index.settings["encoders"]
    if different := describe_differences(made_with, _describe_as_known(config, folder, made_with, report)):
        raise ValueError(
            f"features={folder} were made with other encoders ({different}): use the same encoders, or another folder"
        )
    for key, value in (("frame_interval", config.dataset.frame_interval), ("draws", config.feature_draws)):
        if index.settings[key] != value:
            raise ValueError(f"features={folder} were made with {key}={index.settings[key]}, not {value}")
    refuse_other_clips(index, data.manifest, data.bucket)
    if (seed := index.settings["seed"]) != config.seed:
        if not index.complete:
            raise ValueError(
                f"features={folder} are not complete, and were begun with seed={seed}: go on with that seed until they "
                "are, or name a folder that is not there yet"
            )
        report(
            f"note: features={folder} were made with seed={seed}, which decides which clips come when; "
            f"seed={config.seed} decides the rest: weights, times and noise"
        )
    return index


def sample_features(config: TrainConfig, data: TrainingData, index: FeatureIndex) -> TrainingData:
    """The data of a run on complete features of its clips. FeatureError where a file of them cannot be read."""
    sampler = FeatureSampler(
        data.manifest,
        data.bucket,
        FeatureReader(index),
        rank=data.sampler.rank,
        world_size=data.sampler.world_size,
        drop_last=config.drop_last,
        costs=data.sampler.costs,
    )
    return replace(data, sampler=sampler, explanation=sampler.explain(config.model.patch_size[1]))


def _describe_as_known(config: TrainConfig, folder: Path, made_with: dict[str, Any], report: Report) -> dict[str, Any]:
    """The encoders of the configuration, to be compared with those that features were made with. Of weights from the
    same place of which only one of them says what is in the files, both say the same; `report` is told."""
    here = describe_encoders(config)
    for name in ("vae", "text_encoder"):
        written = made_with.get(name, {})
        there, source = written.get("weights"), here[name].get("from_pretrained")
        if (there is None) != ("weights" not in here[name]) and written.get("from_pretrained") == source:
            reason = (
                "they come from a version that did not write down what was in those files"
                if there is None
                else "those are not on this machine"
            )
            report(f"note: features={folder} cannot be compared with the weights of {name} in {source}: {reason}")
            here[name]["weights"] = there
    return here


def describe_encoders(config: TrainConfig) -> dict[str, Any]:
    """What features depend on in the encoders: their types and weights, not how they are run. What is in the files of
    the weights is among it where they are on this machine."""
    vae = {key: value for key, value in config.vae.get_keys().items() if key in ("type", "from_pretrained", "latents")}
    ignored = ("cache_dir", "local_files_only")
    text = {key: value for key, value in config.text_encoder.get_keys().items() if key not in ignored}
    for described, section in ((vae, config.vae), (text, config.text_encoder)):
        if weights := fingerprint_weights(section.get_keys()):
            described["weights"] = weights
    return {"vae": vae, "text_encoder": text, "dtype": config.dtype}


def _write(
    config: TrainConfig,
    data: TrainingData,
    out: Path,
    folder: Path,
    index: FeatureIndex | None,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> None:
    """Make what is not in the index yet, or all where there is none."""
    report(f"features: encoding {len(data.manifest)} clips into {folder}, {config.feature_draws} times each")
    sampler = BucketSampler(
        data.manifest, data.bucket, frame_interval=config.dataset.frame_interval, seed=config.seed, drop_last=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    # The run holds its own folder already, and closing a file of it a second time would let go of that.
    with nullcontext() if folder.samefile(out) else hold_folder(folder, report):
        clips = open_clips(config, replace(data, sampler=sampler), out, device, dtype, report)
        try:
            # Before any feature: another run may go on with those that are there, and needs this autoencoder for them.
            adopt_fitted(out, folder)
            made_with = {} if index is None else index.settings["encoders"]
            write_features(
                clips.loader,
                clips.inputs.video_encoder,
                clips.inputs.text_encoder,
                folder,
                draws=config.feature_draws,
                # Again, since weights may have been downloaded; what cannot be compared has been told.
                encoders=_describe_as_known(config, folder, made_with, report=lambda note: None),
                device=device,
            )
        finally:
            clips.close()
