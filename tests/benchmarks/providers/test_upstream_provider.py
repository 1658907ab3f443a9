"""The baseline computes what Open-Sora 1.1 computes, so that comparing against it is fair."""

from pathlib import Path

import pytest
import torch
from compiled_graphs import Graphs
from safetensors.torch import load_file
from same_results import assert_same

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.measuring.contest import op_results
from opensora_fast.benchmarks.providers import blocks, upstream
from opensora_fast.benchmarks.providers.blocks import block_provider, make_block_work
from opensora_fast.benchmarks.providers.upstream import UpstreamSTDiT2, cross_attention, varlen_starts
from opensora_fast.benchmarks.providers.variants import VARIANT_OF
from opensora_fast.benchmarks.shapes import Pack, Workload
from opensora_fast.model.block import STDiT2Block

ATTEND = torch.nn.functional.scaled_dot_product_attention
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["plain", "frame_mask"])
def test_upstream_baseline_equals_the_golden_files(case, checkpointing, flash):
    model = UpstreamSTDiT2(STDiT2Config.small(), flash=flash, checkpointing=checkpointing).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"), strict=True)
    data = load_file(GOLDEN / f"stdit2_{case}.safetensors")
    inputs = {name[3:]: value for name, value in data.items() if name.startswith("in.")}
    output = model(**inputs)
    assert (output - data["out"]).norm() / data["out"].norm() < 1e-5
    (output * data["out_weight"]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, value in data.items():
        if name.startswith("grad."):
            assert torch.allclose(gradients[name[5:]], value, rtol=1e-3, atol=1e-4 * value.abs().max()), name


def attend_varlen(q, k, v, q_starts, k_starts, longest_q, longest_k):
    """What PyTorch's attention for sequences of any lengths computes, in an order that can be compiled."""
    assert q_starts.dtype == k_starts.dtype == torch.int32
    owners = (
        torch.searchsorted(starts[1:].contiguous(), torch.arange(len(z), dtype=torch.int32), right=True)
        for starts, z in ((q_starts, q), (k_starts, k))
    )
    mask = torch.eq(next(owners)[:, None], next(owners))
    return ATTEND(*(z.transpose(0, 1) for z in (q, k, v)), attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize(
    ("lengths", "has_varlen", "calls"), [([4, 4], False, 1), ([3, 5], True, 0), ([3, 5], False, 2)]
)
def test_cross_attention_is_one_call_where_there_is_one(monkeypatch, lengths, has_varlen, calls):
    torch.manual_seed(0)
    module = STDiT2Block(24, 2, 4.0, qk_norm=True).cross_attn
    x, text = torch.randn(2, 6, 24), torch.randn(sum(lengths), 24)
    alone = [
        cross_attention(module, video[None], own, [len(own)]) for video, own in zip(x, text.split(lengths), strict=True)
    ]
    called = []
    monkeypatch.setattr(upstream, "scaled_dot_product_attention", lambda *z: called.append(z) or ATTEND(*z))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_varlen)
    starts = tuple(torch.tensor(each, dtype=torch.int32) for each in ([0, 6, 12], [0, lengths[0], 8]))
    together = cross_attention(module, x, text, lengths, starts if has_varlen else None)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert len(called) == calls
    assert varlen_starts(x, lengths) is None  # on a CPU


def test_sequences_of_any_lengths_are_told_apart_by_their_starts(monkeypatch):
    x = torch.empty(2, 6, 24, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    videos, texts = varlen_starts(x, [3, 5])
    assert videos.tolist() == [0, 6, 12] and texts.tolist() == [0, 3, 8] and videos.dtype == texts.dtype == torch.int32
    assert varlen_starts(x, [4, 4]) is None and varlen_starts(x.float(), [3, 5]) is None


@pytest.mark.parametrize("name", ["upstream-flash", "compile-upstream"])
def test_a_block_takes_the_starts_compiled_or_not(monkeypatch, name):
    starts = []

    def made(x, lengths):
        starts.append(lengths)
        each = [0, x.shape[1], 2 * x.shape[1]], [0, lengths[0], sum(lengths)]
        return tuple(torch.tensor(values, dtype=torch.int32) for values in each)

    graphs = Graphs(monkeypatch)
    monkeypatch.setattr(blocks, "varlen_starts", made)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_varlen)
    work = make_block_work(
        STDiT2Config.small(upstream_rounding=False), Pack.of(Workload("144p", 2, 2)), 5, "cpu", torch.float32
    )
    expected, _ = op_results(block_provider(VARIANT_OF["upstream"]).prepare(work), work)
    assert not starts  # what others are checked against calls for each video
    found, _ = op_results(block_provider(VARIANT_OF[name]).prepare(work), work)
    assert_same(found, expected, 5e-6)
    assert starts == [list(work.text_lengths)] and graphs.count == (name == "compile-upstream")


def test_all_blocks_of_a_model_with_flash_attention_get_the_starts(monkeypatch):
    called = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *z: called.append(z[3:5]) or attend_varlen(*z))
    data = load_file(GOLDEN / "stdit2_plain.safetensors")
    inputs = {name[3:]: value for name, value in data.items() if name.startswith("in.")}
    for flash in (False, True):
        model = UpstreamSTDiT2(STDiT2Config.small(), flash=flash, checkpointing=True).eval()
        model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"), strict=True)
        model.bfloat16()(**inputs).sum().backward()
        assert len(called) == flash * 2 * len(model.blocks)  # and recomputed
