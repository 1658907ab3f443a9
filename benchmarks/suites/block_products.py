"""All matrix products of a block's Linears, again and again: what a library sustains once power and clocks settle.

Samples of single products (`ceilings`) are short and take turns; in a training step products hardly pause, and where
power holds the GPU back, who needs less of it for a product is faster. So each library runs alone, for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from opensora_fast.costs.operations import Count

from ..measuring.case import Case, Outcome, make_template
from ..measuring.contest import FORWARD_BACKWARD
from ..measuring.provider import Provider
from ..measuring.race import Check, Entry, run_race
from ..measuring.session import Session
from ..measuring.timing import ALL_OF_THE_BUDGET, Call, Sampling
from ..providers.products import BLOCK_PRODUCTS, DIRECTIONS, Product, make_product
from .ceilings import VALUE, check_product, count_product, draw_operands, linear_widths
from .scale import Scale

# How often a block has Linears of the size. That of the text's keys and values is left out: it has few tokens.
TIMES = {"qkv": 2, "proj": 4, "fc1": 1, "fc2": 1}
SECONDS = 4.0  # of samples; power settles within the first
OTHER_SECONDS = 3.0  # operands, checks and first calls


def list_cases(scale: Scale) -> list[Case]:
    """One case for each library, so that none rests while others run."""
    return [_case(scale, name, providers) for name, providers in BLOCK_PRODUCTS[scale.device].items()]


def _case(scale: Scale, name: str, providers: Sequence[Provider]) -> Case:
    tokens = min(scale.gemm_tokens, key=lambda tokens: abs(tokens - scale.tokens))
    widths = linear_widths(scale)
    template = make_template(
        "gemm",
        f"{tokens} tokens, sustained",
        op="block",
        shape=f"N={tokens} C={scale.config.hidden_size}",
        tokens=tokens,
        dtype=scale.dtype_name,
    )
    counts = [
        count_product(tokens, *widths[layer], scale.dtype) for layer, times in TIMES.items() for _ in range(times)
    ]
    count = sum(len(DIRECTIONS) * counts, Count())

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        products = [
            make_product(direction, *operands)
            for operands in (draw_operands(scale, tokens, *widths[layer]) for layer in TIMES)
            for direction in DIRECTIONS
        ]
        makers = list(zip(len(TIMES) * tuple(providers), products, strict=True))
        missing = next((why for provider, product in makers if (why := provider.missing(product))), "")
        version = ", ".join(dict.fromkeys(provider.version() for provider in providers))
        blocks = scale.config.depth  # in a sample, as in a step
        prepare = partial(_prepare, makers, blocks)
        entry = Entry(name, version, FORWARD_BACKWARD, prepare, missing, count, calls_per_sample=blocks)
        seconds = session.sampling_seconds(min(SECONDS, 2 * scale.seconds))
        sampling = Sampling(seconds, ALL_OF_THE_BUDGET, warm_up=1, watched=True)
        return run_race(template, [entry], sampling, session)

    estimate = SECONDS + OTHER_SECONDS if scale.device == "cuda" else 0.0
    return Case(template, (FORWARD_BACKWARD,), (name,), VALUE - 20, measure, estimate)


def _prepare(makers: Sequence[tuple[Provider, Product]], blocks: int) -> tuple[Call, Callable[[], Check]]:
    repeats = [times for times in TIMES.values() for _ in DIRECTIONS]
    calls = [
        call
        for (provider, product), times in zip(makers, repeats, strict=True)
        for call in times * [provider.prepare(product)]
    ]
    for _, product in makers:
        product.output.fill_(float("nan"))

    def call() -> None:
        for _ in range(blocks):
            for multiply in calls:
                multiply()

    def check() -> Check:
        return max((check_product(product) for _, product in makers), key=lambda found: found.error / found.limit)

    return call, check
