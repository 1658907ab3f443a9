"""What mixing shapes in one step costs: tokens of a mixed pack against tokens of uniform packs of its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..rows import Row
from ..shapes import Pack


@dataclass(frozen=True)
class MixedCost:
    """Nanoseconds a token of a training step, by one provider.

    Attributes:
        mixed_ns: measured on the mixed pack.
        uniform_ns: mean of those measured on uniform packs of its shapes, weighted by the shapes' shares of the tokens.
    """

    pack: str
    provider: str
    dtype: str
    mixed_ns: float
    uniform_ns: float

    @property
    def ratio(self) -> float:
        return self.mixed_ns / self.uniform_ns

    def __str__(self) -> str:
        return f"{self.pack}, {self.provider}: {self.ratio:.3f} × the uniform packs of its shapes, per token"


def compare_mixed(rows: Iterable[Row], packs: Sequence[Pack], tokens: int) -> list[MixedCost]:
    """For each provider that has a time for a mixed pack and for uniform ones of all its shapes.

    Args:
        packs: the mixed ones.
        tokens: of a uniform pack, about.
    """
    times: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.level == "step" and not row.op and row.status == "ok":
            sizes = row.shape.partition(" L=")[0]
            times[row.workload, sizes, row.provider, row.dtype] = row
    costs = []
    for (name, sizes, provider, dtype), row in times.items():
        pack = next((pack for pack in packs if (pack.name, pack.text) == (name, sizes)), None)
        if pack is None:
            continue
        parts = [Pack.of(part) for part in pack.uniform_parts(tokens)]
        uniform = [times.get((part.name, part.text, provider, dtype)) for part in parts]
        if all(uniform):
            shares = [part.tokens / pack.tokens for part in pack.parts]
            mean = sum(share * _nanoseconds(found) for share, found in zip(shares, uniform, strict=True))
            costs.append(MixedCost(name, provider, dtype, _nanoseconds(row), mean))
    return costs


def _nanoseconds(row: Row) -> float:
    return row.p50_ms * 1e6 / row.tokens
