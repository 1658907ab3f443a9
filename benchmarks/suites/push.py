"""What carries the plan of this project, in the order of what each second of a GPU tells: for two runs of nine minutes.

    opensora-fast bench --suite push --list                          the plan, with what fits into which time
    opensora-fast bench --suite push --budget 9m --out outputs/push       and again with the same --out: it goes on

The device's ceilings, then whole steps at five resolutions beside Open-Sora with flash attention and torch.compile,
which is what the first run has time for. The second begins with small steps as CUDA graphs and goes on with the
memory-bound ops, the attention libraries at head size 72, matrix products, the optimizer, attention over length, a
sustained step, a block and Open-Sora as shipped. Behind that stand Open-Sora's own code, other blocks and lengths,
products and steps that each library sustains alone (`--only sustained`), packs of mixed shapes, the steps between eager
and ours one technique at a time, other frame counts; then what confirms: further ceilings, lengths and the loss curves.
Rows of the second run are shares of the ceilings measured in the first, and no row is measured twice.

A whole step has as many videos as fit with all that torch.compile stores, on a GPU of 80 GB fewer than on one of 141:
so what stores and what recomputes is compared on the same videos on either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..measuring.case import Case
from ..providers.variants import WATERFALL
from ..shapes import Pack, Workload, fill, stage_buckets
from . import block_products, ceilings, convergence, encoders, models, ops
from .attention_lengths import DEFAULT_LENGTHS
from .scale import Scale

VALUE = 2000.0
# Not "flash-attn-4", whose gradients are wrong on Hopper at head size 72.
LIBRARIES = ("eager", "compile", "sdpa-flash", "sdpa-cudnn", "flash-attn-3", "flash-attn-4-padded", "ours")
VAES = ("eager", "eager-channels-last", "compile")
BANDWIDTH = ("eager", "compile", "ours")
# Where many cases are alike, without the compiler that takes its time for each.
OTHER_LIBRARIES = tuple(name for name in LIBRARIES if name != "compile")
# Whole steps: Open-Sora with flash attention as the baseline (in this project's writing; at the first resolution its
# own code, where its package is installed, says later whether the writing is as fast), and the strongest general peer.
STEPS = ("upstream-flash", "compile", "ours")
# All blocks of that baseline recompute, as in stages 2 and 3. Stage 1 stores, at its resolutions and in its batches.
STORED, STORED_AT = "upstream-flash-stored", ("144p", "240p")
SHIPPED = "upstream"  # plain attention, as its configurations have it by mistake: slow, and slow to measure
OWN_CODE = "open-sora"
BLOCKS = ("upstream", "eager", "eager-cudnn", "compile", "ours")
# Without kernels that have known faults, and in upstream's order of operations, whose cross-attention has no mask: if
# the gradients of "compile" are wrong, as an H200 found, these tell where, and the first may stand in for it.
ONE_ORDER = "compile-one-order"
OTHER_COMPILED = (ONE_ORDER, "compile-upstream")
# Where the host takes longer than the GPU; last what nobody has captured yet, as a broken capture can stay in the way.
SMALL_STEPS = ("eager", "compile", "ours", "ours-graph", "compile-graph")
FIRST_OPS = ("modulated_norm", "gate_residual_modulated_norm")  # the others are a part of one, or of the MLP
OPTIMIZERS = ("upstream", "torch-fused", "compile-flat", "apex", "colossalai", "ours")
FEW = ("eager", "ours")
QUACK = "ours-quack"
FIRST_LENGTHS = {"spatial": (144, 920, 1590, 3600)}
NEXT_LENGTHS = {"temporal": (16, 64, 128), "cross": (120,)}
WIDE_HEAD = 128  # one tile of 128 columns, where 72 takes 64 + 16
LONGEST_S = 45.0  # of a step that is repeated without a pause
FRAME_COUNTS = (1, 64, 128)


def list_cases(scale: Scale) -> list[Case]:
    """In the order in which they are measured."""
    headline, steps = models.by_importance(scale.headline), models.by_importance(scale.steps)
    first = Pack.of(headline[0])
    basics, gemms, more_gemms = _ceilings(scale)
    small = [_small_step(scale, workload) for workload in _small_batches(scale)]
    blocks = [only(models.block_case(scale, Pack.of(workload), 0), BLOCKS) for workload in headline]
    blocks[0] = only(models.block_case(scale, first, 0), (*BLOCKS, QUACK))
    attention = [
        only(ops.attention_case(scale, kind, first, 0), LIBRARIES) for kind in ("spatial", "temporal", "cross")
    ]
    wide = ops.attention_case(scale, "spatial", first, 0, norm_weight=ops.WIDE_NORM_WEIGHT)
    parts: list[Sequence[Case]] = [
        basics,
        [_step(scale, steps[0], ONE_ORDER, *_quack(scale, steps[0]))],
        [_step(scale, workload, *_one_order(scale, workload)) for workload in steps[1:]],
        small[:2],
        [only(ops.elementwise_case(scale, op, first, 0), BANDWIDTH) for op in FIRST_OPS],
        attention[:2],
        gemms,
        [only(ops.adamw_case(scale, 0), OPTIMIZERS)],
        _lengths(scale, FIRST_LENGTHS),
        [ops.mlp_case(scale, first, 0), only(encoders.vae_case(scale, steps[0]), VAES)],
        [models.sustained_case(scale, steps[0], LONGEST_S, 0)],
        # Scores that need the ordinary softmax, beside those above, which do not.
        [only(wide, OTHER_LIBRARIES)],
        [only(ops.attention_case(scale, "spatial", _wide_pack(scale), 0, head_size=WIDE_HEAD), ("sdpa-cudnn", "ours"))],
        blocks[:1],
        [models.step_case(scale, steps[0], (SHIPPED,), 0)],
        [attention[2], models.step_case(scale, steps[0], (OWN_CODE,), 0)],
        blocks[1:2],
        _lengths(scale, NEXT_LENGTHS),
        [models.step_case(scale, workload, (SHIPPED, *_quack(scale, workload)), 0) for workload in steps[1:3]],
        [*block_products.list_cases(scale), *_sustained_by_quack(scale, steps[0])],
        [_few(scale, case) for case in models.list_mixed_step_cases(scale)],
        [only(ops.elementwise_case(scale, op, first, 0), BANDWIDTH) for op in ops.OPS if op not in FIRST_OPS],
        [only(models.block_case(scale, first, 0), OTHER_COMPILED)],
        blocks[2:],
        small[2:],
        [models.sampling_case(scale, workload, SMALL_STEPS, 0) for workload in models.small_samples(scale)],
        [_waterfall(scale)],
        [models.step_case(scale, workload, (SHIPPED,), 0) for workload in steps[3:]],
        [_few(scale, models.step_case(scale, workload, FEW, 0)) for workload in _other_frames(scale)],
        [models.sustained_case(scale, workload, LONGEST_S / 3, 0) for workload in steps[1:]],
        more_gemms,
        _lengths(
            scale, {kind: lengths for (kind, device), lengths in DEFAULT_LENGTHS.items() if device == scale.device}
        ),
        [only(models.block_case(scale, scale.mixed, 0), ("eager", "compile", "ours"))],
        [encoders.step_case(scale, steps[0])],
        convergence.list_cases(scale),
    ]
    unique = {case.identity: case for part in parts for case in part}
    return [replace(case, value=VALUE - index) for index, case in enumerate(unique.values())]


def only(case: Case, names: Sequence[str]) -> Case:
    """The case with fewer providers."""
    return replace(case, providers=tuple(name for name in case.providers if name in names))


def _ceilings(scale: Scale) -> tuple[list[Case], list[Case], list[Case]]:
    """(copy, square product and launches; products of a filled step; products of other sizes)."""
    cases = ceilings.list_cases(scale)
    products = [case for case in cases if case.template.level == "gemm" and case.template.op != "square"]
    filled = [case for case in products if case.value > models.BLOCK_VALUE]
    return (
        [case for case in cases if case not in products],
        filled,
        [case for case in products if case not in filled],
    )


def _step(scale: Scale, workload: Workload, *others: str) -> Case:
    """Open-Sora with flash attention, torch.compile and ours, the latter two with as few recomputed blocks as fit."""
    baseline, *storing = STEPS
    names = [scale.least_recomputing(name, workload.tokens) for name in storing]
    return models.step_case(scale, workload, (baseline, *_stored(scale, workload), *names, *others), 0)


def _stored(scale: Scale, workload: Workload) -> tuple[str, ...]:
    """Open-Sora as in its stage 1, where all its activations fit."""
    fits = workload.tokens <= scale.most_tokens("eager")
    return (STORED,) if fits and workload.resolution in STORED_AT else ()


def _one_order(scale: Scale, workload: Workload) -> tuple[str, ...]:
    """At 480p the gradients of "compile" were wrong, too."""
    fits = workload.tokens <= scale.most_tokens("compile")
    return (ONE_ORDER,) if fits and workload.resolution == "480p" else ()


def _quack(scale: Scale, workload: Workload) -> tuple[str, ...]:
    """Ours with other matrix products, where all its activations fit."""
    return (QUACK,) if workload.tokens <= scale.most_tokens("ours") else ()


def _sustained_by_quack(scale: Scale, workload: Workload) -> list[Case]:
    """With the host's time of its products and without, where only power holds them back."""
    names = [f"{name}{graph}" for name in _quack(scale, workload) for graph in ("", "-graph")]
    return [models.sustained_case(scale, workload, LONGEST_S / 3, 0, name) for name in names]


