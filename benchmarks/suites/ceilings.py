"""What the device can do at all: copy bandwidth, matrix products at the exact shapes of ST-DiT-2, cost of a launch.

The rows of the others are shares of these. Letters: N tokens, C channels, K, O the width of a Linear before and behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from opensora_fast import kernels
from opensora_fast.costs.operations import Count

from ..measuring.case import Case, Outcome, make_template
from ..measuring.provider import Provider, choose_providers
from ..measuring.race import Check, Entry, relative_check, run_race
from ..measuring.session import Session
from ..measuring.timing import Call, Sampling
from ..providers.products import DIRECTIONS, PRODUCT_PROVIDERS, Product, make_product
from .scale import Scale, scale_of

VALUE = 1000.0
GEMM_SECONDS = 0.5
LAUNCHES = 1000
CHECKED_ROWS = 64
# Rounding of the result (bfloat16), or of a long sum (float32), relative to the norm.
GEMM_LIMIT_IN_EPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 32.0}


def list_cases(scale: Scale) -> list[Case]:
    """Copy and square product first, as everything else is compared with them."""
    cases = [_copy_case(scale), _gemm_case(scale, "square", scale.square, scale.square, scale.square, VALUE + 8)]
    # The number of tokens nearest to a filled step comes first.
    for index, tokens in enumerate(sorted(scale.gemm_tokens, key=lambda tokens: abs(tokens - scale.tokens))):
        for name, (width_in, width_out) in linear_widths(scale).items():
            cases.append(_gemm_case(scale, name, tokens, width_in, width_out, VALUE - 10 if index == 0 else 350))
    return [*cases, _launch_case(scale)]


def linear_widths(scale: Scale) -> dict[str, tuple[int, int]]:
    """Linear → its width before and behind."""
    channels = scale.config.hidden_size
    hidden = int(channels * scale.config.mlp_ratio)
    return {
        "qkv": (channels, 3 * channels),
        "proj": (channels, channels),
        "fc1": (channels, hidden),
        "fc2": (hidden, channels),
    }


def list_first_cases(scale: Scale) -> list[Case]:
    """Copy bandwidth and matrix rate, which the rows of the others are shares of."""
    return list_cases(scale)[:2]


def measure_ceilings(session: Session) -> None:
    """Measures them for what the session measures next."""
    for case in list_first_cases(scale_of(session.device)):
        session.learn(case.measure(session, case.providers)[0])


def _sampling(session: Session, seconds: float, scale: Scale) -> Sampling:
    return Sampling(session.sampling_seconds(min(seconds, 2 * scale.seconds)))


# ---- copy ----


def _copy_case(scale: Scale) -> Case:
    template = make_template("copy", f"{scale.copy_bytes / 2**20:g} MiB", dtype="uint8", shape=f"{scale.copy_bytes} B")
    provider = f"torch-{scale.device}"

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        def prepare() -> tuple[Call, Callable[[], Check]]:
            source = torch.randint(0, 256, (scale.copy_bytes,), dtype=torch.uint8, device=scale.device)
            target = torch.empty_like(source)
            return partial(target.copy_, source), lambda: Check(float((target != source).any()), 0.0)

        entry = Entry(provider, torch.__version__, "copy", prepare, count=Count(0.0, 2.0 * scale.copy_bytes))
        return run_race(template, [entry], _sampling(session, 1.0, scale), session)

    return Case(template, ("copy",), (provider,), VALUE + 9, measure)


# ---- matrix products ----


def _gemm_case(
    scale: Scale,
    layer: str,
    tokens: int,
    width_in: int,
    width_out: int,
    value: float,
) -> Case:
    dtype = scale.dtype
    template = make_template(
        "gemm",
        f"{tokens} tokens",
        op=layer,
        shape=f"N={tokens} K={width_in} O={width_out}",
        tokens=tokens,
        dtype=scale.dtype_name,
    )
    count = count_product(tokens, width_in, width_out, dtype)
    providers = PRODUCT_PROVIDERS[scale.device]
    directions = DIRECTIONS
    if layer == "square":  # the ceiling itself: what the others are compared with
        providers, directions = providers[:1], DIRECTIONS[:1]

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        operands = draw_operands(scale, tokens, width_in, width_out)
        entries = []
        for direction in directions:
            product = make_product(direction, *operands)
            for provider in choose_providers(providers, names):
                prepare = partial(_prepare_product, provider, product)
                missing = provider.missing(product)
                entries.append(Entry(provider.name, provider.version(), direction, prepare, missing, count))
        return run_race(template, entries, _sampling(session, GEMM_SECONDS * len(directions), scale), session)

    return Case(template, directions, tuple(provider.name for provider in providers), value, measure)


def count_product(tokens: int, width_in: int, width_out: int, dtype: torch.dtype) -> Count:
    moved = dtype.itemsize * (tokens * width_in + width_in * width_out + tokens * width_out)
    return Count(2.0 * tokens * width_in * width_out, float(moved))


def draw_operands(scale: Scale, tokens: int, width_in: int, width_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, K], weight [O, K] and the gradient [N, O] of their product, normal."""
    generator = torch.Generator(scale.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=scale.device).to(scale.dtype)

    return draw(tokens, width_in), draw(width_out, width_in), draw(tokens, width_out)


