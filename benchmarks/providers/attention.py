"""Every implementation of ST-DiT-2's three attentions that this machine may have, on the same inputs.

A provider takes what the op takes (packed qkv and the norm weights) and returns what the op returns, so each does the
same work: rotary embedding and QK-norm in upstream's order, then attention. Libraries without a fused norm get it from
eager PyTorch; the provider named "compile" lets torch.compile fuse what it can around PyTorch's own attention.

Letters: N tokens of the pack, H heads, D head size, M text tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout, TextLayout
from opensora_fast.kernels.qk_norm_rotary import rms_norm_reference, rotary_reference

from ..environment import installed_version

KINDS = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class AttentionWork:
    """Inputs of one attention call. `leaves` are those that get a gradient."""

    kind: str
    layout: PackLayout
    text: TextLayout | None
    leaves: dict[str, Tensor]
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def device(self) -> str:
        return self.layout.device.type

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    def to(self, dtype: torch.dtype) -> AttentionWork:
        """The same values in another dtype, as fresh leaves."""
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves)


def make_attention_work(
    kind: str, length: int, device: str, dtype: torch.dtype, tokens: int, heads: int, head_size: int, seed: int = 0
) -> AttentionWork:
    """Random inputs of about `tokens` tokens whose attended length is `length`.

    spatial: frames of `length` tokens; temporal: videos of `length` frames; cross: `length` text tokens for each of two
    videos.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    if kind == "cross":
        layout = PackLayout.of([(1, 1, max(tokens // 2, 1))] * 2, device)
        text = TextLayout.from_lengths([length] * 2, layout.device)
        leaves = {"q": draw(layout.num_tokens, heads, head_size), "kv": draw(text.num_tokens, 2, heads, head_size)}
        return AttentionWork(kind, layout, text, leaves)
    count = max(tokens // length, 1)
    shapes = [(count, 1, length)] if kind == "spatial" else [(length, 1, count)]
    layout = PackLayout.of(shapes, device)
    leaves = {"qkv": draw(layout.num_tokens, 3, heads, head_size)}
    for name in ("q_weight", "k_weight"):
        leaves[name] = (1 + 0.1 * draw(head_size).detach()).requires_grad_()
    angles = torch.arange(layout.max_frames, device=device)[:, None] / 10000 ** (
        torch.arange(0, head_size, 2, device=device) / head_size
    )
    return AttentionWork(kind, layout, None, leaves, angles.cos(), angles.sin())


@dataclass(frozen=True)
class AttentionProvider:
    """A way to compute attention.

    Attributes:
        name: as in rows.
        attend: (q, k, v each [sequences, H, length, D]) → [sequences, H, length, D]; None: `call` does everything.
        missing: (work) → why it cannot run here, "" if it can.
        version: of the library.
        call: computes the whole op, for providers that do not go through `attend`.
    """

    name: str
    missing: Callable[[AttentionWork], str]
    version: Callable[[], str]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    call: Callable[[AttentionWork], Tensor] | None = None

    def __call__(self, work: AttentionWork) -> Tensor:
        """Returns [N, H, D]."""
        if self.call is not None:
            return self.call(work)
        assert self.attend is not None
        return dense_attention(work, self.attend)


def dense_attention(work: AttentionWork, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The op for packs of equal shapes and texts of equal length, with `attend` as its core."""
    run = work.layout.runs[0]
    if work.kind == "cross":
        assert work.text is not None
        q = work.leaves["q"].unflatten(0, (run.videos, -1)).transpose(1, 2)
        k, v = work.leaves["kv"].unflatten(0, (run.videos, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)
    qkv = work.leaves["qkv"].unflatten(0, (run.videos, run.frames, run.frame_tokens))
    q_weight, k_weight = work.leaves["q_weight"], work.leaves["k_weight"]
    if work.kind == "spatial":
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
        output = attend(rms_norm_reference(q, q_weight), rms_norm_reference(k, k_weight), v)
        return output.transpose(1, 2).flatten(0, 1)
    q, k, v = (z.flatten(0, 1) for z in qkv.permute(3, 0, 2, 4, 1, 5).unbind(0))
    q, k = (rotary_reference(z, work.cos, work.sin) for z in (q, k))
    output = attend(rms_norm_reference(q, q_weight), rms_norm_reference(k, k_weight), v)
    return output.unflatten(0, (run.videos, run.frame_tokens)).permute(0, 3, 1, 2, 4).flatten(0, 2)


def naive_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Upstream as shipped: the scores are materialized, softmax in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.to(wide).softmax(dim=-1).to(q.dtype) @ v


def _sdpa(backend: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
            return scaled_dot_product_attention(q, k, v)

    return attend


def _library(module: str, function: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flash-attn and xformers: functions of [sequences, length, H, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = getattr(importlib.import_module(module), function)
        output = call(*(z.transpose(1, 2) for z in (q, k, v)))
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return attend


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v)


def _compiled_flex() -> Callable[..., Tensor]:
    if "flex" not in _compiled:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled["flex"] = torch.compile(flex_attention, dynamic=False)
    return _compiled["flex"]


_compiled: dict[str, Callable[..., Tensor]] = {}  # torch.compile keeps its own cache behind each


def _compile_call(work: AttentionWork) -> Tensor:
    if "dense" not in _compiled:
        _compiled["dense"] = torch.compile(
            lambda work: dense_attention(work, scaled_dot_product_attention), dynamic=False
        )
    return _compiled["dense"](work)


def _own_call(backend: str) -> Callable[[AttentionWork], Tensor]:
    def call(work: AttentionWork) -> Tensor:
        leaves = work.leaves
        if work.kind == "cross":
            assert work.text is not None
            return kernels.cross_attention(leaves["q"], leaves["kv"], work.layout, work.text, backend=backend)
        if work.kind == "spatial":
            return kernels.spatial_attention(
                leaves["qkv"], leaves["q_weight"], leaves["k_weight"], work.layout, backend=backend
            )
        return kernels.temporal_attention(
            leaves["qkv"], leaves["q_weight"], leaves["k_weight"], work.cos, work.sin, work.layout, backend=backend
        )

    return call


def _always(work: AttentionWork) -> str:
    return ""


def _needs_cuda(work: AttentionWork) -> str:
    return "" if work.device == "cuda" else "needs a CUDA GPU"


def _needs_half(work: AttentionWork) -> str:
    if work.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 only, not {work.dtype}".replace("torch.", "")
    return _needs_cuda(work)


def _needs_module(module: str, distribution: str) -> Callable[[AttentionWork], str]:
    def missing(work: AttentionWork) -> str:
        if not installed_version(distribution):
            return f"{distribution} is not installed"
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken extension module raises anything; the row says what
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
        return _needs_half(work)

    return missing


def _torch_version() -> str:
    return torch.__version__


ATTENTION_PROVIDERS = (
    AttentionProvider("upstream", _always, _torch_version, attend=naive_attend),
    AttentionProvider("sdpa-math", _always, _torch_version, attend=_sdpa("MATH")),
    AttentionProvider("sdpa-flash", _needs_half, _torch_version, attend=_sdpa("FLASH_ATTENTION")),
    AttentionProvider("sdpa-efficient", _needs_cuda, _torch_version, attend=_sdpa("EFFICIENT_ATTENTION")),
    AttentionProvider("sdpa-cudnn", _needs_half, _torch_version, attend=_sdpa("CUDNN_ATTENTION")),
    AttentionProvider("flex", _needs_cuda, _torch_version, attend=_flex),
    AttentionProvider("compile", _needs_cuda, _torch_version, call=_compile_call),
    AttentionProvider(
        "flash-attn-2",
        _needs_module("flash_attn", "flash-attn"),
        lambda: installed_version("flash-attn"),
        attend=_library("flash_attn", "flash_attn_func"),
    ),
    AttentionProvider(
        "flash-attn-3",
        _needs_module("flash_attn_interface", "flash-attn-3"),
        lambda: installed_version("flash-attn-3"),
        attend=_library("flash_attn_interface", "flash_attn_func"),
    ),
    AttentionProvider(
        "flash-attn-4",
        _needs_module("flash_attn.cute", "flash-attn-4"),
        lambda: installed_version("flash-attn-4"),
        attend=_library("flash_attn.cute", "flash_attn_func"),
    ),
    AttentionProvider(
        "xformers",
        _needs_module("xformers.ops", "xformers"),
        lambda: installed_version("xformers"),
        attend=_library("xformers.ops", "memory_efficient_attention"),
    ),
    AttentionProvider("reference", _always, _torch_version, call=_own_call("reference")),
    AttentionProvider("ours", _needs_cuda, lambda: installed_version("opensora_fast"), call=_own_call("triton")),
)