def _small_step(scale: Scale, workload: Workload) -> Case:
    """Graphs keep the memory that they work in while the others take their turns: that of "compile" where both fit."""
    both = workload.tokens <= scale.most_tokens("compile", "compile", "ours")
    kept = ("compile", "ours") if both else ("ours",)

    def fitting(storing: str, name: str, otherwise: str) -> str:
        return name if workload.tokens <= scale.most_tokens(storing, *kept) else otherwise

    eager, compiled, *ours, graph = SMALL_STEPS
    names = [
        fitting("eager", STORED, STEPS[0]),
        fitting("eager", eager, f"{eager}-recompute"),
        fitting("compile", compiled, f"{compiled}-recompute"),
        *ours,
        *([graph] if both else []),
    ]
    return models.step_case(scale, workload, tuple(names), 0)


def _few(scale: Scale, case: Case) -> Case:
    """Eager and ours; eager recomputes all blocks where its activations do not fit, ours as few as it must."""
    tokens = case.template.tokens
    eager = "eager" if tokens <= scale.most_tokens("eager") else "eager-recompute"
    return replace(case, providers=(eager, scale.least_recomputing("ours", tokens)))


def _waterfall(scale: Scale) -> Case:
    """What the headline has not measured of it; where that is too large for some, all of it and all peers."""
    workload = models.waterfall_workload(scale)
    known = (SHIPPED, *STEPS, *_stored(scale, workload), ONE_ORDER)
    names = [name for name in (*WATERFALL, *OTHER_COMPILED) if name not in known]
    if workload not in scale.steps:
        names = list(dict.fromkeys([*WATERFALL, *known, *OTHER_COMPILED]))
    return models.step_case(scale, workload, tuple(names), 0)


