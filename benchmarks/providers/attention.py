"""Every implementation of ST-DiT-2's three attentions that this machine may have, on the same inputs.

On a pack of different lengths, libraries with kernels for sequences of any lengths use them; the others are called once
for each run of equal videos. FlexAttention gets one block mask for the pack.

No library has ST-DiT-2's QK-norm. On a GPU each gets it, with the rotary embedding, from torch.compile, as who uses a
library and cares for speed would write it; rows up to commit ea700ad had it from eager PyTorch, in several passes.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from opensora_fast import kernels
from opensora_fast.kernels.sequence_attention import FLASH_ELEMENTS, count_flash_elements

from ..measuring.provider import (
    Bound,
    Missing,
    Provider,
    compiled,
    compiles_on_cuda,
    needs_cuda,
    needs_half,
    needs_module,
    nothing_missing,
    of_function,
    own_version,
    torch_version,
    version_of,
)
from .attention_work import (
    Attend,
    AttentionWork,
    Normalize,
    attend_run_by_run,
    make_starts,
    normalize,
    sequence_lengths,
    to_sequences,
)
from .flex import flex_attention_of
from .variants import ONE_ORDER

# (q, k, v [tokens, H, D], starts of the sequences of q and of k, int32, longest of each) → [tokens, H, D]
AttendVarlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def naive_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Upstream as shipped: the scores are materialized, softmax in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.to(wide).softmax(dim=-1).to(q.dtype) @ v


def own_call(work: AttentionWork, backend: str) -> Tensor:
    """The op of `opensora_fast.kernels`."""
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


def flash_elements(work: AttentionWork) -> int:
    """Most elements that PyTorch's flash attention has to count in a call on all equally long sequences."""
    lengths = Counter(sequence_lengths(work)[0])
    heads, head_size = next(iter(work.leaves.values())).shape[-2:]
    return max(count_flash_elements(count, heads, length, head_size) for length, count in lengths.items())


def _fits_flash(work: AttentionWork) -> str:
    elements = flash_elements(work)
    if elements <= FLASH_ELEMENTS:
        return needs_half(work)
    return f"backward would sum in {elements / 2**31:.1f} · 2^31 elements; torch's crashes the GPU beyond 2^31"


