"""Train, run and measure the ST-DiT-2 of Open-Sora 1.1."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import STDiT2, STDiT2Config
    from .replace import use_kernels

__all__ = ["STDiT2", "STDiT2Config", "use_kernels"]


def __getattr__(name: str):
    # PEP 562: `opensora-fast --help` must not wait for torch.
    if name in __all__:
        from . import model, replace

        return getattr(replace if name == "use_kernels" else model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
