"""Suites: lists of cases, one module for each level.

push: what the plan of this project rests on, for two runs of nine minutes; kernels: ops and blocks; step: training and
sampling steps; loader: decoding and buckets; convergence: training with kernels against training without; all. Suites
of speeds begin with the device's ceilings, which their rows are shares of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opensora_fast.costs.hardware import Gpu

from ..measuring.case import Case

WITHOUT_CEILINGS = ("loader", "convergence")  # nothing in them is a share of what the device can do
NAMES = ("all", "push", "kernels", "step", "loader", "convergence")


def list_cases(
    suite: str,
    device: str,
    providers: Sequence[str] | None = None,
    words: Sequence[str] = (),
    gpu: Gpu | None = None,
) -> list[Case]:
    """The planned cases, the most valuable first.

    Args:
        suite: one of NAMES.
        device: "cuda" or "cpu".
        providers: only these; the ceilings are measured whatever they are.
        gpu: whose memory and rates the plan is for; None: this machine's, or an H200 where there is none.
        words: only cases that have, for each of these, a word that begins so: "spatial" and "240p".

    Raises:
        ValueError: an unknown suite, device or provider, or words that no case has.
    """
    from . import block_products, buckets, ceilings, convergence, encoders, loader, models, ops, push
    from .estimates import with_estimate
    from .scale import scale_of

    if suite not in NAMES:
        raise ValueError(f"suite {suite!r} is unknown; choose one of {', '.join(NAMES)}")
    scale = scale_of(device, gpu)
    always = ceilings.list_first_cases(scale)
    parts = {
        "kernels": [ceilings.list_cases, block_products.list_cases, ops.list_cases, models.list_block_cases],
        "step": [models.list_step_cases, models.list_mixed_step_cases, encoders.list_cases, models.list_sampling_cases],
        "loader": [loader.list_cases, buckets.list_cases],
        "convergence": [convergence.list_cases],
        "push": [push.list_cases],
    }
    chosen = ("kernels", "step", "loader", "convergence") if suite == "all" else (suite,)
    cases = [case for name in chosen for part in parts[name] for case in part(scale)]
    cases = _filter_providers(cases, providers)
    if words:
        cases = [case for case in cases if _has_words(case, words)]
        if not cases:
            wanted = ", ".join(words)
            raise ValueError(f"no case of suite {suite} on {device} has the words {wanted}; --list shows them")
    if suite not in WITHOUT_CEILINGS:
        cases = always + cases
    unique = {case.identity: with_estimate(case, scale) for case in cases}
    return sorted(unique.values(), key=lambda case: -case.value)


def _has_words(case: Case, words: Sequence[str]) -> bool:
    own = f"{case.name} {case.template.shape}".split()
    return all(any(part.startswith(word) for part in own) for word in words)


def _filter_providers(cases: Sequence[Case], providers: Sequence[str] | None) -> list[Case]:
    if not providers:
        return list(cases)
    known = dict.fromkeys(provider for case in cases for provider in case.providers)
    for name in providers:
        if name not in known:
            raise ValueError(f"provider {name!r} is unknown in this suite; known: {', '.join(sorted(known))}")
    kept = (replace(case, providers=tuple(name for name in case.providers if name in providers)) for case in cases)
    return [case for case in kept if case.providers]
