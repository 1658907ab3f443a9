"""What to measure before anything else: the numbers that the plan of this project rests on.

Matrix products at the exact shapes, torch.compile of the plain model, attention libraries at head size 72, ordinary
against bounded softmax, bandwidth of the memory-bound ops, and the cost of a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..case import Case
from ..shapes import Pack
from . import ceilings, models, ops
from .scale import Scale

LIBRARIES = ("eager", "sdpa-flash", "sdpa-cudnn", "flash-attn-3", "flash-attn-4", "ours")


def list_cases(scale: Scale) -> list[Case]:
    """In the order in which they decide something."""
    pack = Pack.of(models.by_importance(scale)[0])
    value = ops.HEADLINE_VALUE
    cases = [
        models.step_case(scale, workload, ("upstream", "eager", "compile", "ours"), models.STEP_VALUE - 10 * index)
        for index, workload in enumerate(models.by_importance(scale)[:2])
    ]
    cases += [ops.elementwise_case(scale, op, pack, value) for op in ("modulated_norm", "gate_residual_modulated_norm")]
    cases += [ops.attention_case(scale, kind, pack, value) for kind in ("spatial", "temporal")]
    cases.append(ops.attention_case(scale, "spatial", pack, value - 1, norm_weight=ops.WIDE_NORM_WEIGHT))
    cases += [only(case, LIBRARIES) for case in ops.list_length_cases(scale)]
    return ceilings.list_cases(scale) + cases


def only(case: Case, names: Sequence[str]) -> Case:
    """The case with fewer providers."""
    return replace(case, providers=tuple(name for name in case.providers if name in names))
