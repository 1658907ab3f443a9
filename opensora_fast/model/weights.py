"""Reading and writing `config.json` with safetensors weights. Nothing that is read can hold code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_fast.pretrained import Need, locate_pretrained

from .config import STDiT2Config

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EXAMPLE = "hpcai-tech/OpenSora-STDiT-v2-stage3"
NEEDS = (Need("configuration", (CONFIG_NAME,)), Need("weights", (WEIGHTS_NAME, "model-*-of-*.safetensors")))


def resolve_folder(name: str | Path, setting: str = "model.from_pretrained") -> Path:
    """Returns the local folder of `name`; a hub id such as "hpcai-tech/OpenSora-STDiT-v2-stage3" is downloaded.

    `setting` is what gave the name, for messages.

    Raises:
        ValueError: neither a folder nor a hub id, a file is missing in it, or the download failed.
    """
    return locate_pretrained("model", name, NEEDS, example=EXAMPLE, setting=setting)


def load_pretrained(name: str | Path) -> tuple[STDiT2Config, dict[str, Tensor]]:
    """Returns (configuration, state dict) of a folder or hub id.

    Raises:
        ValueError: a file is missing or unreadable, or the configuration has an unknown key.
    """
    folder = resolve_folder(name)
    return read_config(folder), load_state_dict_folder(folder)


def read_config(folder: Path) -> STDiT2Config:
    """Reads `config.json`. ValueError if it is unreadable or has an unknown key."""
    path = folder / CONFIG_NAME
    keys = _read_json(path)
    if not isinstance(keys, dict):
        raise ValueError(f"{path}: must hold one JSON object, not {type(keys).__name__}")
    try:
        return STDiT2Config(**keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_state_dict_folder(folder: Path) -> dict[str, Tensor]:
    """Reads `model.safetensors`, or without it the shards that `model.safetensors.index.json` names, as transformers.

    A model that was saved into a folder of shards is beside their index then.

    Raises:
        ValueError: missing or unreadable.
    """
    names = [WEIGHTS_NAME]
    if not (folder / WEIGHTS_NAME).is_file() and (folder / INDEX_NAME).is_file():
        names = read_shard_names(folder / INDEX_NAME)
    state: dict[str, Tensor] = {}
    for name in names:
        state.update(load_safetensors(require_file(folder, name)))
    return state


def require_file(folder: Path, name: str) -> Path:
    """The path of a file that lies in the folder itself. ValueError if it is missing."""
    path = folder / name
    if path.parent != folder or not path.is_file():
        raise ValueError(f"{path}: missing; the folder is incomplete, copy it again")
    return path


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. ValueError if it is unreadable."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


def read_shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, sorted.

    Raises:
        ValueError: unreadable, or no index of shards.
    """
    content = _read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: not an index of shards, it has no table weight_map of file names; copy it again")
    return sorted(set(shards.values()))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads `state` into `model`; every key must match.

    Raises:
        ValueError: missing or unexpected keys, or shapes that differ, by name.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)


def save_pretrained(config: STDiT2Config, state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, creating it.

    Raises:
        ValueError: this process holds only its share of a tensor.
    """
    for key, value in state.items():
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"save_pretrained: {key} is a DTensor, of which this process holds a share. Gather the state dict in "
                "all processes, torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True, cpu_offload=True)), and give it to "
                "opensora_fast.model.weights.save_pretrained(model.config, state, folder) in one"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"architectures": ["STDiT2"], "model_type": "STDiT2"} | config.model_dump()
    (folder / CONFIG_NAME).write_text(json.dumps(keys, indent=2) + "\n")
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