def check_product(product: Product) -> Check:
    """Of some rows of its output, from the first to the last; of the others only that they are there."""
    limit = GEMM_LIMIT_IN_EPS[product.dtype] * torch.finfo(product.dtype).eps
    if not product.output.isfinite().all():  # it was NaN before
        return Check(math.inf, limit)
    rows = torch.linspace(0, len(product.output) - 1, CHECKED_ROWS, device=product.device).long()
    return relative_check(product.output[rows], product.left[rows].double() @ product.right.double(), limit)


def _prepare_product(provider: Provider, product: Product) -> tuple[Call, Callable[[], Check]]:
    call = provider.prepare(product)
    product.output.fill_(float("nan"))  # all providers write there, and the check must not find another's result
    return call, partial(check_product, product)


# ---- launches ----


def _launch_case(scale: Scale) -> Case:
    """What it costs the host to start one small thing, `LAUNCHES` of them in a row."""
    template = make_template("launch", "empty", shape=f"{LAUNCHES} launches")
    providers = ("torch-op", "triton-kernel", "cuda-graph", "ours-op")

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        missing = "" if scale.device == "cuda" else "needs a CUDA GPU"
        preparations = {
            "torch-op": (_prepare_torch_op, ""),
            "triton-kernel": (_prepare_triton_kernel, missing),
            "cuda-graph": (_prepare_cuda_graph, missing),
            "ours-op": (_prepare_own_op, missing),
        }
        entries = [
            Entry(
                name,
                torch.__version__,
                "launch",
                partial(preparations[name][0], scale.device),
                missing=preparations[name][1],
                calls_per_sample=LAUNCHES,
            )
            for name in names
        ]
        return run_race(template, entries, _sampling(session, 2.0, scale), session)

    return Case(template, ("launch",), providers, VALUE - 5, measure)


def _repeat(call: Call) -> Call:
    def repeated() -> None:
        for _ in range(LAUNCHES):
            call()

    return repeated


def _prepare_torch_op(device: str) -> tuple[Call, Callable[[], Check]]:
    counter = torch.zeros(1, device=device)
    call = _repeat(lambda: counter.add_(1))
    return call, partial(_check_count, counter, call)


def _prepare_triton_kernel(device: str) -> tuple[Call, Callable[[], Check]]:
    from .empty_kernel import count_launch

    counter = torch.zeros(1, device=device)
    call = _repeat(lambda: count_launch[(1,)](counter))
    return call, partial(_check_count, counter, call)


def _prepare_cuda_graph(device: str) -> tuple[Call, Callable[[], Check]]:
    from .empty_kernel import count_launch

    counter = torch.zeros(1, device=device)
    count_launch[(1,)](counter)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            count_launch[(1,)](counter)
    return graph.replay, partial(_check_count, counter, graph.replay)


def _prepare_own_op(device: str) -> tuple[Call, Callable[[], Check]]:
    """One registered op of this project, arguments checked and all."""
    x, bias = torch.randn(1, 64, device=device), torch.randn(64, device=device)

    def call() -> Tensor:
        return kernels.gelu_tanh(x, bias, backend="triton")

    return _repeat(call), lambda: relative_check(call(), kernels.gelu_tanh(x.double(), bias.double()), 1e-5)


def _check_count(counter: Tensor, call: Call) -> Check:
    """Every launch must have happened."""
    counter.zero_()
    call()
    return Check(abs(counter.item() - LAUNCHES), 0.0)
