"""How long a case takes on a GPU: predictions, for the order of the plan and for what is still begun before the end.

Cases on the CPU have no estimate but those that say their own.
"""

from __future__ import annotations

import re
from dataclasses import replace

from opensora_fast.costs.hardware import DATASHEETS, Gpu

from ..measuring.case import Case
from ..measuring.timing import FEWEST_ROUNDS
from ..providers.variants import RECOMPUTING
from .scale import Scale

STARTUP_S = 50.0  # imports, CUDA, the first model and optimizer, and the kernels that every step needs
CEILING_S = {"copy": 3.0, "gemm": 4.0, "launch": 5.0}
# By the beginning of the provider's name, the rest eager PyTorch: microseconds a token of a training step on an H200,
# how many nanoseconds more for each token of a frame, and which share of the time memory takes. Fitted to the committed
# rows of "upstream" at commit ebc1d03 and of the others at fee19d3; those without rows are guesses between them.
PACES = (
    ("open-sora-flash", 38.0, 0.4, 0.7),
    ("open-sora", 39.0, 12.5, 0.7),
    ("upstream-flash-stored", 28.5, 0.3, 0.7),  # without the forward pass that the next one computes again
    ("upstream-flash", 38.0, 0.4, 0.7),
    ("upstream", 39.0, 12.5, 0.7),
    ("compile", 13.1, 1.5, 0.4),
    ("ours-norms", 14.0, 1.5, 0.4),
    ("ours", 9.0, 1.15, 0.2),
    ("", 22.0, 1.5, 0.6),
)
PACES_OF = DATASHEETS["H200"]
HOST_S = 0.25  # for the launches of a step, of "ours" on that machine at commit ebc1d03
MARGIN = 1.08  # a plan that is too short leaves cases unmeasured
# Forward and backward; inputs whose check is on smaller ones need the graphs of both.
COMPILE_S = {"op": 6.0, "block": 15.0, "step": 18.0, "sampling": 15.0}
GRAPHS_OF_SHORT_CHECKS = 2.0
LONGEST_CHECKED = 40_000  # tokens of timed inputs that are compared with float64 themselves, about
FLEX_S = 20.0
NORM_S = 3.0  # compiling the norm that attention libraries share
LISTS_S = 60.0  # compiling a step of the optimizer on lists of tensors
FIXED_S = {"op": 2.0, "block": 4.0, "step": 10.0, "sampling": 8.0}  # inputs, the float64 reference, eager
PER_PROVIDER_S = {"op": 0.4, "block": 1.0, "step": 1.0, "sampling": 0.5}
TRITON_S = 4.0  # kernels that are built for a new shape
CALLS_BEFORE_SAMPLES = 4.0  # check, first call, memory: in steps
CALLS_OF_A_TURN = 3.0  # one that is not counted and two samples


def with_estimate(case: Case, scale: Scale) -> Case:
    """The case with its seconds, where they can be predicted."""
    if case.seconds or scale.device != "cuda":
        return case
    return replace(case, seconds=round(_estimate(case, scale), 1))


def _estimate(case: Case, scale: Scale) -> float:
    level, names = case.template.level, case.providers
    if level in CEILING_S:
        return CEILING_S[level]
    if level not in FIXED_S:
        return 0.0
    seconds = FIXED_S[level] + PER_PROVIDER_S[level] * len(names)
    graphs = GRAPHS_OF_SHORT_CHECKS if case.template.tokens > LONGEST_CHECKED else 1.0
    seconds += graphs * COMPILE_S[level] * sum(name.startswith("compile") for name in names)
    seconds += FLEX_S * ("flex" in names)
    seconds += graphs * NORM_S * (case.template.op in ("spatial_attention", "temporal_attention"))
    seconds += LISTS_S * (case.template.op == "adamw" and "compile" in names)
    seconds += TRITON_S * any(name.startswith("ours") for name in names)
    if level in ("step", "sampling"):
        share = 1.0 if level == "step" else 2 / 3  # sampling computes twice the videos, forward
        assert scale.gpu is not None
        frame = mean_frame_tokens(case.template.shape)
        times = [share * step_seconds(name, case.template.tokens, frame, scale.gpu) for name in names]
        return seconds + sum(times) * (CALLS_BEFORE_SAMPLES + FEWEST_ROUNDS * CALLS_OF_A_TURN)
    # Samples end after a quarter of their time once there are thirty.
    planned = scale.seconds if level == "op" else scale.step_seconds / 2
    return seconds + len(case.directions) * planned / 2


def step_seconds(provider: str, tokens: int, frame_tokens: float, gpu: Gpu) -> float:
    """A training step, about; `frame_tokens`: of the frame that a token is in, on average."""
    paces = next(paces for name, *paces in PACES if provider.startswith(name))
    microseconds, nanoseconds, memory = paces
    slower = memory * PACES_OF.bandwidth / gpu.bandwidth + (1 - memory) * PACES_OF.matrix_flops / gpu.matrix_flops
    again = next((share / 3 for name, share in RECOMPUTING.items() if provider.endswith(name)), 0.0)
    on_gpu = tokens * (microseconds * 1e-6 + frame_tokens * nanoseconds * 1e-9) * slower * (1 + again)
    return MARGIN * (on_gpu if provider.endswith("-graph") else max(on_gpu, HOST_S))


def mean_frame_tokens(shape: str) -> float:
    """Of a row's shape such as "B=5 T=16 S=405 …", of several where videos are mixed."""
    parts = [tuple(map(int, part)) for part in re.findall(r"B=(\d+) T=(\d+) S=(\d+)", shape)]
    tokens = sum(videos * frames * size for videos, frames, size in parts)
    return sum(videos * frames * size**2 for videos, frames, size in parts) / tokens
