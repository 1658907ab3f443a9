"""Files of cached features: latents and text embeddings in safetensors shards, with an index that vouches for them.

    DIR/index.json                   settings, shards with their sizes and SHA-256, whether all is written
    DIR/latents-00000.safetensors    "latents.<i>" [C, T, h, w]; "draws" and "rows" int64 [n] say which they are
    DIR/text-00000.safetensors       "text.<i>" [tokens, C], only real tokens; "rows" int64 [n]

A shard is written beside its name, forced to the disk, renamed, and only then listed, so a process that is killed
leaves no half of one behind. Every shard is compared with its checksum when a feature of it is first read: to do so at
the start of a run would take ten minutes and more for each terabyte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from opensora_fast.files import flush, hash_file, whole_file

VERSION = 1
INDEX_NAME = "index.json"
OPEN_SHARDS = 64


class FeatureError(ValueError):
    """Cached features cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Shard:
    """A line of the index. `kind` is "latents" or "text", `count` the number of entries."""

    file: str
    kind: str
    count: int
    bytes: int
    sha256: str


class FeatureIndex:
    """What is in a folder of features.

    Attributes:
        folder: of the files.
        settings: how the features were made, as given to `FeatureWriter`.
        shards: in the order in which they were written.
        complete: whether everything that was to be written is there; not where a person has removed a damaged shard.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.shards: list[Shard] = []
        self.complete = False

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> FeatureIndex:
        """FeatureError if there is no index or it cannot be read."""
        path = Path(folder) / INDEX_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise FeatureError(f"{path} has version {content['version']}, this program reads {VERSION}")
            index = cls(folder, content["settings"])
            index.shards = [Shard(**shard) for shard in content["shards"]]
            index.complete = bool(content["complete"]) and all(
                (index.folder / shard.file).is_file() for shard in index.shards
            )
        except FileNotFoundError:
            raise FeatureError(
                f"{path} does not exist: there are no cached features in this folder; name another one, or delete what "
                "is left in it and write the features again"
            ) from None
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise FeatureError(
                f"{path} is damaged ({error!r}): delete the folder and write the features again"
            ) from None
        return index

    def write(self) -> None:
        content = {
            "version": VERSION,
            "settings": self.settings,
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        _write_safely(self.folder / INDEX_NAME, (json.dumps(content, indent=1) + "\n").encode())


class FeatureWriter:
    """Writes features into a folder; goes on where an earlier one was stopped.

    Args:
        folder: is made.
        settings: JSON values that say how the features are made; compared with those of the folder, if it has any.
        shard_bytes: shards are written when the tensors kept for them have this size together.

    Raises:
        FeatureError: the folder holds features that were made in another way; the message names the settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], shard_bytes: int = 1 << 28) -> None:
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        settings = json.loads(json.dumps(settings))
        if (self.folder / INDEX_NAME).exists():
            self.index = FeatureIndex.read(folder)
            if different := describe_differences(self.index.settings, settings):
                raise FeatureError(f"{folder} holds features made in another way ({different}): use another folder")
            self.index.shards = [shard for shard in self.index.shards if _is_intact(self.folder / shard.file, shard)]
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.index = FeatureIndex(folder, settings)
            self.index.write()  # before any shard: without an index none could say how that was made
        self._latents: dict[tuple[int, int], torch.Tensor] = {}
        self._text: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0
        written = FeatureReader(self.index)
        self._have_latents = set(written.latent_places)
        self._have_text = set(written.text_places)

    def has_latents(self, draw: int, row: int) -> bool:
        return (draw, row) in self._have_latents

    def has_text(self, row: int) -> bool:
        return row in self._have_text

    def add_latents(self, draw: int, row: int, latents: torch.Tensor) -> None:
        """Keep [C, T, h, w] for a row in a draw. Nothing if it is there already."""
        if self.has_latents(draw, row):
            return
        self._latents[draw, row] = latents.detach().to("cpu", copy=True).contiguous()
        self._have_latents.add((draw, row))
        self._keep(latents.nbytes)

    def add_text(self, row: int, embeddings: torch.Tensor) -> None:
        """Keep the embeddings [tokens, C] of the real tokens of a row's caption. Nothing if they are there already."""
        if self.has_text(row):
            return
        self._text[row] = embeddings.detach().to("cpu", copy=True).contiguous()
        self._have_text.add(row)
        self._keep(embeddings.nbytes)

    def _keep(self, count: int) -> None:
        self._kept_bytes += count
        if self._kept_bytes >= self.shard_bytes:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Write what is kept, and the index."""
        if self._latents:
            tensors = {f"latents.{place}": tensor for place, tensor in enumerate(self._latents.values())}
            tensors["draws"] = torch.tensor([draw for draw, _ in self._latents])
            tensors["rows"] = torch.tensor([row for _, row in self._latents])
            self._write_shard("latents", len(self._latents), tensors)
            self._latents = {}
        if self._text:
            tensors = {f"text.{place}": tensor for place, tensor in enumerate(self._text.values())}
            tensors["rows"] = torch.tensor(list(self._text))
            self._write_shard("text", len(self._text), tensors)
            self._text = {}
        self._kept_bytes = 0
        self.index.complete = complete
        self.index.write()

    def _write_shard(self, kind: str, count: int, tensors: dict[str, torch.Tensor]) -> None:
        import safetensors.torch

        content = safetensors.torch.save(tensors)
        used = {shard.file for shard in self.index.shards}
        number = next(n for n in range(len(used) + 1) if f"{kind}-{n:05d}.safetensors" not in used)
        name = f"{kind}-{number:05d}.safetensors"
        _write_safely(self.folder / name, content)
        self.index.shards.append(Shard(name, kind, count, len(content), hashlib.sha256(content).hexdigest()))


class FeatureReader:
    """Reads single features.

    Args:
        index: of the folder.

    Attributes:
        latent_places: (draw, row) -> (shard, place in it).
        text_places: row -> (shard, place in it).
    """

    def __init__(self, index: FeatureIndex) -> None:
        self.index = index
        self.latent_places: dict[tuple[int, int], tuple[int, int]] = {}
        self.text_places: dict[int, tuple[int, int]] = {}
        self._verified: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        for number, shard in enumerate(index.shards):
            rows = self._get(number, "rows").tolist()
            if shard.kind == "text":
                self.text_places.update((row, (number, place)) for place, row in enumerate(rows))
                continue
            draws = self._get(number, "draws").tolist()
            for place, (draw, row) in enumerate(zip(draws, rows, strict=True)):
                self.latent_places[draw, row] = number, place

    def get_latents(self, draw: int, row: int) -> torch.Tensor:
        """[C, T, h, w]. KeyError if they were not written."""
        number, place = self.latent_places[draw, row]
        self._verify(number)
        return self._get(number, f"latents.{place}")

    def get_text(self, row: int) -> torch.Tensor:
        """[tokens, C]. KeyError if they were not written."""
        number, place = self.text_places[row]
        self._verify(number)
        return self._get(number, f"text.{place}")

    def verify_all(self) -> None:
        """Read all shards. FeatureError that names the first one that is not as it was written."""
        for number in range(len(self.index.shards)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        if number in self._verified:
            return
        shard = self.index.shards[number]
        try:
            found = hash_file(self.index.folder / shard.file)
        except OSError as error:
            raise self._unusable(number, str(error)) from None
        if found != shard.sha256:
            raise self._unusable(number, "its content has changed since it was written")
        self._verified.add(number)

    def _get(self, number: int, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            # A copy: what is read is a view of the mapped file, and touching it is fatal once the file has been cut.
            return self._open_shard(number).get_tensor(name).clone()
        except (OSError, SafetensorError) as error:
            raise self._unusable(number, str(error)) from None

    def _open_shard(self, number: int) -> Any:
        from safetensors import safe_open

        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.index.shards[number]
        path = self.index.folder / shard.file
        if path.stat().st_size != shard.bytes:
            raise self._unusable(number, f"it has {path.stat().st_size} bytes, {shard.bytes} were written")
        self._open[number] = safe_open(path, framework="pt")
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _unusable(self, number: int, reason: str) -> FeatureError:
        path = self.index.folder / self.index.shards[number].file
        return FeatureError(
            f"the shard {path} cannot be used: {reason}. Delete it and write the features again into the same folder; "
            "only what is missing is made anew"
        )


def _is_intact(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes and hash_file(path) == shard.sha256


def describe_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings that differ, by their dotted names, with their values there and here; empty if none does."""
    there, here = dict(_flatten(there)), dict(_flatten(here))
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names)[:600]


def _flatten(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in _flatten(value))
        else:
            yield name, value


def _write_safely(path: Path, content: bytes) -> None:
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
            flush(part)
    except OSError as error:  # that of a full disk has no name of a file
        raise FeatureError(
            f"the features {path} could not be written: {error}. Once they can be, the same command goes on with them"
        ) from error
    flush(path.parent)
