"""The ops of ST-DiT-2, each against its peers: at the resolutions, with given frames, on mixed packs, over lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..measuring.case import Case, Outcome, make_template
from ..measuring.contest import OP_CALLS, Contest, run_contest
from ..measuring.provider import choose_providers
from ..measuring.replay import recorder_of
from ..measuring.session import Session
from ..measuring.timing import Sampling
from ..providers.adamw import ADAMW_PROVIDERS, ADAMW_REFERENCES
from ..providers.adamw_work import (
    UPDATE,
    adamw_results,
    count_adamw,
    make_adamw_work,
    parameter_shapes,
    update_call,
)
from ..providers.attention import ATTENTION_PROVIDERS, ATTENTION_REFERENCE
from ..providers.attention_work import KINDS, count_attention, make_pack_attention_work
from ..providers.elementwise import (
    ELEMENTWISE_PROVIDERS,
    ELEMENTWISE_REFERENCE,
    OPS,
    count_elementwise,
    make_elementwise_work,
)
from ..providers.mlp import MLP_PROVIDERS, MLP_REFERENCE, count_mlp, make_mlp_work
from ..rows import Row
from ..shapes import WIDE, Pack, text_lengths
from .attention_lengths import DEFAULT_LENGTHS, length_case
from .scale import Scale

DIRECTIONS = tuple(OP_CALLS)
GIVEN = "given frames"
# max|w_q · w_k| is far above the bound (4.9) under which a softmax needs no running maximum.
WIDE_NORM_WEIGHT = 3.0
HEADLINE_VALUE, MIXED_VALUE, OTHER_VALUE, LENGTHS_VALUE = 800.0, 650.0, 200.0, 500.0


def list_cases(scale: Scale) -> list[Case]:
    """All ops on all workloads, 240p before the other resolutions."""
    cases = []
    for index, pack in enumerate(_headline(scale)):
        value = HEADLINE_VALUE - 20 * index
        cases += [attention_case(scale, kind, pack, value) for kind in KINDS]
        cases += [elementwise_case(scale, op, pack, value - 5) for op in OPS]
        cases.append(mlp_case(scale, pack, value - 10))
    cases.append(adamw_case(scale, HEADLINE_VALUE - 15))
    uniform = _headline(scale)[0]
    cases += [elementwise_case(scale, op, uniform, MIXED_VALUE, given=True) for op in OPS if op != "gelu_tanh"]
    cases.append(attention_case(scale, "spatial", uniform, MIXED_VALUE, norm_weight=WIDE_NORM_WEIGHT))
    cases += [attention_case(scale, kind, scale.mixed, MIXED_VALUE - 10) for kind in KINDS]
    cases += [elementwise_case(scale, op, scale.mixed, MIXED_VALUE - 15) for op in OPS if op != "gelu_tanh"]
    for workload in (*scale.images, *scale.long_videos):
        pack = Pack.of(workload)
        cases += [attention_case(scale, kind, pack, OTHER_VALUE) for kind in KINDS]
    return cases + list_length_cases(scale)


def list_length_cases(scale: Scale) -> list[Case]:
    """Attention over the attended length, as `opensora-fast profile attention` measures it."""
    cases = []
    for kind in KINDS:
        for index, length in enumerate(DEFAULT_LENGTHS[kind, scale.device]):
            cases.append(length_case(kind, length, scale.device, scale.dtype, scale.seconds, LENGTHS_VALUE - index))
    return cases


def _headline(scale: Scale) -> list[Pack]:
    return [Pack.of(workload) for workload in sorted(scale.headline, key=lambda item: item.resolution != "240p")]


def elementwise_case(scale: Scale, op: str, pack: Pack, value: float, given: bool = False) -> Case:
    """One of `elementwise.OPS`; `given`: a quarter of the frames has the modulation of given frames."""
    config, dtype = scale.config, scale.dtype
    template = make_template(
        "op",
        f"{pack.name} {GIVEN}" if given else pack.name,
        op=op,
        shape=f"{pack.text} C={config.hidden_size}",
        tokens=pack.tokens,
        dtype=scale.dtype_name,
    )

    def make(short: Pack) -> Any:
        return make_elementwise_work(op, short, scale.device, dtype, config.hidden_size, given)

    counts = count_elementwise(op, pack.tokens, config.hidden_size, dtype.itemsize)
    return _op_case(scale, template, pack, make, ELEMENTWISE_PROVIDERS, ELEMENTWISE_REFERENCE, counts, value)


def mlp_case(scale: Scale, pack: Pack, value: float) -> Case:
    """The two Linears of a block's MLP and what lies between them."""
    channels, dtype = scale.config.hidden_size, scale.dtype
    hidden = int(channels * scale.config.mlp_ratio)
    template = make_template(
        "op",
        pack.name,
        op="mlp",
        shape=f"{pack.text} C={channels} K={hidden}",
        tokens=pack.tokens,
        dtype=scale.dtype_name,
    )

    def make(short: Pack) -> Any:
        return make_mlp_work(short.tokens, channels, hidden, scale.device, dtype)

    counts = count_mlp(pack.tokens, channels, hidden, dtype.itemsize)
    return _op_case(scale, template, pack, make, MLP_PROVIDERS, MLP_REFERENCE, counts, value)


