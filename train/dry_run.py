"""What a run would do, without doing it."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from opensora_fast.config import LoadedConfig, TrainConfig, format_values
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.device import check_device_name
from opensora_fast.encoders import refuse_missing_weights
from opensora_fast.parallel.join import count_replicas, read_place
from opensora_fast.train.checkpoints.start import check_changes, choose_start, find_fitted, refuse_other_place
from opensora_fast.train.checkpoints.state import read_position, refuse_other_data
from opensora_fast.train.checks import check_run
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.inputs.encoders import needs_fit
from opensora_fast.train.inputs.sources import find_features, sample_features


def print_plan(
    loaded: LoadedConfig[TrainConfig],
    device: str | None,
    backend: str,
    linear: str,
    trace_steps: tuple[int, int] | None,
    memory_history: bool,
    out: Path | None,
    resume: str | None,
    init_from: str | None,
) -> None:
    """Print the effective configuration with the origin of each value, and the buckets of the first epoch.

    Of several processes that torchrun has started only rank 0 prints, for all of them. Nothing is downloaded: whether
    a hub has the weights that are named is not known.

    Args:
        loaded: the configuration.
        device: that of the run; None where it is not known, for the run may be on another machine.
        backend, linear, trace_steps, memory_history, resume, init_from: as for `train`.
        out: output folder of the run; None for a new one.

    Raises:
        ValueError: what would also stop the run: what `check_run` refuses, a device of an unknown name, broken
            buckets, a broken table, entries that give no batch, a run or weights to start from that cannot be, features
            of something else, encoders that are not there.
    """
    place = read_place(os.environ)
    if place.rank != 0:
        return
    config = loaded.config
    on = None if device is None else torch.device(check_device_name(device))
    check_run(config, on, backend, linear, trace_steps, memory_history)
    replicas = count_replicas(place.world_size, config.sp_size)
    print(format_values(loaded))
    for note in loaded.notes:
        print(f"note: {note}")
    print()
    with TemporaryDirectory() as new:
        print(_explain(config, out or Path(new), resume, init_from, place.world_size, replicas))


def _explain(
    config: TrainConfig, out: Path, resume: str | None, init_from: str | None, world_size: int, replicas: int
) -> str:
    """What falls into the buckets, after all that `train` looks at before it writes, in its own words."""
    refuse_other_place(out)
    start = choose_start(config, out, resume, init_from, print)
    if config.dataset.data_path is None:
        unknown = "no table of clips is given (--data-path META), so what falls into the buckets is not known"
        return f"{format_table(config)}\n{unknown}"
    data = read_data(config, world_size=replicas)
    if start.resume is not None:
        check_changes(start.resume, config, data, world_size, replicas, print)
    fitted = find_fitted(start, out) if needs_fit(config) else None
    index = None if config.features is None else find_features(config, data, fitted, print)
    if index is not None and index.complete:
        data = sample_features(config, data, index)
        if start.resume is not None:
            refuse_other_data(start.resume, read_position(start.resume), data.get_fingerprint())
        return data.explanation.to_text()
    if config.features is not None:
        print(f"features: not all are in {config.features} yet; the run would make them first")
    if not needs_fit(config):
        refuse_missing_weights(config.vae.get_keys())
    refuse_missing_weights(config.text_encoder.get_keys())
    return data.explanation.to_text()


def format_table(config: TrainConfig) -> str:
    """The buckets that are configured, one line for each (resolution, frames)."""
    lines = [f"{'bucket':<20}{'aspect ratios':>14}{'keep probability':>18}{'batch size':>12}"]
    for resolution in Bucket(config.bucket_config).resolutions:
        for entry in resolution.frames:
            name = f"{resolution.name}, {entry.frames} frames"
            lines.append(
                f"{name:<20}{len(resolution.table.names):>14}{entry.keep_probability:>18}{entry.batch_size or '-':>12}"
            )
    return "\n".join(lines)
