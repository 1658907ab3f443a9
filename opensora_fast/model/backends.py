"""The implementation chosen for each op of a model."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Backends:
    """One of `kernels.BACKENDS` for each op: "auto" (Triton on CUDA, reference elsewhere), "reference" or "triton".

    Attributes:
        linear: what multiplies in the Linears on all tokens, "torch" or "quack" (see `kernels.linear`); quack's
            products in the MLP end with the GELU, whatever `gelu_tanh` is (see `kernels.mlp`).
    """

    modulated_norm: str = "auto"
    gate_residual: str = "auto"
    gate_residual_modulated_norm: str = "auto"
    spatial_attention: str = "auto"
    temporal_attention: str = "auto"
    cross_attention: str = "auto"
    gelu_tanh: str = "auto"
    linear: str = "torch"

    @classmethod
    def all(cls, backend: str, linear: str = "torch") -> Backends:
        """Every op of two implementations by `backend`."""
        return cls(**dict.fromkeys(OPS, backend), linear=linear)


# Those of two implementations, a reference and a kernel.
OPS = tuple(field.name for field in fields(Backends) if field.name != "linear")
