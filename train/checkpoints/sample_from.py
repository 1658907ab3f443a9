"""What sampling takes of a run of `train`, and in what it differs from the training."""

from collections.abc import Callable
from pathlib import Path

from opensora_fast.config import SampleConfig, load_train_config
from opensora_fast.train.checkpoints.start import CHECKPOINT_CONFIG, find_checkpoint, find_whole
from opensora_fast.train.inputs.encoders import FITTED, needs_fit

# What a model has learned to read and to predict; `opensora_fast.sampling.build.load_model` compares the rest.
AS_TRAINED = {
    "vae": ("type",),
    "text_encoder": ("type", "clean_captions", "output_dim", "depth", "seed"),
    "scheduler": ("noise_schedule", "predict_xstart", "learn_sigma", "diffusion_steps"),
}


def sample_from_run(config: SampleConfig, report: Callable[[str], None]) -> None:
    """Where the weights of a configuration are those of a run or checkpoint, put into it their average, unless one of
    the checkpoint's models is named, and the autoencoder that was fitted for them, unless one is named.

    Args:
        config: is changed.
        report: is told what else the weights were trained with than the configuration samples with.
    """
    weights = config.model.from_pretrained
    checkpoint = find_checkpoint(weights, report)
    if checkpoint is not None:
        config.model.from_pretrained = str(checkpoint / "ema")
    elif weights:
        checkpoint = find_whole(Path(weights))
    if checkpoint is None:
        return
    if needs_fit(config) and (checkpoint / FITTED).is_dir():
        config.vae.from_pretrained = str(checkpoint / FITTED)
    if not (checkpoint / CHECKPOINT_CONFIG).is_file():
        return
    trained = load_train_config(checkpoint / CHECKPOINT_CONFIG).config
    for section, keys in AS_TRAINED.items():
        for key in keys:
            here, there = (getattr(getattr(one, section), key) for one in (config, trained))
            if here != there:
                report(f"{section}.{key} is {here!r}, {checkpoint} was trained with {there!r}")
