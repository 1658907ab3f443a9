"""The ways to compute a block, a step or a sampling step of ST-DiT-2 that are compared, from upstream's to ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora_fast.model.backends import Backends

from ..measuring.provider import own_version, torch_version
from .open_sora import open_sora_version
from .products import quack_version

REFERENCE, TRITON = Backends.all("reference"), Backends.all("triton")
WITH_QUACK = Backends.all("triton", linear="quack")


def _with(*ops: str) -> Backends:
    return Backends(**{**vars(REFERENCE), **dict.fromkeys(ops, "triton")})


# Ends of names of variants that recompute, and the share of the blocks that do.
RECOMPUTING = {
    "-recompute-quarter": 0.25,
    "-recompute-half": 0.5,
    "-recompute-three-quarters": 0.75,
    "-recompute": 1.0,
}
# Options of torch.compile: without the kernels that sum one tensor along its rows and along its columns at once, in
# which torch 2.10 to 2.13 have known faults.
ONE_ORDER = (("triton.mix_order_reduction", False),)
NORMS = ("modulated_norm", "gate_residual", "gate_residual_modulated_norm")


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        name: of the provider.
        backends: of this project's ops; None: upstream's own order of operations.
        installed: upstream's own code, not this project's writing of it.
        flash: upstream with flash attention on.
        recompute: share of the blocks whose activations are computed again in backward.
        compiled: every block goes through torch.compile.
        options: of torch.compile, by their names in `torch._inductor.config`.
        graphed: replayed as CUDA graphs: forward, loss and backward of a step, a call of a sampler.
        sdpa: the backend that PyTorch's attention prefers, "FLASH" or "CUDNN"; "": its own choice.
    """

    name: str
    backends: Backends | None = None
    installed: bool = False
    flash: bool = False
    recompute: float = 0.0
    compiled: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    graphed: bool = False
    sdpa: str = ""

    @property
    def is_upstream(self) -> bool:
        return self.backends is None

    @property
    def uses_triton(self) -> bool:
        return self.backends is not None and "triton" in vars(self.backends).values()

    @property
    def uses_quack(self) -> bool:
        return self.backends is not None and self.backends.linear == "quack"

    def version(self) -> str:
        """Of what computes."""
        if self.installed:
            return open_sora_version()
        own = own_version() if self.uses_triton else torch_version()
        return f"{own} quack {quack_version()}" if self.uses_quack else own

    @property
    def sdpa_order(self) -> tuple[str, ...]:
        """Names of `SDPBackend`, those to be tried first before the others; () leaves PyTorch the choice."""
        # What the first does not take (a mask, float64) goes to the next; cuDNN only to who asks for it.
        names = (self.sdpa, "FLASH", "EFFICIENT") if self.sdpa else ()
        return tuple(f"{name}_ATTENTION" for name in dict.fromkeys(names)) + ("MATH",) * bool(names)


def attention_by(order: Sequence[str]) -> AbstractContextManager[None]:
    """Within it PyTorch's attention tries backends in this order."""
    if not order:
        return nullcontext()
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


VARIANTS = (
    Variant("open-sora", installed=True, recompute=1.0),
    # As its configurations mean it: they misspell the key.
    Variant("open-sora-flash", installed=True, flash=True, recompute=1.0),
    Variant("upstream", recompute=1.0),  # as shipped: naive attention, activations recomputed
    Variant("upstream-flash", flash=True, recompute=1.0),
    Variant("upstream-flash-stored", flash=True),
    Variant("compile-upstream", flash=True, compiled=True),
    Variant("eager", REFERENCE),
    Variant("eager-recompute", REFERENCE, recompute=1.0),
    Variant("eager-flash", REFERENCE, sdpa="FLASH"),
    Variant("eager-cudnn", REFERENCE, sdpa="CUDNN"),
    Variant("compile", REFERENCE, compiled=True),
    # Tells whether those kernels are why the gradients of "compile" were infinite on an H200.
    Variant("compile-one-order", REFERENCE, compiled=True, options=ONE_ORDER),
    Variant("compile-graph", REFERENCE, compiled=True, graphed=True),
    *(Variant(f"compile{name}", REFERENCE, compiled=True, recompute=share) for name, share in RECOMPUTING.items()),
    Variant("ours-norms", _with(*NORMS)),
    Variant("ours-norms-gelu", _with(*NORMS, "gelu_tanh")),
    Variant("ours-norms-gelu-temporal", _with(*NORMS, "gelu_tanh", "temporal_attention")),
    Variant("ours-norms-gelu-temporal-spatial", _with(*NORMS, "gelu_tanh", "temporal_attention", "spatial_attention")),
    Variant("ours", TRITON),
    *(Variant(f"ours{name}", TRITON, recompute=share) for name, share in RECOMPUTING.items()),
    Variant("ours-graph", TRITON, graphed=True),
    Variant("ours-quack", WITH_QUACK),
    Variant("ours-quack-graph", WITH_QUACK, graphed=True),  # without the time that quack takes of the host
)
VARIANT_OF = {variant.name: variant for variant in VARIANTS}

# Each technique on top of the one before.
WATERFALL = (
    "upstream",
    "upstream-flash",
    "upstream-flash-stored",
    "eager",
    "ours-norms",
    "ours-norms-gelu",
    "ours-norms-gelu-temporal",
    "ours-norms-gelu-temporal-spatial",
    "ours",
)
PEERS = ("open-sora", "open-sora-flash", "upstream", "upstream-flash", "eager", "eager-flash", "eager-cudnn")
PEERS += ("compile", "compile-one-order", "compile-upstream", "ours")
# On packs of mixed shapes; upstream's rows say that it takes one shape only.
PACK_PEERS = ("upstream-flash", "eager", "eager-flash", "compile", "ours")
# Where the activations of 16 frames of 720p do not fit without.
RECOMPUTING_PEERS = ("eager-recompute", "compile-recompute", "ours-recompute")
