"""Configurations: Open-Sora's files read as data, typed and explained."""

from opensora_fast.config.load import (
    LoadedConfig,
    list_values,
    load_any_config,
    load_sample_config,
    load_train_config,
    to_json,
)
from opensora_fast.config.schema import SampleConfig, TrainConfig
from opensora_fast.config.show import format_values

__all__ = [
    "LoadedConfig",
    "SampleConfig",
    "TrainConfig",
    "format_values",
    "list_values",
    "load_any_config",
    "load_sample_config",
    "load_train_config",
    "to_json",
]
