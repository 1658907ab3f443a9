"""A case: one piece of work and the providers that are compared on it; what a suite is a list of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..rows import Key, Row
from .refused import Refused
from .session import Session

Outcome = tuple[list[Row], list[Refused]]


@dataclass(frozen=True)
class Case:
    """Planned rows. Nothing is built before `measure`.

    Attributes:
        template: the rows without provider, direction, environment and numbers.
        directions: of the rows.
        providers: names of the providers.
        value: cases of higher value are measured first.
        measure: (session, names of the providers that still lack rows) → rows and refused providers.
        seconds: what it takes, about; 0 where nobody has estimated it.
    """

    template: Row
    directions: tuple[str, ...]
    providers: tuple[str, ...]
    value: float
    measure: Callable[[Session, Sequence[str]], Outcome]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.template.level, self.template.op, self.template.workload) if part)

    @property
    def identity(self) -> str:
        """Tells it from every other case."""
        return " | ".join((self.name, self.template.shape, self.template.dtype, ",".join(self.providers)))

    def planned_rows(self) -> dict[Key, Row]:
        rows = [
            replace(self.template, provider=provider, direction=direction)
            for provider in self.providers
            for direction in self.directions
        ]
        return {row.key: row for row in rows}

    def unfinished(self, finished: set[Key]) -> list[str]:
        """Providers that lack a row."""
        return list(dict.fromkeys(row.provider for key, row in self.planned_rows().items() if key not in finished))


def make_template(level: str, workload: str, *, op: str = "", shape: str = "", tokens: int = 0, dtype: str = "") -> Row:
    """A row that says what is to be measured and has no numbers yet."""
    return Row(
        level=level,
        workload=workload,
        op=op,
        direction="",
        provider="",
        provider_version="",
        shape=shape,
        tokens=tokens,
        dtype=dtype,
        status="unavailable",
        reason="not measured",
    )
