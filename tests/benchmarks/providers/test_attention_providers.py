"""Attention by every library equals the others; what only runs on a GPU is tested for its arithmetic here."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from compiled_graphs import Graphs
from same_results import assert_same
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from opensora_fast.benchmarks.measuring.contest import op_results
from opensora_fast.benchmarks.measuring.provider import needs_module
from opensora_fast.benchmarks.providers import attention, flex
from opensora_fast.benchmarks.providers.attention_work import (
    KINDS,
    make_pack_attention_work,
    normalize,
    sequence_lengths,
)
from opensora_fast.kernels import PackLayout

SHAPES = [(2, 3, 5), (2, 3, 5), (1, 4, 4), (3, 2, 2)]
TEXT = [3, 1, 5, 4]


def attention_work(kind, uniform=False):
    shapes, text = (SHAPES[:2], [3, 3]) if uniform else (SHAPES, TEXT)
    return make_pack_attention_work(kind, shapes, text, "cpu", torch.float32, 2, 8)


def varlen(q, k, v, q_starts, k_starts, longest_q, longest_k):
    """What a library for sequences of any lengths does."""
    assert q_starts.dtype == k_starts.dtype == torch.int32
    q_lengths, k_lengths = q_starts.diff().tolist(), k_starts.diff().tolist()
    assert (max(q_lengths), max(k_lengths)) == (longest_q, longest_k)
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    return torch.cat(
        [scaled_dot_product_attention(*(z.transpose(0, 1) for z in part)).transpose(0, 1) for part in parts]
    )


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_as_sequences_and_run_by_run(kind, uniform):
    work = attention_work(kind, uniform)
    expected, _ = op_results(partial(attention.own_call, work, "reference"), work)
    assert_same(op_results(attention._prepare_varlen(varlen, work), work)[0], expected)
    for provider in attention.ATTENTION_PROVIDERS:
        if not provider.missing(work):
            assert_same(op_results(provider.prepare(work), work)[0], expected)


@pytest.fixture
def flash_attention_4(monkeypatch):
    """Functions with the arguments of flash-attn-4 4.0.0b36; the head sizes that they were called with."""
    sizes = []

    def attend(q, k, v, softmax_scale):
        sizes.append(q.shape[-1])
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k, v = (z.transpose(-3, -2) for z in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(-3, -2)

    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False):
        return attend(q, k, v, softmax_scale), None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
    ):
        lengths = [starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k)]
        assert [max(of) for of in lengths] == [max_seqlen_q, max_seqlen_k]
        parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([attend(*part, softmax_scale) for part in parts]), None

    module = ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    return sizes


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "size"), [("flash-attn-4", 8), ("flash-attn-4-padded", 32)])
def test_flash_attention_4_gets_heads_as_they_are_or_padded(name, size, kind, uniform, flash_attention_4):
    work = attention_work(kind, uniform)
    expected, _ = op_results(partial(attention.own_call, work, "reference"), work)
    provider = next(provider for provider in attention.ATTENTION_PROVIDERS if provider.name == name)
    assert_same(op_results(provider.prepare(work), work)[0], expected)
    assert set(flash_attention_4) == {size}


LIBRARIES_HERE = ("sdpa-math", "flash-attn-4", "flash-attn-4-padded")


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_libraries_get_their_norm_compiled_on_a_gpu_and_all_the_same_one(monkeypatch, kind, uniform, flash_attention_4):
    """What prepares them takes this CPU for a GPU."""
    work = attention_work(kind, uniform)
    expected, _ = op_results(partial(attention.own_call, work, "reference"), work)
    graphs = Graphs(monkeypatch)
    monkeypatch.setattr(attention.AttentionWork, "device", "cuda")
    for provider in attention.ATTENTION_PROVIDERS:
        if provider.name in LIBRARIES_HERE:
            bound = provider.prepare(work)
            for _ in range(2):
                assert_same(op_results(bound, work)[0], expected)
            assert provider.version().endswith(", QK-norm compiled on CUDA")
    assert graphs.options == ([] if kind == "cross" else [{"triton.mix_order_reduction": False}])
    for provider in attention.ATTENTION_PROVIDERS:
        if provider.name in ("upstream", "eager"):
            op_results(provider.prepare(work), work)
            assert "compiled" not in provider.version()
    assert graphs.count == (kind != "cross")


def test_a_norm_that_cannot_be_compiled_is_no_eager_one(monkeypatch):
    def broken(work, q, k):
        torch._dynamo.graph_break()
        return normalize(work, q, k)

    monkeypatch.setattr(attention.AttentionWork, "device", "cuda")
    monkeypatch.setattr(attention, "normalize", broken)
    library = next(provider for provider in attention.ATTENTION_PROVIDERS if provider.name == "sdpa-math")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        library.prepare(attention_work("spatial"))()


def test_a_norm_is_not_eager_for_more_shapes_than_the_compiler_takes(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(
        attention,
        "compiled",
        lambda f, **options: torch.compile(f, backend="eager", fullgraph=options["fullgraph"], dynamic=False),
    )
    monkeypatch.setattr(attention.AttentionWork, "device", "cuda")
    library = next(provider for provider in attention.ATTENTION_PROVIDERS if provider.name == "sdpa-math")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(2, 20):
            library.prepare(make_pack_attention_work("spatial", [(1, 1, length)], [], "cpu", torch.float32, 2, 8))()
    torch._dynamo.reset()


def test_heads_of_a_multiple_of_32_need_no_padding():
    missing = [
        attention._needs_padding(make_pack_attention_work("spatial", SHAPES, [], "cpu", torch.bfloat16, 2, size))
        for size in (72, 96)
    ]
    assert missing == ["needs a CUDA GPU", "a head of 96 needs no padding"]


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_with_the_block_mask_of_a_pack(kind, monkeypatch):
    work = attention_work(kind)
    work = replace(work, leaves={name: leaf.detach() for name, leaf in work.leaves.items()})  # no backward on the CPU
    # Without compilation it computes all scores and applies the mask, so this tests the mask and the order of tokens.
    monkeypatch.setattr(flex, "compiled", lambda function: flex_attention)
    expected = {"output": attention.own_call(work, "reference")}
    assert_same({"output": attention._prepare_flex(work)()}, expected, 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_a_mask_hold_every_pair_and_full_ones_nothing_else(kind):
    shapes = [(3, 8, 18), (3, 8, 18), (1, 16, 16), (2, 5, 9)]
    work = make_pack_attention_work(kind, shapes, [300, 130, 7, 200], "cpu", torch.float32, 1, 8)
    q_lengths, k_lengths = sequence_lengths(work)
    mask = flex.block_mask_of(q_lengths, k_lengths, torch.device("cpu"))
    owners = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in (q_lengths, k_lengths)
    ]
    same = owners[0][:, None] == owners[1]
    rows, columns = (-(-size // flex.BLOCK) for size in same.shape)
    padded = torch.zeros(rows * flex.BLOCK, columns * flex.BLOCK, dtype=torch.bool)
    padded[: same.shape[0], : same.shape[1]] = same
    tiles = padded.view(rows, flex.BLOCK, columns, flex.BLOCK).transpose(1, 2).flatten(2)
    found = torch.zeros(rows, columns, dtype=torch.int)
    for row in range(rows):
        found[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]]] += 1
        found[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]]] += 2
    assert not (found == 3).any()
    assert ((found > 0) == tiles.any(-1)).all()
    assert ((found == 2) <= tiles.all(-1)).all()
    if kind != "temporal":
        assert (found == 2).any() and (found == 1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_attention_is_not_compiled_again(monkeypatch, kind):
    graphs = Graphs(monkeypatch)
    work = attention_work(kind, uniform=True)
    expected, _ = op_results(partial(attention.own_call, work, "reference"), work)
    bound = attention._prepare_compiled(work)
    for _ in range(2):
        assert_same(op_results(bound, work)[0], expected)
        assert graphs.count == 1


@pytest.mark.parametrize(("length", "multiple"), [(1, 4.5), (4, 1.1), (16, None)])
def test_flash_attention_of_torch_is_kept_from_sums_that_it_cannot_count(length, multiple):
    """Two of these took an H200 down, the first of them in eager PyTorch too; the third ran."""
    shapes = [(length, 1, 49152 // length)]
    qkv = torch.empty(49152, 3, 16, 72, dtype=torch.bfloat16, device="meta")
    work = attention.AttentionWork("temporal", PackLayout.of(shapes, "cpu"), {"qkv": qkv})
    (flash,) = (provider for provider in attention.ATTENTION_PROVIDERS if provider.name == "sdpa-flash")
    reason = f"backward would sum in {multiple} · 2^31 elements; torch's crashes the GPU beyond 2^31"
    assert flash.missing(work) == (reason if multiple else "needs a CUDA GPU")
    with attention.sdpa_of(work)():
        assert torch.backends.cuda.flash_sdp_enabled() is (multiple is None)
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_a_library_that_is_missing_or_broken_says_so(monkeypatch, tmp_path):
    work = attention_work("spatial")
    missing = needs_module("surely_missing", ["surely-missing"])
    assert missing(work) == "surely-missing is not installed"
    (tmp_path / "surely_missing.py").write_text("raise OSError('libcudart.so.12: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("opensora_fast.benchmarks.measuring.provider.installed_version", lambda name: "1.0")
    assert missing(work) == "surely_missing cannot be imported: OSError: libcudart.so.12: not found"
