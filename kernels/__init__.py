"""The ops of ST-DiT-2 on packs of videos: a reference in plain PyTorch and a Triton kernel for each, with one meaning.

A file here is an op: its formula, its reference, its checks and its registration. Their Triton kernels are in
`attention/` and `rows/`, block sizes in `configurations/`, and what builds kernels without a GPU in `compilation/`.
This package imports torch and triton only and knows nothing of configuration files or training.
"""

if __name__ == "kernels":
    # transformers looks for Hugging Face's package of this name and imports what it finds: this folder, where a program
    # runs with the checkout on its path (`python -m` in it). Nothing may be registered here, as registering the ops a
    # second time takes away those that opensora_fast.kernels holds.
    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"kernels.{name}: `kernels` is a folder of opensora_fast's sources here; import opensora_fast.kernels. If "
            "Hugging Face's package of that name is meant, start in another folder, or with `python -P`"
        )

else:
    from .adamw import adamw
    from .cross_attention import cross_attention
    from .dispatch import BACKENDS, calls
    from .gate_residual import gate_residual
    from .gate_residual_modulated_norm import gate_residual_modulated_norm
    from .gelu_tanh import gelu_tanh
    from .layout import PackLayout, TextLayout
    from .linear import linear
    from .mlp import mlp
    from .modulated_norm import modulated_norm
    from .patchify import patchify, token_grid, unpatchify
    from .project_residual import project_residual
    from .qk_norm_rotary import qk_norm_rotary
    from .spatial_attention import spatial_attention
    from .temporal_attention import temporal_attention

__all__ = [
    "BACKENDS",
    "PackLayout",
    "TextLayout",
    "adamw",
    "calls",
    "cross_attention",
    "gate_residual",
    "gate_residual_modulated_norm",
    "gelu_tanh",
    "linear",
    "mlp",
    "modulated_norm",
    "patchify",
    "project_residual",
    "qk_norm_rotary",
    "spatial_attention",
    "temporal_attention",
    "token_grid",
    "unpatchify",
]
