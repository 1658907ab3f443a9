"""Tables of sizes: each resolution has a pixel count and, per aspect ratio (height / width), a height and a width."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from opensora_fast.suggest import suggest


@dataclass(frozen=True)
class AspectTable:
    """The sizes of one resolution.

    `sizes` maps a ratio's name, its height / width rounded to two digits, to (height, width) in pixels. The order of
    the entries matters: of two equally near ratios the first one is taken.
    """

    resolution: str
    pixels: int
    sizes: dict[str, tuple[int, int]]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @functools.cached_property
    def ratios(self) -> np.ndarray:
        """float64 [number of ratios], in table order."""
        return np.array([float(name) for name in self.sizes])

    def nearest(self, height: int, width: int) -> str:
        """Name of the ratio nearest to height / width."""
        return self.names[int(np.argmin(np.abs(self.ratios - height / width)))]

    def nearest_index(self, ratio: np.ndarray) -> np.ndarray:
        """What `nearest` gives for many: for height / width, float64 [n], the indices into `names`, int64 [n]."""
        order = np.argsort(self.ratios, kind="stable")
        ascending = self.ratios[order]
        above = np.clip(np.searchsorted(ascending, ratio), 1, len(ascending) - 1)
        below = above - 1
        distance_below = np.abs(ascending[below] - ratio)
        distance_above = np.abs(ascending[above] - ratio)
        index_below, index_above = order[below], order[above]
        first_in_table = np.minimum(index_below, index_above)
        return np.where(
            distance_below < distance_above,
            index_below,
            np.where(distance_above < distance_below, index_above, first_in_table),
        )


@functools.cache
def load_aspect_tables() -> dict[str, AspectTable]:
    """Every known resolution, by name."""
    content = files("opensora_fast.data.buckets").joinpath("tables/aspect_ratios.json").read_text(encoding="utf-8")
    return {
        name: AspectTable(
            resolution=name,
            pixels=entry["pixels"],
            sizes={ratio: (size[0], size[1]) for ratio, size in entry["ratio_to_height_width"].items()},
        )
        for name, entry in json.loads(content).items()
    }


def get_aspect_table(resolution: str) -> AspectTable:
    """The table of one resolution. ValueError, naming the nearest one, if there is none of this name."""
    tables = load_aspect_tables()
    if isinstance(resolution, str) and resolution in tables:
        return tables[resolution]
    if str(resolution) in tables:
        raise ValueError(f'resolution {resolution!r} must be the string "{resolution}": put it in quotes')
    raise ValueError(f"unknown resolution {resolution!r}: {suggest(resolution, tables)}")
