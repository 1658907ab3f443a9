"""How right a result must be to get a time: against float64, relative to what eager PyTorch errs in the same dtype.

The rule is that of the kernels' own tests. An error is ‖result - exact‖ / ‖exact‖. A gradient that is zero in exact
arithmetic (that of q where there is one key, say) has no size of its own: its error is taken relative to the gradient
that was sent back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Result = Tensor | Sequence[Tensor] | None  # several tensors count as one long vector; None: the gradient is missing
Named = Mapping[str, Result]

# A provider may err this many times as much as eager PyTorch in the same dtype, both against float64 …
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# … and always so many eps: half an eps is the rounding of the result itself, which eager may escape by luck; in
# float32 the order of a sum decides over a few eps.
FLOOR_IN_EPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 4.0, torch.float64: 4.0}
# Below this share of the gradient that was sent back, a float64 gradient is zero but for rounding.
ZERO_SHARE = 1e-9

OUTPUT = "output"  # names of results that begin so are outputs, the others gradients


@dataclass(frozen=True)
class Judgement:
    """The worst result of a provider: the one nearest to its limit, or furthest above it."""

    name: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Yardstick:
    """Exact results, the size that errors are relative to, and limits; make it with `measure`."""

    exact: Named
    zero_names: frozenset[str]
    sent_back: float
    limits: dict[str, float]

    @classmethod
    def measure(cls, exact: Named, eager: Named, dtype: torch.dtype, sent_back: float = 0.0) -> Yardstick:
        """Takes the limits from eager's errors.

        Args:
            exact: float64 results by name.
            eager: the same in `dtype`, by eager PyTorch.
            sent_back: norm of the gradient that backward began with.
        """
        zero = frozenset(
            name
            for name, value in exact.items()
            if not name.startswith(OUTPUT) and norm(value) <= ZERO_SHARE * sent_back
        )
        floor = FLOOR_IN_EPS[dtype] * torch.finfo(dtype).eps
        limits = {}
        for name, value in exact.items():
            factor = OUTPUT_FACTOR if name.startswith(OUTPUT) else GRADIENT_FACTOR
            error = distance(eager.get(name), value) / _size(value, sent_back if name in zero else None)
            limits[name] = factor * error + floor
        return cls(exact, zero, sent_back, limits)

    def loosened(self, other: Yardstick) -> Yardstick:
        """The same exact results, with the larger of both limits: there are two honest eager versions."""
        limits = {name: max(limit, other.limits[name]) for name, limit in self.limits.items()}
        return replace(self, limits=limits)

    def judge(self, results: Named, outputs_only: bool = False) -> Judgement:
        """Compares with the exact results."""
        return self._judge(results, self.exact, self.sent_back, 1.0, outputs_only)

    def judge_against_eager(self, results: Named, eager: Named, sent_back: float) -> Judgement:
        """Compares results of larger inputs, whose exact ones nobody knows, with eager's: both may err, so twice."""
        return self._judge(results, eager, sent_back, 2.0, False)

    def _judge(self, results: Named, expected: Named, sent_back: float, factor: float, outputs_only: bool) -> Judgement:
        judgements = []
        for name, value in expected.items():
            if outputs_only and not name.startswith(OUTPUT):
                continue
            error = distance(results.get(name), value) / _size(value, sent_back if name in self.zero_names else None)
            judgements.append(Judgement(name, error, factor * self.limits[name]))
        return max(judgements, key=lambda item: item.error / item.limit)


def distance(actual: Result, expected: Result) -> float:
    """‖actual - expected‖ in float64; infinite if something is missing, of another shape or not finite."""
    actual, expected = _tensors(actual), _tensors(expected)
    if len(actual) != len(expected) or any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)):
        return math.inf
    squares = sum((a.double() - b.double()).square().sum().item() for a, b in zip(actual, expected, strict=True))
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


def norm(value: Result) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in _tensors(value)))


def _size(value: Result, replacement: float | None) -> float:
    size = norm(value) if replacement is None else replacement
    return max(size, torch.finfo(torch.float64).tiny)


def _tensors(value: Result) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)
