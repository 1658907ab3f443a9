"""Reading and writing `config.json` with safetensors weights. Nothing that is read can hold code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.locate import Need, locate_pretrained

from .config import STDiT2Config

if TYPE_CHECKING:
    from .stdit2 import STDiT2

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
NEEDS = (Need("configuration", (CONFIG_NAME,)), Need("weights", (WEIGHTS_NAME, "model-*-of-*.safetensors")))


def resolve_folder(name: str | Path) -> Path:
    """Returns the local folder of `name`; a hub id such as "hpcai-tech/OpenSora-STDiT-v2-stage3" is downloaded.

    Raises:
        ValueError: neither a folder nor a hub id, a file is missing in it, or the download failed.
    """
    return locate_pretrained("model", name, NEEDS, example="hpcai-tech/OpenSora-STDiT-v2-stage3")


def load_pretrained(name: str | Path) -> tuple[STDiT2Config, dict[str, Tensor]]:
    """Returns (configuration, state dict) of a folder or hub id.

    Raises:
        ValueError: a file is missing or unreadable, or the configuration has an unknown key.
    """
    folder = resolve_folder(name)
    config_path = folder / CONFIG_NAME
    try:
        keys = json.loads(config_path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_path}:{error.lineno}: not valid JSON: {error.msg}") from error
    try:
        config = STDiT2Config(**keys)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    return config, load_state_dict_folder(folder)


def load_state_dict_folder(folder: Path) -> dict[str, Tensor]:
    """Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ValueError: missing or unreadable.
    """
    names = [WEIGHTS_NAME]
    if (folder / INDEX_NAME).is_file():
        names = sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{path}: missing; the folder is incomplete, copy it again")
        try:
            state.update(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    return state


def load_strictly(model: STDiT2, state: dict[str, Tensor], source: str | Path) -> None:
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


def save_pretrained(model: STDiT2, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, creating it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"architectures": ["STDiT2"], "model_type": "STDiT2"} | model.config.model_dump()
    (folder / CONFIG_NAME).write_text(json.dumps(keys, indent=2) + "\n")
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
