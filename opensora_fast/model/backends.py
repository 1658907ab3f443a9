"""The implementation chosen for each op of a model."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Backends:
    """One of `kernels.BACKENDS` for each op: "auto" (Triton on CUDA, reference elsewhere), "reference" or "triton"."""

    modulated_norm: str = "auto"
    gate_residual: str = "auto"
    gate_residual_modulated_norm: str = "auto"
    spatial_attention: str = "auto"
    temporal_attention: str = "auto"
    cross_attention: str = "auto"
    gelu_tanh: str = "auto"

    @classmethod
    def all(cls, backend: str) -> Backends:
        return cls(**{field.name: backend for field in fields(cls)})
