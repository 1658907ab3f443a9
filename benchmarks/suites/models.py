"""Blocks, whole training steps and sampling steps of ST-DiT-2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

from opensora_fast.costs.operations import Count, count_block, count_forward, count_optimizer, count_training_step

from ..measuring.case import Case, Outcome, make_template
from ..measuring.contest import FORWARD, FORWARD_BACKWARD, OP_CALLS, Contest, run_contest
from ..measuring.provider import Bound, choose_providers
from ..measuring.replay import recorder_of
from ..measuring.session import Session
from ..measuring.timing import ALL_OF_THE_BUDGET, Call, Sampling
from ..providers.blocks import BLOCK_PROVIDERS, BLOCK_REFERENCES, make_block_work
from ..providers.model_work import TRAINING, ModelWork, Training, make_model_work, make_training
from ..providers.models import (
    MODEL_PROVIDERS,
    MODEL_REFERENCES,
    model_results,
    sampling_call,
    sampling_output,
    training_call,
)
from ..providers.variants import PACK_PEERS, PEERS, RECOMPUTING_PEERS, WATERFALL
from ..rows import Row
from ..shapes import Pack, Workload, fill, stage_buckets, text_lengths
from .scale import Scale

BLOCK_VALUE, STEP_VALUE, SAMPLING_VALUE, STAGE_VALUE, OTHER_VALUE = 750.0, 900.0, 600.0, 300.0, 190.0
SUSTAINED, SUSTAINED_STEPS = "sustained", 10  # steps of one sample
MIXED_VALUE = 540.0  # packs of mixed shapes, and the uniform ones that they are compared with
STAGES = ("stage1", "stage2", "stage3")
SAMPLED_VIDEOS = 2
Results = Callable[[Any, Any], tuple[Mapping[str, Any], float]]
SMALL_SAMPLING = ("upstream-flash", "eager", "compile", "ours", "ours-graph", "compile-graph")


def list_block_cases(scale: Scale) -> list[Case]:
    """One block at every headline workload, and on a mixed pack."""
    packs = [Pack.of(workload) for workload in by_importance(scale.headline)] + [scale.mixed]
    return [block_case(scale, pack, BLOCK_VALUE - 20 * index) for index, pack in enumerate(packs)]


def list_step_cases(scale: Scale) -> list[Case]:
    """Training steps: the headline with the waterfall at the first workload, then shipped buckets and other lengths."""
    cases = []
    headline, waterfall = by_importance(scale.steps), waterfall_workload(scale)
    with_waterfall = list(dict.fromkeys([*PEERS, *WATERFALL]))
    for index, workload in enumerate(headline):
        names = list(PEERS)
        if workload == waterfall:
            names = with_waterfall
        if workload.tokens > scale.most_tokens("eager"):
            names += [scale.least_recomputing(name, workload.tokens) for name in ("compile", "ours")]
            names += RECOMPUTING_PEERS
        cases.append(step_case(scale, workload, tuple(dict.fromkeys(names)), STEP_VALUE - 10 * index))
    if waterfall not in headline:
        cases.append(step_case(scale, waterfall, tuple(with_waterfall), STEP_VALUE - 10 * len(headline)))
    if scale.device != "cuda":
        return cases
    seen = {(workload.name, workload.batch) for workload in (*headline, waterfall)}
    for index, stage in enumerate(STAGES):
        for workload in stage_buckets(stage):
            if (workload.name, workload.batch) not in seen:
                seen.add((workload.name, workload.batch))
                names = ("upstream-flash", "ours", "ours-recompute")
                cases.append(step_case(scale, workload, names, STAGE_VALUE - 10 * index))
    for workload in (*scale.images, *scale.long_videos):
        if (workload.name, workload.batch) not in seen:
            seen.add((workload.name, workload.batch))
            cases.append(step_case(scale, workload, ("upstream-flash", "eager", "ours"), OTHER_VALUE))
    return cases


def list_mixed_step_cases(scale: Scale) -> list[Case]:
    """Steps on packs of mixed shapes, and the uniform ones that they are compared with (see `report/mixed.py`)."""
    headline = {(workload.name, workload.batch) for workload in scale.steps}
    cases = []
    uniform: dict[tuple[str, int], Workload] = {}
    for pack in scale.mixed_steps:
        cases.append(step_case(scale, pack, PACK_PEERS, MIXED_VALUE))
        for part in pack.uniform_parts(scale.tokens):
            uniform.setdefault((part.name, part.batch), part)
    for key, workload in uniform.items():
        if key not in headline:
            cases.append(step_case(scale, workload, ("upstream-flash", "eager", "ours"), MIXED_VALUE - 5))
    return cases


def list_sampling_cases(scale: Scale) -> list[Case]:
    """A guided sampling step of two videos at every headline resolution, and of those that the host holds up."""
    small = small_samples(scale)
    headline = [replace(videos, batch=min(videos.batch, SAMPLED_VIDEOS)) for videos in by_importance(scale.headline)]
    cases = []
    for index, workload in enumerate(dict.fromkeys([*small, *headline])):
        names = (PEERS if workload in headline else ()) + (SMALL_SAMPLING if workload in small else ())
        cases.append(sampling_case(scale, workload, tuple(dict.fromkeys(names)), SAMPLING_VALUE - 5 * index))
    return cases


def small_samples(scale: Scale) -> list[Workload]:
    """An image and a video, whose sampling steps take the host longer than the GPU."""
    image = min(scale.images, key=lambda workload: workload.tokens // workload.batch)
    video = min(scale.headline, key=lambda workload: workload.tokens // workload.batch)
    return [replace(image, batch=1), replace(video, batch=1)]


def by_importance(workloads: Sequence[Workload]) -> list[Workload]:
    """Of each resolution one: 240p first, then the largest and the smallest resolution, then what lies between."""
    order = {"240p": 0, "720p": 1, "144p": 2, "480p": 3, "360p": 4}
    return sorted(workloads, key=lambda workload: order[workload.resolution])


def waterfall_workload(scale: Scale) -> Workload:
    """The first of the headline, or fewer of its videos: each technique is to fit into the memory."""
    first = by_importance(scale.steps)[0]
    return fill(first.resolution, first.frames, min(first.tokens, scale.most_tokens("eager")))


def mean_text(videos: int, text: int) -> float:
    return sum(text_lengths(videos, text)) / videos


def block_case(scale: Scale, pack: Pack, value: float) -> Case:
    config, dtype = scale.config, scale.dtype
    template = make_template(
        "block",
        pack.name,
        shape=f"{pack.text} C={config.hidden_size} H={config.num_heads} L={scale.text}",
        tokens=pack.tokens,
        dtype=scale.dtype_name,
    )
    text = mean_text(len(pack.shapes), scale.text)
    counts = [count_block(config, part, text, dtype.itemsize) for part in pack.parts]
    totals = [sum((count[index] for count in counts), Count()) for index in range(2)]

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        short = scale.check_pack(pack)
        contest = Contest(
            template=template,
            work=make_block_work(config, pack, scale.text, scale.device, dtype),
            providers=choose_providers(BLOCK_PROVIDERS, names),
            references=BLOCK_REFERENCES,
            calls=OP_CALLS,
            counts=dict(zip(OP_CALLS, totals, strict=True)),
            sampling=Sampling(session.sampling_seconds(scale.step_seconds / 2), warm_up=2),
            check_work=None if short is pack else make_block_work(config, short, scale.text, scale.device, dtype),
            check_name=short.name,
            make_recorder=recorder_of(scale.device),
        )
        return run_contest(contest, session)

    names = tuple(provider.name for provider in BLOCK_PROVIDERS)
    return Case(template, (FORWARD, FORWARD_BACKWARD), names, value, measure)


def step_case(scale: Scale, pack: Workload | Pack, providers: tuple[str, ...], value: float) -> Case:
    """A training step from latents and text embeddings that are there already."""
    pack = Pack.of(pack) if isinstance(pack, Workload) else pack
    count = partial(count_step, scale, pack)
    return _model_case(
        scale, "step", pack, providers, TRAINING, training_call, count, model_results, scale.step_seconds, value
    )


def count_step(scale: Scale, pack: Pack, training: Training) -> Count:
    """Operations and bytes of a training step."""
    parameters = float(sum(master.numel() for master in training.optimizer.masters.values()))
    text = mean_text(len(pack.videos), scale.text)
    parts = [count_training_step(scale.config, part, text, 0.0, scale.dtype.itemsize) for part in pack.parts]
    return sum(parts, count_optimizer(parameters))


def sustained_case(scale: Scale, workload: Workload, seconds: float, value: float, provider: str = "ours") -> Case:
    """Step after step without a pause, for so long that power and clocks settle; few blocks recompute if they must."""
    pack = Pack.of(workload)
    template = model_template(scale, "step", pack, op=SUSTAINED)

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        training = shared_training(scale, session)
        planned = seconds if scale.device == "cuda" else scale.step_seconds
        sampling = Sampling(session.sampling_seconds(planned), ALL_OF_THE_BUDGET, warm_up=1, watched=True)
        contest = model_contest(scale, template, pack, training, names, sampling)
        contest = replace(
            contest,
            calls={TRAINING: _many_steps},
            counts={TRAINING: count_step(scale, pack, training)},
            calls_per_sample=SUSTAINED_STEPS,
        )
        return run_contest(contest, session)

    estimate = seconds + 25.0 if scale.device == "cuda" else 0.0
    if provider == "ours":
        provider = scale.least_recomputing(provider, workload.tokens)
    return Case(template, (TRAINING,), (provider,), value, measure, estimate)


def _many_steps(bound: Bound, work: ModelWork) -> Call:
    """The first call is one step, for a graph is captured in the second, and memory is measured in the second call."""
    step = training_call(bound, work)
    counts = chain([1], repeat(SUSTAINED_STEPS))

    def steps() -> None:
        for _ in range(next(counts)):
            step()

    return steps


def sampling_case(scale: Scale, workload: Workload, providers: tuple[str, ...], value: float) -> Case:
    doubled = Workload(workload.resolution, workload.frames, 2 * workload.batch)  # guidance: with text and without

    def count(training: Training) -> Count:
        text = mean_text(workload.batch, scale.text)
        return count_forward(scale.config, doubled, text, scale.dtype.itemsize)

    seconds = scale.step_seconds / 4
    return _model_case(
        scale, "sampling", Pack.of(workload), providers, FORWARD, sampling_call, count, sampling_output, seconds, value
    )


def shared_training(scale: Scale, session: Session) -> Training:
    """The one model of a session, with its optimizer."""
    return session.shared("training", lambda: make_training(scale.config, scale.device, scale.dtype))


def _model_case(
    scale: Scale,
    level: str,
    pack: Pack,
    providers: tuple[str, ...],
    direction: str,
    make_call: Callable[[Any, Any], Callable[[], object]],
    count: Callable[[Training], Count],
    results: Results,
    seconds: float,
    value: float,
) -> Case:
    template = model_template(scale, level, pack)

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        training = shared_training(scale, session)
        sampling = model_sampling(scale, session, seconds)
        contest = model_contest(scale, template, pack, training, names, sampling)
        return run_contest(
            replace(
                contest,
                calls={direction: make_call},
                counts={direction: count(training)},
                results=results,
            ),
            session,
        )

    return Case(template, (direction,), providers, value, measure)


def model_template(scale: Scale, level: str, pack: Pack, op: str = "") -> Row:
    config = scale.config
    return make_template(
        level,
        pack.name,
        op=op,
        shape=f"{pack.text} L={scale.text} C={config.hidden_size} layers={config.depth}",
        tokens=pack.tokens,
        dtype=scale.dtype_name,
    )


def model_sampling(scale: Scale, session: Session, seconds: float) -> Sampling:
    turn = 2 if scale.device == "cuda" else 1
    return Sampling(session.sampling_seconds(seconds), samples_per_turn=turn, large=True, watched=True)


def model_contest(
    scale: Scale, template: Row, pack: Pack, training: Training, names: Sequence[str], sampling: Sampling
) -> Contest:
    """The contest of a training step; callers replace what is timed."""
    short = scale.check_pack(pack)

    def smaller() -> tuple[ModelWork, str]:
        shorter = pack.shortened(scale.check_tokens)
        return make_model_work(training.model, shorter, scale.text), shorter.name

    return Contest(
        template=template,
        work=make_model_work(training.model, pack, scale.text, training),
        providers=choose_providers(MODEL_PROVIDERS, names),
        references=MODEL_REFERENCES,
        calls={TRAINING: training_call},
        counts={},
        sampling=sampling,
        results=model_results,
        check_work=None if short is pack else make_model_work(training.model, short, scale.text),
        check_name=short.name,
        smaller=smaller,
        total_memory=True,
    )
