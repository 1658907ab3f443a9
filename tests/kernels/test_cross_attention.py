"""`cross_attention`: Triton against float64 and against eager."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora_fast.kernels import PackLayout, TextLayout, cross_attention
from opensora_fast.kernels.attention import cross_backward, cross_short_forward
from opensora_fast.kernels.attention.cross_short_forward import class_of_text
from opensora_fast.kernels.attention.cross_tiles import LONGEST_CHUNK, SHORTEST_CHUNK, chunk_length
from opensora_fast.kernels.attention.tables import row_tiles, tile_ranges
from opensora_fast.kernels.configurations import Configuration, force, record_selections

ours, reference = partial(cross_attention, backend="triton"), partial(cross_attention, backend="reference")

CASES = {  # (shapes of the videos, text tokens of each)
    "one of each": ([(1, 1, 1)], [1]),
    "several tokens, one text": ([(2, 3, 5)], [1]),
    "whole steps": ([(1, 8, 8)], [64]),
    "ragged": ([(2, 3, 3), (1, 9, 9), (1, 1, 1)], [33, 70, 5]),
    "some without text": ([(1, 3, 3), (2, 2, 2), (1, 3, 3)], [0, 17, 0]),
    "two tiles of text": ([(1, 3, 3)], [200]),
    "one tile in a pack of two": ([(1, 3, 3), (1, 2, 2), (1, 2, 3), (1, 1, 1)], [129, 120, 0, 256]),
    "too long for tiles": ([(1, 3, 3), (1, 2, 2)], [257, 40]),
    "one and two": ([(2, 3, 5), (1, 7, 9)], [1, 2]),
}
# Kernels that are not the default for short texts: (kernel, shape class, configuration).
LOOPS = ("cross_attention_forward", "text of one tile", Configuration(ROWS=64, STEP=64, REMAINDER=32))
TWO_PASSES = ("cross_attention_short_backward", "text of one tile", Configuration(two_passes=1))


def make_inputs(
    shapes, lengths: list[int], dtype: torch.dtype, device: torch.device, heads: int = 1, head_size: int = 72
) -> dict:
    layout = PackLayout.of(shapes, device)
    mask = torch.arange(max(max(lengths), 1)) < torch.tensor(lengths)[:, None]
    text, index = TextLayout.from_mask(mask, len(lengths), mask.shape[1], device)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(layout.num_tokens, heads, head_size, generator=generator).to(device, dtype)
    kv = torch.randn(len(index), 2, heads, head_size, generator=generator).to(device, dtype)
    return {"q": q.requires_grad_(), "kv": kv.requires_grad_(), "layout": layout, "text": text}


@pytest.fixture
def compare(compare_with_eager):
    def run(inputs: dict, **keywords) -> None:
        tables = {name: inputs[name] for name in ("layout", "text")}
        tensors = {name: inputs[name] for name in ("q", "kv")}
        compare_with_eager(partial(ours, **tables), partial(reference, **tables), tensors, **keywords)

    return run


@pytest.mark.parametrize(("shapes", "lengths"), CASES.values(), ids=CASES.keys())
def test_output_and_gradients(shapes, lengths, dtype, device, compare) -> None:
    compare(make_inputs(shapes, lengths, dtype, device))


@pytest.mark.parametrize("length", [2, 15, 16, 63, 65, 120, 127, 128])
def test_text_lengths_around_those_of_tiles(length, device, compare) -> None:
    compare(make_inputs([(1, 5, 13)], [length], torch.float32, device))


@pytest.mark.parametrize("case", ["whole steps", "ragged", "some without text", "one and two"])
def test_kernels_for_any_text_with_short_texts(case, dtype, device, compare) -> None:
    with force(*LOOPS), force(*TWO_PASSES):
        compare(make_inputs(*CASES[case], dtype, device))


@pytest.mark.parametrize(
    ("lengths", "forward", "backward"),
    [
        ([3, 128], "text of one tile", ["cross_attention_short_backward"]),
        ([3, 129], "text of two tiles", ["cross_attention_short_backward"]),
        ([3, 257], "any", ["cross_attention_queries_backward", "cross_attention_text_backward"]),
    ],
)
def test_the_longest_text_of_a_pack_decides_the_kernels(lengths, forward, backward, device) -> None:
    inputs = make_inputs([(1, 2, 2), (1, 1, 3)], lengths, torch.float16, device)
    if class_of_text(inputs["q"], 1) is None:
        pytest.skip("this GPU has no kernels for short texts")
    with record_selections() as selections:
        ours(**inputs).sum().backward()
    assert ("cross_attention_forward", forward) in selections
    names = [name for name, _ in selections if name.endswith("_backward")]
    assert names == [*backward, "cross_attention_chunks_backward"]


def test_without_text_the_output_is_zero_whatever_the_queries(device) -> None:
    inputs = make_inputs([(1, 2, 3), (1, 2, 2)], [0, 5], torch.float16, device)
    inputs["q"].data[2, 0, 1] = float("nan")
    inputs["q"].data[3, 0, 1] = float("inf")
    assert (ours(**inputs)[:6] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["q", "k", "v", "gradient"])
def test_what_is_not_finite_spoils_what_depends_on_it(place, value, dtype, device) -> None:
    """No more and no less than in the reference: other tokens, heads and videos stay as they are."""
    results = []
    for function in (ours, reference):
        inputs = make_inputs([(1, 3, 5), (1, 2, 2)], [7, 3], dtype, device, heads=2, head_size=24)
        gradient = torch.randn(19, 2, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        if place == "gradient":
            gradient[11, 1, 5] = value
        elif place == "q":
            inputs["q"].detach()[11, 1, 5] = value
        else:
            inputs["kv"].detach()[4, "kv".index(place), 1, 5] = value
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused kernel for CPUs makes 0 of a row of NaN
            output = function(**inputs)
            output.backward(gradient)
        results.append([tensor.isfinite() for tensor in (output, inputs["q"].grad, inputs["kv"].grad)])
    assert not all(finite.all() for finite in results[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_logits_far_below_zero(device, compare) -> None:
    """The tokens of a tile beyond the text have logits of zero, which must not decide the largest."""
    inputs = make_inputs([(1, 2, 3)], [3], torch.float16, device)
    kv = inputs["kv"].detach()
    kv[:, 0] = -40 * inputs["q"].detach()[0].sign() - kv[:, 0].abs() / 8
    inputs["q"] = (inputs["q"].detach().abs() * inputs["q"].detach()[:1].sign()).requires_grad_()
    inputs["kv"] = kv.requires_grad_()
    assert (torch.einsum("nhd,mhd->nhm", inputs["q"], kv[:, 0]) < -1000).all()
    compare(inputs)


@pytest.mark.parametrize("lengths", [[33, 70, 0], [1, 150, 5]])
def test_the_bias_of_the_queries(lengths, dtype, device, assert_as_accurate_as_eager) -> None:
    gradients = []
    for function, wide in ((reference, True), (ours, False), (reference, False)):
        inputs = make_inputs([(2, 3, 3), (1, 9, 9), (1, 1, 1)], lengths, dtype, device, heads=2)
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "kv")}
        bias = torch.zeros(2, 72, dtype=dtype, device=device)
        if wide:
            leaves, bias = {name: leaf.detach().double() for name, leaf in leaves.items()}, bias.double()
        output = function(**inputs | leaves, q_bias=bias.requires_grad_())
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), bias)[0])
    assert_as_accurate_as_eager("bias", gradients[1], gradients[2], gradients[0], 3.0)


def test_several_heads(dtype, device, compare) -> None:
    compare(make_inputs([(2, 3, 3), (1, 2, 2)], [7, 20], dtype, device, heads=3))


@pytest.mark.parametrize("head_size", [8, 16, 64, 104, 128])
def test_other_head_sizes(head_size, device, compare) -> None:
    compare(make_inputs([(1, 3, 7)], [19], torch.float32, device, head_size=head_size))


def test_several_chunks(device, compare, monkeypatch) -> None:
    for module in (cross_short_forward, cross_backward):
        monkeypatch.setattr(module, "count_multiprocessors", lambda device: 132)
    shapes = [(2, 11, 13), (1, 1, 1), (1, 16, 17)]
    runs = (1, 286, 1, 1, 1, 272)
    assert row_tiles(runs, chunk_length(runs, 1, 132), device).shape[0] == 5
    compare(make_inputs(shapes, [3, 9, 20], torch.float32, device, head_size=24))
    with force(*TWO_PASSES):
        compare(make_inputs(shapes, [3, 9, 20], torch.float32, device, head_size=24))


@pytest.mark.parametrize("function", [ours, reference], ids=["triton", "reference"])
def test_no_text_at_all(function, dtype, device) -> None:
    inputs = make_inputs([(1, 3, 3), (1, 2, 2)], [0, 0], dtype, device)
    output = function(**inputs)
    assert (output == 0).all()
    output.sum().backward()
    assert (inputs["q"].grad == 0).all() and inputs["kv"].grad.shape == (0, 2, 1, 72)


def test_text_padded_on_the_device(device) -> None:
    """Text that the host cannot measure keeps its padding, which gets no gradient and has no influence."""
    exact = make_inputs([(2, 3, 3), (1, 3, 3), (1, 2, 2)], [5, 0, 12], torch.float32, device)
    lengths, starts = torch.tensor([5, 0, 12]), torch.tensor([0, 20, 40])
    text = TextLayout(starts.int().to(device), lengths.int().to(device), 20, 60)
    kv = torch.full((60, 2, 1, 72), float("nan"), device=device)
    kv[:5], kv[40:52] = exact["kv"].detach()[:5], exact["kv"].detach()[5:]
    outputs, gradients = [], []
    for inputs in (exact, exact | {"kv": kv.requires_grad_(), "text": text}):
        output = ours(**inputs)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(inputs["kv"].grad)
    assert torch.equal(*outputs)
    assert torch.equal(gradients[1][:5], gradients[0][:5]) and torch.equal(gradients[1][40:52], gradients[0][5:])
    assert (gradients[1][5:40] == 0).all() and (gradients[1][52:] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 10.0, 60.0])
def test_equal_and_large_logits(scale, dtype, device, compare) -> None:
    inputs = make_inputs([(1, 5, 8)], [70], dtype, device)
    inputs["q"] = (inputs["q"].detach() * scale).requires_grad_()
    compare(inputs)


def test_strided_and_expanded_inputs(dtype, device, compare) -> None:
    inputs = make_inputs([(2, 3, 3)], [13], dtype, device, heads=2)
    kv = inputs["kv"].detach()
    inputs["q"] = inputs["q"].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    inputs["kv"] = torch.stack([kv, kv], dim=1)[:, 0].requires_grad_()
    compare(inputs, expanded_gradient=True)
    inputs["kv"] = kv[:1].expand(13, -1, -1, -1).requires_grad_()
    inputs["q"] = inputs["q"].detach()[:1].expand(18, -1, -1).requires_grad_()
    torch.testing.assert_close(ours(**inputs), reference(**inputs), rtol=1e-3, atol=1e-3)


def test_text_of_another_dtype(device) -> None:
    inputs = make_inputs([(2, 3, 5)], [6], torch.float16, device)
    inputs["kv"] = inputs["kv"].detach().float().requires_grad_()
    output = ours(**inputs)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, reference(**inputs), rtol=5e-3, atol=5e-3)
    output.square().sum().backward()
    assert inputs["kv"].grad.dtype == torch.float32


@pytest.mark.parametrize("function", [ours, reference], ids=["triton", "reference"])
def test_under_autocast_the_output_has_the_dtype_of_the_queries(function, device) -> None:
    inputs = make_inputs([(2, 3, 5), (1, 1, 1)], [6, 0], torch.float32, device)
    with torch.autocast(device.type, dtype=torch.float16):
        output = function(**inputs)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_only_the_wanted_gradient(wanted, device) -> None:
    gradients = []
    for function in (ours, reference):
        inputs = make_inputs([(1, 3, 3)], [5], torch.float32, device, head_size=24)
        leaves = {name: inputs[name].detach().requires_grad_(name == wanted) for name in ("q", "kv")}
        function(**inputs | leaves).square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, gradient in gradients[0].items() if gradient is not None] == [wanted]
    torch.testing.assert_close(gradients[0][wanted], gradients[1][wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["ragged", "two tiles of text"])
def test_two_runs_are_equal_bit_for_bit(case, dtype, device) -> None:
    results: list[list[Tensor]] = []
    for _ in range(2):
        inputs = make_inputs(*CASES[case], dtype, device)
        output = ours(**inputs)
        output.square().sum().backward()
        results.append([output, inputs["q"].grad, inputs["kv"].grad])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_activation_checkpointing_and_accumulation(device) -> None:
    gradients = []
    for checkpoint in (False, True):
        inputs = make_inputs([(1, 3, 3)], [5], torch.float32, device, head_size=24)
        for _ in range(2):
            if checkpoint:
                output = torch.utils.checkpoint.checkpoint(partial(ours, **inputs), use_reentrant=False)
            else:
                output = ours(**inputs)
            output.square().sum().backward()
        gradients.append([inputs[name].grad for name in ("q", "kv")])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_registration_and_full_graph_compilation(device) -> None:
    inputs = make_inputs([(2, 2, 3)], [5], torch.float32, device, head_size=24)
    tables = [inputs["text"].starts, inputs["text"].lengths]
    for bias in (None, torch.randn(1, 24, device=device, requires_grad=True)):
        arguments = (inputs["q"], inputs["kv"], bias, *tables, 5, [1, 12])
        torch.library.opcheck(torch.ops.opensora_fast.cross_attention.default, arguments)
    gradients = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs([(2, 2, 3)], [5], torch.float32, device, head_size=24)
        function(**inputs).sin().sum().backward()
        gradients.append([inputs[name].grad for name in ("q", "kv")])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_chunks_of_a_video_lie_together(device) -> None:
    runs = (2, 300, 1, 900)
    chunks, ranges = row_tiles(runs, 256, device).tolist(), tile_ranges(runs, 256, device).tolist()
    for video, (first, number) in enumerate(ranges):
        assert [chunk[2:] for chunk in chunks[first : first + number]] == [[256 * i, video] for i in range(number)]
    assert sum(number for _, number in ranges) == len(chunks) == 8


@pytest.mark.parametrize(
    ("runs", "chunks"),
    [
        ((1, 25_440), 8),  # 128 programs, one round
        ((6, 6480), 24),  # 384 of 396 in three rounds; 66 chunks would fill eight, and cost more around the steps
        ((16, 2304), 16),  # whole videos: 256 of 264
        ((1, 256, 1, 6480), 8),  # 7 and 1
        ((2, 2304, 2, 6480), 8),  # whole videos and thirds; equal parts of the longer ones would be 24
    ],
)
def test_chunks_fill_the_multiprocessors(runs, chunks, device) -> None:
    length = chunk_length(runs, 16, 132, 0.1)
    assert length % 64 == 0
    assert row_tiles(runs, length, device).shape[0] == chunks


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, SHORTEST_CHUNK), (200, SHORTEST_CHUNK), (10 * LONGEST_CHUNK, LONGEST_CHUNK)]
)
def test_the_shortest_and_the_longest_chunk(tokens, expected) -> None:
    assert chunk_length((1, tokens), 1, 1) == expected


def test_wrong_arguments_are_named(device) -> None:
    inputs = make_inputs([(1, 3, 5)], [4], torch.float32, device)
    with pytest.raises(ValueError, match="cross_attention: q has shape"):
        ours(**inputs | {"q": inputs["q"][1:]})
    with pytest.raises(ValueError, match="cross_attention: kv has shape"):
        ours(**inputs | {"kv": inputs["kv"][1:]})
    with pytest.raises(ValueError, match="cross_attention: kv is on meta"):
        ours(**inputs | {"kv": torch.zeros(4, 2, 1, 72, device="meta")})
    with pytest.raises(ValueError, match="text describes 1 videos, the layout 2"):
        ours(**inputs | {"layout": PackLayout.of([(1, 1, 5), (1, 2, 5)], device)})
    with pytest.raises(ValueError, match="q has dtype torch.int64"):
        ours(**inputs | {"q": inputs["q"].detach().long()})
    with pytest.raises(ValueError, match="got torch.float64"):
        ours(**inputs | {"q": inputs["q"].double(), "kv": inputs["kv"].double()})
    with pytest.raises(ValueError, match="head size 12 has no Triton kernel"):
        ours(**inputs | {"q": torch.zeros(15, 1, 12, device=device), "kv": torch.zeros(4, 2, 1, 12, device=device)})
    text = inputs["text"]
    for name in ("starts", "lengths"):
        table = getattr(text, name)
        for wrong, said in (
            (table.long(), "torch.int64"),
            (table.repeat(2), r"torch.int32 \(2,\)"),
            (table.to("meta"), "on meta"),
        ):
            if name == "starts" or wrong.shape == table.shape:
                with pytest.raises(ValueError, match=f"cross_attention: text.{name} is {said}"):
                    ours(**inputs | {"text": replace(text, **{name: wrong})})
    inputs = make_inputs([(1, 3, 5), (1, 1, 2)], [4, 1], torch.float32, device)
    strided = torch.tensor([[4, 9], [1, 9]], dtype=torch.int32, device=device)[:, 0]
    with pytest.raises(ValueError, match="cross_attention: text.lengths is not contiguous"):
        ours(**inputs | {"text": replace(inputs["text"], lengths=strided)})


@pytest.mark.parametrize("lengths", [[], [3, -1]])
def test_impossible_texts_are_named(device, lengths) -> None:
    with pytest.raises(ValueError, match="TextLayout: lengths "):
        TextLayout.from_lengths(lengths, device)