def sdpa_of(work: AttentionWork) -> Callable[[], AbstractContextManager[object]]:
    """Makes what leaves PyTorch the choice of a backend, among those that survive the work."""
    if flash_elements(work) <= FLASH_ELEMENTS:
        return nullcontext
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return partial(sdpa_kernel, [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def norm_for_libraries(work: AttentionWork) -> Normalize:
    """One compiled function; eager on the CPU, where nothing is timed for its speed.

    What cannot be compiled as one graph raises, as does one shape more than torch.compile takes: nothing of it may run
    in eager PyTorch instead. The gradients of the weights are sums over rows of what is summed along rows.
    """
    if work.device != "cuda":
        return normalize
    return compiled(normalize, fullgraph=True, options=dict(ONE_ORDER))


def _run_by_run(attend: Attend) -> Callable[[AttentionWork], Bound]:
    return lambda work: partial(attend_run_by_run, work, attend, norm_for_libraries(work))


def _sdpa(backend: str) -> Callable[[AttentionWork], Bound]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v)

    return _run_by_run(attend)


def _dense_library(module: str, function: str, padded: bool = False) -> Attend:
    """flash-attn and xformers: functions of [sequences, length, H, D]; `padded`: see `_padded`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = getattr(importlib.import_module(module), function)
        inputs = [z.transpose(1, 2) for z in (q, k, v)]
        return (_padded(call, *inputs) if padded else _first(call(*inputs))).transpose(1, 2)

    return attend


def _flash_varlen(module: str, padded: bool = False) -> AttendVarlen:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int
    ) -> Tensor:
        call = partial(
            importlib.import_module(module).flash_attn_varlen_func,
            cu_seqlens_q=q_starts,
            cu_seqlens_k=k_starts,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
        )
        return _padded(call, q, k, v) if padded else _first(call(q, k, v))

    return attend


# FlashAttention 4 (4.0.0b36) on Hopper, backward: the gradient of q is added up in tiles whose width is the head size
# in multiples of 16 (80 for 72), and read in tiles whose width is that in multiples of 32 (96), so that all tiles of a
# sequence but the first are read in the wrong place. Right where both are the same.
# https://github.com/Dao-AILab/flash-attention/pull/2896
HEAD_MULTIPLE = 32


def _padded(call: Callable[..., Tensor | tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A call with zeros behind each head, up to a multiple of `HEAD_MULTIPLE`: the copies are in its time."""
    size = q.shape[-1]
    inputs = [pad(z, (0, -size % HEAD_MULTIPLE)) for z in (q, k, v)]
    return _first(call(*inputs, softmax_scale=size**-0.5))[..., :size]


def _needs_padding(work: AttentionWork) -> str:
    size = next(iter(work.leaves.values())).shape[-1]
    return needs_half(work) if size % HEAD_MULTIPLE else f"a head of {size} needs no padding"


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return _first(varlen_attn(q, k, v, q_starts, k_starts, longest_q, longest_k))


def _prepare_varlen(attend: AttendVarlen, work: AttentionWork) -> Bound:
    q_lengths, k_lengths = sequence_lengths(work)
    q_starts, k_starts = (make_starts(lengths, work.layout.device) for lengths in (q_lengths, k_lengths))
    norm = norm_for_libraries(work)

    def call() -> Tensor:
        sequences = to_sequences(work, norm)
        output = attend(sequences.q, sequences.k, sequences.v, q_starts, k_starts, max(q_lengths), max(k_lengths))
        return sequences.restore(output)

    return call


def _dense_or_varlen(dense: Attend, varlen: AttendVarlen) -> Callable[[AttentionWork], Bound]:
    def prepare(work: AttentionWork) -> Bound:
        return _run_by_run(dense)(work) if work.is_uniform else _prepare_varlen(varlen, work)

    return prepare


def _prepare_xformers(work: AttentionWork) -> Bound:
    if work.is_uniform:
        return _run_by_run(_dense_library("xformers.ops", "memory_efficient_attention"))(work)
    operations = importlib.import_module("xformers.ops")
    mask = operations.fmha.BlockDiagonalMask.from_seqlens(*sequence_lengths(work))
    norm = norm_for_libraries(work)

    def call() -> Tensor:
        sequences = to_sequences(work, norm)
        inputs = (z[None] for z in (sequences.q, sequences.k, sequences.v))
        return sequences.restore(operations.memory_efficient_attention(*inputs, attn_bias=mask)[0])

    return call


def _prepare_flex(work: AttentionWork) -> Bound:
    if work.is_uniform:
        return _run_by_run(flex_attention_of(None))(work)
    q_lengths, k_lengths = sequence_lengths(work)
    attend = flex_attention_of((q_lengths, k_lengths, work.layout.device))
    norm = norm_for_libraries(work)

    def call() -> Tensor:
        sequences = to_sequences(work, norm)
        inputs = (z.transpose(0, 1)[None] for z in (sequences.q, sequences.k, sequences.v))
        return sequences.restore(attend(*inputs)[0].transpose(0, 1))

    return call


def _prepare_compiled(work: AttentionWork) -> Bound:
    function = compiled(lambda work: attend_run_by_run(work, scaled_dot_product_attention))
    choice = sdpa_of(work)

    def call() -> Tensor:
        with choice():
            return function(work)

    return call


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the log-sum-exp as well."""
    return output[0] if isinstance(output, tuple) else output


def _has_varlen(work: AttentionWork) -> str:
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return needs_half(work)


FLASH_2, FLASH_3, FLASH_4 = ("flash-attn",), ("flash-attn-3", "flash_attn_3"), ("flash-attn-4", "flash-attn-cute")
XFORMERS = ("xformers",)


def _library(
    name: str,
    prepare: Callable[[AttentionWork], Bound],
    missing: Missing = nothing_missing,
    version: Callable[[], str] = torch_version,
) -> Provider:
    """A provider of the attention alone, whose rows say whose norm it had."""
    return Provider(name, prepare, missing, lambda: f"{version()}, QK-norm compiled on CUDA")


ATTENTION_PROVIDERS = (
    Provider("upstream", of_function(lambda work: attend_run_by_run(work, naive_attend))),
    Provider("eager", of_function(lambda work: own_call(work, "reference"))),
    _library("sdpa-math", _sdpa("MATH")),
    _library("sdpa-flash", _sdpa("FLASH_ATTENTION"), _fits_flash),
    _library("sdpa-efficient", _sdpa("EFFICIENT_ATTENTION"), needs_cuda),
    _library("sdpa-cudnn", _sdpa("CUDNN_ATTENTION"), needs_half),
    _library("torch-varlen", partial(_prepare_varlen, _torch_varlen), _has_varlen),
    _library("flex", _prepare_flex, compiles_on_cuda),
    Provider("compile", _prepare_compiled, compiles_on_cuda),
    _library(
        "flash-attn-2",
        _dense_or_varlen(_dense_library("flash_attn", "flash_attn_func"), _flash_varlen("flash_attn")),
        needs_module("flash_attn", FLASH_2, needs_half),
        version_of(FLASH_2),
    ),
    _library(
        "flash-attn-3",
        _dense_or_varlen(
            _dense_library("flash_attn_interface", "flash_attn_func"), _flash_varlen("flash_attn_interface")
        ),
        needs_module("flash_attn_interface", FLASH_3, needs_half),
        version_of(FLASH_3),
    ),
    _library(
        "flash-attn-4",
        _dense_or_varlen(_dense_library("flash_attn.cute", "flash_attn_func"), _flash_varlen("flash_attn.cute")),
        needs_module("flash_attn.cute", FLASH_4, needs_half),
        version_of(FLASH_4),
    ),
    _library(
        "flash-attn-4-padded",
        _dense_or_varlen(
            _dense_library("flash_attn.cute", "flash_attn_func", padded=True),
            _flash_varlen("flash_attn.cute", padded=True),
        ),
        needs_module("flash_attn.cute", FLASH_4, _needs_padding),
        version_of(FLASH_4),
    ),
    _library("xformers", _prepare_xformers, needs_module("xformers.ops", XFORMERS, needs_half), version_of(XFORMERS)),
    Provider("ours", of_function(lambda work: own_call(work, "triton")), needs_cuda, own_version),
)
ATTENTION_REFERENCE = ATTENTION_PROVIDERS[1]