def _lengths(scale: Scale, wanted: Mapping[str, Sequence[int]]) -> list[Case]:
    cases = []
    for case in ops.list_length_cases(scale):
        kind, length = case.template.op.removesuffix("_attention"), int(case.template.workload.split()[-1])
        if length in wanted.get(kind, ()):
            cases.append(only(case, OTHER_LIBRARIES))
    return cases


def _wide_pack(scale: Scale) -> Pack:
    """Frames long enough that matrix products take most of the time."""
    return Pack.of(next((item for item in scale.headline if item.resolution == "480p"), scale.headline[-1]))


def _small_batches(scale: Scale) -> list[Workload]:
    """What stage 1 takes in a step: 6 videos of 144p, 2 of 240p, 48 images."""
    if scale.device != "cuda":
        return []
    sizes = {item.name: item for item in stage_buckets("stage1")}
    return [sizes[name] for name in ("144p×16", "240p×16", "144p×1")]


def _other_frames(scale: Scale) -> list[Workload]:
    """Other frame counts of two resolutions."""
    known = {(item.name, item.batch) for item in scale.steps}
    wanted = [fill(name, frames, scale.tokens) for name in ("240p", "480p") for frames in FRAME_COUNTS]
    return [item for item in wanted if item.tokens <= 2 * scale.tokens and (item.name, item.batch) not in known]