def adamw_case(scale: Scale, value: float) -> Case:
    """An optimizer step on all parameters of the model; no videos are part of it."""
    config, dtype = scale.config, scale.dtype
    shapes = parameter_shapes(config)
    parameters = sum(shape.numel() for shape in shapes.values())
    template = make_template(
        "op",
        f"{parameters / 1e6:.1f} M parameters",
        op="adamw",
        shape=f"P={parameters} tensors={len(shapes)}",
        dtype=scale.dtype_name,
    )

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        # Float64 of all the weights of a large model does not fit beside them; one block has tensors of every kind.
        small = parameter_shapes(config.model_copy(update={"depth": 1})) if scale.device == "cuda" else None
        contest = Contest(
            template=template,
            work=make_adamw_work(shapes, scale.device, dtype),
            providers=choose_providers(ADAMW_PROVIDERS, names),
            references=ADAMW_REFERENCES,
            calls={UPDATE: update_call},
            counts={UPDATE: count_adamw(parameters, dtype.itemsize)},
            sampling=Sampling(session.sampling_seconds(scale.seconds)),
            results=adamw_results,
            check_work=None if small is None else make_adamw_work(small, scale.device, dtype),
            check_name="one block",
            make_recorder=recorder_of(scale.device),
        )
        return run_contest(contest, session)

    return Case(template, (UPDATE,), tuple(provider.name for provider in ADAMW_PROVIDERS), value, measure)


def attention_case(
    scale: Scale, kind: str, pack: Pack, value: float, norm_weight: float = 1.0, head_size: int | None = None
) -> Case:
    """One of `attention_work.KINDS`; a large `norm_weight` makes scores that need the ordinary softmax.

    Another `head_size` than the model's is for what its tiles cost.
    """
    config, dtype = scale.config, scale.dtype
    head_size = head_size or config.head_size
    template = make_template(
        "op",
        pack.name if norm_weight == 1 else f"{pack.name} {WIDE}",
        op=f"{kind}_attention",
        shape=" ".join([pack.text, f"H={config.num_heads} D={head_size}"] + [f"L={scale.text}"] * (kind == "cross")),
        tokens=pack.tokens,
        dtype=scale.dtype_name,
    )

    def lengths(pack: Pack) -> list[int]:
        if kind != "cross":
            return []
        # Every caption of a dense batch is as long, so that dense libraries can take part.
        videos = len(pack.shapes)
        return [scale.text] * videos if pack.is_uniform else text_lengths(videos, scale.text)

    def make(short: Pack) -> Any:
        return make_pack_attention_work(
            kind,
            short.shapes,
            lengths(short),
            scale.device,
            dtype,
            config.num_heads,
            head_size,
            norm_weight=norm_weight,
        )

    counts = count_attention(kind, pack.shapes, lengths(pack), config.num_heads * head_size, dtype.itemsize)
    return _op_case(scale, template, pack, make, ATTENTION_PROVIDERS, ATTENTION_REFERENCE, counts, value)


def _op_case(
    scale: Scale,
    template: Row,
    pack: Pack,
    make: Callable[[Pack], Any],
    providers: Sequence[Any],
    reference: Any,
    counts: Sequence[Any],
    value: float,
) -> Case:
    def measure(session: Session, names: Sequence[str]) -> Outcome:
        short = scale.check_pack(pack)
        contest = Contest(
            template=template,
            work=make(pack),
            providers=choose_providers(providers, names),
            references=(reference,),
            calls=OP_CALLS,
            counts=dict(zip(DIRECTIONS, counts, strict=True)),
            sampling=Sampling(session.sampling_seconds(scale.seconds)),
            check_work=None if short is pack else make(short),
            check_name=short.name,
            make_recorder=recorder_of(scale.device),
        )
        return run_contest(contest, session)

    return Case(template, DIRECTIONS, tuple(provider.name for provider in providers), value, measure)
