"""What a run would do, without doing it."""

import os

import torch

from opensora_fast.config import LoadedConfig, TrainConfig, format_values
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.device import check_device_name
from opensora_fast.parallel.join import count_replicas, read_place
from opensora_fast.train.checks import check_run
from opensora_fast.train.inputs.data import read_data


def print_plan(
    loaded: LoadedConfig[TrainConfig],
    device: str | None,
    backend: str,
    linear: str,
    trace_steps: tuple[int, int] | None,
    memory_history: bool,
) -> None:
    """Print the effective configuration with the origin of each value, and the buckets of the first epoch.

    Of several processes that torchrun has started only rank 0 prints, for all of them.

    Args:
        loaded: the configuration.
        device: that of the run; None where it is not known, for the run may be on another machine.
        backend, linear, trace_steps, memory_history: as for `train`.

    Raises:
        ValueError: what would also stop the run: what `check_run` refuses, a device of an unknown name, broken
            buckets, a broken table, entries that give no batch.
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
    if config.dataset.data_path is None:
        print(format_table(config))
        print("no table of clips is given (--data-path META), so what falls into the buckets is not known")
        return
    data = read_data(config, world_size=replicas)
    print(data.explanation.to_text())


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
