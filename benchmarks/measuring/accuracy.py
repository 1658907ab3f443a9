"""How right a result must be to get a time: against float64, relative to what eager PyTorch errs in the same dtype.

The rule is that of the kernels' own tests. An error is ‖result - exact‖ / ‖exact‖. A gradient that is zero in exact
arithmetic (that of q where there is one key, say) has no size of its own: its error is taken relative to the gradient
that was sent back.

The gradients of a model's parameters count as one long vector, in which small ones would be lost. So each is judged
alone, too, by a looser factor: that finds those that are missing or belong to something else, and leaves rounding to
the whole. Ten, because right implementations, on a CPU, erred in a single tensor up to 2.0 times (bfloat16) and 4.9
times (float32, a tensor that is 2e-7 of the whole) as much as one eager version: other orders of operations in 2 to 12
layers, torch.compile in 2 and 4, and this project's kernels, in float32, in 2. A tensor of zeros errs by 1, and eager
by 0.01 in the middle of all tensors (bfloat16). Where it errs by more than 0.1, as it may in the bias of q before
cross-attention, rounding hides zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Several tensors, with names or without, count as one long vector; None: the gradient is missing.
Result = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None
Named = Mapping[str, Result]

# A provider may err this many times as much as eager PyTorch in the same dtype, both against float64 …
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
ALONE_FACTOR = 10.0  # of one of the tensors of a gradient
# … and always so many eps: half an eps is the rounding of the result itself, which eager may escape by luck; in
# float32 the order of a sum decides over a few eps.
FLOOR_IN_EPS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 4.0, torch.float64: 4.0}
# Below this share of the gradient that was sent back, a float64 gradient is zero but for rounding.
ZERO_SHARE = 1e-9

MOST_PARTS = 3  # tensors that are named where a result of several is wrong
OUTPUT = "output"  # names of results that begin so are outputs, the others gradients


@dataclass(frozen=True)
class Part:
    """One of the tensors of a wrong result.

    Attributes:
        name: of the tensor; its index where it has none.
        share: of the squared error of the whole result.
        error: relative to this tensor alone; eager_error: eager's, nan where it is not known.
    """

    name: str
    share: float
    error: float
    eager_error: float

    def __str__(self) -> str:
        return f"{self.name} ({self.share:.0%}; error {self.error:.3g}, eager's {self.eager_error:.3g})"


@dataclass(frozen=True)
class Judgement:
    """The worst result of a provider: the one nearest to its limit, or furthest above it.

    Attributes:
        parts: of a result of several tensors that is wrong, those with the largest shares of the error.
    """

    name: str
    error: float
    limit: float
    parts: tuple[Part, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Yardstick:
    """Exact results, the size that errors are relative to, and limits; make it with `measure`.

    Attributes:
        eager_errors: by result, eager's relative error of each of its tensors.
    """

    exact: Named
    zero_names: frozenset[str]
    sent_back: float
    limits: dict[str, float]
    eager_errors: dict[str, list[float]]

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
            for name, value in _with_parts(exact).items()
            if not name.startswith(OUTPUT) and norm(value) <= ZERO_SHARE * sent_back
        )
        floor = FLOOR_IN_EPS[dtype] * torch.finfo(dtype).eps
        limits, eager_parts = {}, _with_parts(eager)
        for name, value in _with_parts(exact).items():
            factor = OUTPUT_FACTOR if name.startswith(OUTPUT) else GRADIENT_FACTOR if name in exact else ALONE_FACTOR
            error = distance(eager_parts.get(name), value) / _size(value, sent_back if name in zero else None)
            limits[name] = factor * error + floor
        eager_errors = {name: _relative(_distances(eager.get(name), value), value) for name, value in exact.items()}
        return cls(exact, zero, sent_back, limits, eager_errors)

    def loosened(self, other: Yardstick) -> Yardstick:
        """The same exact results, with the larger of both limits: there are two honest eager versions."""
        limits = {name: max(limit, other.limits[name]) for name, limit in self.limits.items()}
        eager_errors = {
            name: [max(pair) for pair in zip(errors, other.eager_errors[name], strict=True)]
            for name, errors in self.eager_errors.items()
        }
        return replace(self, limits=limits, eager_errors=eager_errors)

    def judge(self, results: Named, outputs_only: bool = False) -> Judgement:
        """Compares with the exact results."""
        return self._judge(results, self.exact, self.sent_back, 1.0, outputs_only)

    def judge_against_eager(
        self, results: Named, eager: Named, sent_back: float, outputs_only: bool = False
    ) -> Judgement:
        """Compares results of larger inputs, whose exact ones nobody knows, with eager's: both may err, so twice."""
        return self._judge(results, eager, sent_back, 2.0, outputs_only)

    def _judge(self, results: Named, expected: Named, sent_back: float, factor: float, outputs_only: bool) -> Judgement:
        judgements, actual = [], _with_parts(results)
        for name, value in _with_parts(expected).items():
            if outputs_only and not name.startswith(OUTPUT):
                continue
            error = distance(actual.get(name), value) / _size(value, sent_back if name in self.zero_names else None)
            judgements.append(Judgement(name, error, factor * self.limits[name]))
        # A tensor alone is told of where it is wrong and its result, as a whole, is not.
        worst = max(judgements, key=lambda item: (not item.is_right, item.name in expected, item.error / item.limit))
        if worst.is_right or len(_tensors(expected.get(worst.name))) < 2:
            return worst
        return replace(worst, parts=self._find_parts(worst.name, results.get(worst.name), expected[worst.name]))

    def _find_parts(self, name: str, actual: Result, expected: Result) -> tuple[Part, ...]:
        """The tensors of a result that err most."""
        distances = _distances(actual, expected)
        # Where some are not finite, these are to blame, equally.
        weights = [float(math.isinf(item)) if math.inf in distances else item**2 for item in distances]
        errors, eager_errors = _relative(distances, expected), self.eager_errors[name]
        if len(eager_errors) != len(errors):  # it has more tensors in larger inputs
            eager_errors = [math.nan] * len(errors)
        names = expected if isinstance(expected, Mapping) else map(str, range(len(distances)))
        parts = [
            Part(part, weight / sum(weights), error, eager_error)
            for part, weight, error, eager_error in zip(names, weights, errors, eager_errors, strict=True)
        ]
        return tuple(sorted(parts, key=lambda part: -part.share)[:MOST_PARTS])


