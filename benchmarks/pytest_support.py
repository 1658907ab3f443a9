"""What the pytest-benchmark tests share: a provider is checked as in `opensora-fast bench`, then timed by pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from .environment import describe_environment
from .measuring.accuracy import Named
from .measuring.contest import FORWARD, make_yardstick
from .measuring.provider import Bound, Provider, forget_compiled
from .measuring.session import threads_of
from .measuring.timing import Call
from .suites.scale import Scale, scale_of


def current_scale() -> Scale:
    """Full size on a GPU, small on the CPU."""
    return scale_of("cuda" if torch.cuda.is_available() else "cpu")


def time_provider(
    benchmark: Any,
    provider: Provider,
    references: Sequence[Provider],
    work: Any,
    direction: str,
    make_call: Callable[[Bound, Any], Call],
    results: Callable[[Bound, Any], tuple[Named, float]],
) -> None:
    """Skips where the provider cannot run, fails where its result is wrong, and times it else.

    Args:
        benchmark: the fixture of pytest-benchmark.
        results, make_call: as in `Contest`.
    """
    reason = provider.missing(work)
    if reason:
        pytest.skip(reason)
    forget_compiled()
    yardstick = make_yardstick(references, work, results)
    judgement = yardstick.judge(results(provider.prepare(work), work)[0], outputs_only=direction == FORWARD)
    assert judgement.is_right, f"{judgement.name}: error {judgement.error:.3g} is over {judgement.limit:.3g}"
    environment = describe_environment(work.device)
    benchmark.extra_info |= {
        "provider": provider.name,
        "provider_version": provider.version(),
        "error": judgement.error,
        "error_limit": judgement.limit,
        "device": environment.device_name,
        "torch": environment.torch,
        "commit": environment.commit,
        "dirty": environment.dirty,
    }
    call = make_call(provider.prepare(work), work)
    with threads_of(work.device):
        benchmark(call if work.device == "cpu" else lambda: (call(), torch.cuda.synchronize()))
