"""Reading weights from the files that trainers write: one file or shards, bare or under an entry, of any of them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from opensora_fast.pretrained import reads_as_path, why_hollow

from .weights import EXAMPLE, WEIGHTS_NAME, load_safetensors, read_shard_names, require_file, resolve_folder

# Entries under which trainers keep the weights, the best first: averaged weights are the ones to use.
WRAPPERS = ("ema", "state_dict", "model", "module")


def load_checkpoint_file(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU, by name; no code in it is executed.

    Args:
        source: a `.pth`, `.pt`, `.bin` or `.safetensors` file; a folder with one of these files of weights, or with
            shards and their index; a checkpoint folder of Open-Sora's trainer (weights in `model/`); or a hub id.

    Weights under an entry such as "state_dict" or "ema" are taken out of it ("ema" first), a common prefix "module." is
    removed.

    Raises:
        ValueError: missing, unreadable, without weights, or only readable by executing what is in it.
    """
    path = locate_checkpoint_file(source)
    return _unwrap(_load_file(path) if path.is_file() else _load_folder(path), path)


def locate_checkpoint_file(source: str | Path, setting: str = "model.from_pretrained") -> Path:
    """The path that `load_checkpoint_file` reads; what a hub id names is downloaded. ValueError if there is none."""
    return find_checkpoint_file(source, setting) or resolve_folder(source, setting)


def find_checkpoint_file(source: str | Path, setting: str) -> Path | None:
    """The path of a source that is on this machine; None where it can only be a hub id.

    Raises:
        ValueError: there is none; the message names the `setting` that gave the source, and what it takes.
    """
    if not str(source):
        raise ValueError(f"{setting} is missing: give a file or folder of weights, or a hub id such as {EXAMPLE}")
    path = Path(source).expanduser()
    if path.exists():
        return path
    if "/" not in str(source) or reads_as_path(str(source)) or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise ValueError(
            f"{setting}: there is no file or folder {path}; give a file or folder of weights, or a hub id such as "
            f"{EXAMPLE}"
        )
    return None


def _load_file(path: Path) -> object:
    if reason := why_hollow(path):
        raise ValueError(f"{path} {reason}")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors, or is no PyTorch file; reading it could execute code, so it is refused. "
            f"If you trust it, save its weights alone, torch.save(state_dict, ...), or as safetensors "
            f"({str(error).strip().splitlines()[0]:.150})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable PyTorch file ({error}); copy it again") from error


def _load_folder(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder: `model.safetensors`, else shards by their index, those in `model/`, or its only file."""
    if (folder / WEIGHTS_NAME).is_file():
        return _unwrap(_load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    indices = sorted(folder.glob("*.index.json"))
    if indices:
        state: dict[str, Tensor] = {}
        for name in read_shard_names(indices[0]):
            path = require_file(folder, name)
            state.update(_unwrap(_load_file(path), path))
        return state
    if (folder / "model").is_dir():
        return _load_folder(folder / "model")
    for pattern in ("*.safetensors", "*.pth", "*.pt", "*.bin"):
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{folder}: holds {', '.join(file.name for file in files[:4])}; name the one to load")
        if files:
            return _unwrap(_load_file(files[0]), files[0])
    raise ValueError(f"{folder}: holds no weights (.safetensors, .pth, .pt or .bin)")


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]), None)
        if wrapper is None:
            break
        content = content[wrapper]
    state = {}
    if isinstance(content, dict):
        state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        held = f"entries {', '.join(map(str, content))[:100]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: holds no weights ({held}); expected tensors by name, bare or under {WRAPPERS}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state