def distance(actual: Result, expected: Result) -> float:
    """‖actual - expected‖ in float64; infinite if something is missing, of another shape or not finite."""
    return math.hypot(*_distances(actual, expected))


def _distances(actual: Result, expected: Result) -> list[float]:
    """The distance of each tensor; where one is missing nobody knows which, so all are infinite."""
    actual, expected = _tensors(actual), _tensors(expected)
    if len(actual) != len(expected):
        return [math.inf] * max(len(expected), 1)
    return [_distance(a, b) for a, b in zip(actual, expected, strict=True)]


def _distance(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    square = (actual.double() - expected.double()).square().sum().item()
    return math.sqrt(square) if math.isfinite(square) else math.inf


def _relative(distances: Sequence[float], expected: Result) -> list[float]:
    return [item / _size(tensor, None) for item, tensor in zip(distances, _tensors(expected), strict=False)]


def _with_parts(named: Named) -> dict[str, Result]:
    """The results, and each tensor of a gradient that has several, by names."""
    parts = {
        f"{name} ({part} alone)": tensor
        for name, value in named.items()
        if isinstance(value, Mapping) and not name.startswith(OUTPUT)
        for part, tensor in value.items()
    }
    return {**named, **parts}


def norm(value: Result) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in _tensors(value)))


def _size(value: Result, replacement: float | None) -> float:
    size = norm(value) if replacement is None else replacement
    return max(size, torch.finfo(torch.float64).tiny)


def _tensors(value: Result) -> list[Tensor]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    return list(value.values() if isinstance(value, Mapping) else value)


def weights_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients to send back, the same numbers for every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
        .to(torch.bfloat16)
        .to(output.dtype)
        for output in outputs
    ]
