"""Wrong results: they get no time, so they have no row; each is a line of JSON beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..rows import Row
from .accuracy import Part

REFUSED_FILE = "refused.jsonl"


@dataclass(frozen=True)
class Refused:
    """A provider whose result was wrong: it gets no time; `parts`: the tensors of the result that err most."""

    row: Row
    result: str
    error: float
    limit: float
    parts: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return format_refused(_describe(self))


def append_refused(folder: Path, items: Iterable[Refused]) -> None:
    lines = [json.dumps(_describe(item)) + "\n" for item in items]
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / REFUSED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(lines)


def read_refused(folder: Path) -> list[dict[str, Any]]:
    """What `append_refused` wrote into a folder of results; [] where it wrote nothing.

    Raises:
        ValueError: a line that is broken, by file and line.
    """
    path = folder / REFUSED_FILE
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            items.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a refused row: {error}; delete this line") from error
    return items


def format_refused(item: Mapping[str, Any]) -> str:
    """In one line what `read_refused` gives of a provider."""
    error = f"{item['error']:.3g}, over its limit {item['error_limit']:.3g}"
    parts = ", ".join(format_parts(item))
    return f"{item['name']}: the error of its {item['result']} is {error}{f'; most of it: {parts}' if parts else ''}"


def format_parts(item: Mapping[str, Any]) -> list[str]:
    """The tensors of a refused result that err most; those of earlier versions have none."""
    return [str(Part(**part)) for part in item.get("parts", ())]


def without_refused_time(row: Row, item: Mapping[str, Any]) -> Row:
    """A row whose provider was wrong later, as `read_refused` says it: failed."""
    error = f"{item['error']:.3g} of at most {item['error_limit']:.3g}"
    return row.without_time("failed", f"wrong, the error of its {item['result']} is {error}")


def _describe(item: Refused) -> dict[str, Any]:
    environment = item.row.environment
    return {
        "name": item.row.name,
        "key": list(item.row.key),
        "result": item.result,
        "error": item.error,
        "error_limit": item.limit,
        "parts": [asdict(part) for part in item.parts],
        "device_name": environment.device_name if environment else "",
        "commit": environment.commit if environment else "",
        "dirty": environment.dirty if environment else False,
        "date": environment.date if environment else "",
    }
