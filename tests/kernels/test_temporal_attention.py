"""`temporal_attention`: Triton against float64 and against eager."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora_fast.kernels import PackLayout, temporal_attention
from opensora_fast.kernels.attention.tiles import BOUNDED_UP_TO
from opensora_fast.kernels.checks import SMALLEST_EPSILON
from opensora_fast.kernels.layout import PLACE_BLOCK_ROWS, PLACE_TILE_ROWS
from opensora_fast.kernels.temporal_attention import longest_tile

ours, reference = partial(temporal_attention, backend="triton"), partial(temporal_attention, backend="reference")

PACKS = {
    "one token": [(1, 1, 1)],
    "an image": [(1, 3, 23)],
    "two frames": [(2, 1, 3)],
    "two videos of 16 frames": [(16, 1, 5), (16, 1, 5)],
    "three videos": [(16, 1, 3), (1, 1, 3), (17, 1, 3)],
    "every size of tile, and blocks": [(3, 1, 7), (64, 1, 1), (1, 1, 3), (131, 1, 1), (17, 1, 1), (65, 1, 1)],
}


@pytest.fixture(params=[0, 64, 128])
def longest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The longest video that has its frames in one tile: 64 makes videos of 65 to 128 frames long ones, 0 all."""
    module = importlib.import_module("opensora_fast.kernels.temporal_attention")
    monkeypatch.setattr(module, "longest_tile", lambda device, dtype: request.param)
    return request.param


def make_inputs(
    shapes, dtype: torch.dtype, device: torch.device, heads: int = 1, head_size: int = 72, weight: float | None = 1.0
) -> dict:
    """`weight` scales the QK-norm weights; None leaves the norm out."""
    layout = PackLayout.of(shapes, device)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_tokens, 3, heads, head_size, generator=generator).to(device, dtype)
    weights = [torch.randn(head_size, generator=generator).to(device, dtype) for _ in range(2)]
    if weight is None:
        q_weight = k_weight = None
    else:
        q_weight, k_weight = (tensor.mul(weight).requires_grad_() for tensor in weights)
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.arange(layout.max_frames + 1)[:, None] * frequency
    fixed = {"layout": layout, "cos": angle.cos().to(device), "sin": angle.sin().to(device)}
    return {"qkv": qkv.requires_grad_(), "q_weight": q_weight, "k_weight": k_weight, **fixed}


def fixed_and_compared(inputs: dict) -> tuple[dict, dict]:
    fixed = {name: inputs[name] for name in ("layout", "cos", "sin")}
    return fixed, {name: value for name, value in inputs.items() if name not in fixed}


@pytest.fixture
def compare(compare_with_eager):
    def run(inputs: dict, **keywords) -> None:
        fixed, compared = fixed_and_compared(inputs)
        compare_with_eager(partial(ours, **fixed), partial(reference, **fixed), compared, **keywords)

    return run


@pytest.mark.parametrize("shapes", PACKS.values(), ids=PACKS.keys())
def test_output_and_gradients(shapes, dtype, device, compare) -> None:
    compare(make_inputs(shapes, dtype, device))


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129])
def test_every_number_of_frames(frames, dtype, device, compare) -> None:
    """A full tile where several places fit into one, and one with room left."""
    inputs = make_inputs([(frames, 1, 16 // frames + 1)], dtype, device, head_size=24)
    bias = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    compare(inputs | {"qkv_bias": bias.requires_grad_()})


def test_without_norm(longest, dtype, device, compare) -> None:
    compare(make_inputs([(5, 1, 2), (66, 1, 1)], dtype, device, head_size=40, weight=None))


def test_the_smallest_epsilon(longest, dtype, device, compare) -> None:
    """Rows beyond the last frame are normed as well, though they are zero."""
    compare(make_inputs([(5, 1, 2), (66, 1, 1)], dtype, device, head_size=40) | {"eps": SMALLEST_EPSILON})


def test_several_heads_and_places(longest, dtype, device, compare) -> None:
    compare(make_inputs([(3, 1, 2), (65, 1, 2)], dtype, device, heads=2, head_size=16))


@pytest.mark.parametrize("head_size", [8, 16, 40, 64, 104, 128])
def test_other_head_sizes(head_size, device, compare) -> None:
    compare(make_inputs([(3, 1, 5), (1, 1, 2)], torch.float32, device, head_size=head_size))


@pytest.mark.parametrize("weight", [0.0, 0.05, 3.0, 10.0])
def test_on_both_sides_of_the_bound(weight, longest, dtype, device, compare) -> None:
    inputs = make_inputs([(65, 1, 1)], dtype, device, head_size=24, weight=weight)
    product = (inputs["q_weight"].double() * inputs["k_weight"].double()).abs().max().item()
    bound = product * 24**0.5 * 1.4426950408889634
    assert (bound > BOUNDED_UP_TO[dtype]) == (weight >= 3.0)
    compare(inputs)


@pytest.mark.parametrize("frames", [7, 66])
def test_equal_logits(frames, longest, dtype, device) -> None:
    """Without norm and with equal keys at angle 0 the output is the mean of V over the frames."""
    inputs = make_inputs([(frames, 1, 2)], dtype, device, head_size=16, weight=None)
    inputs["cos"], inputs["sin"] = torch.ones_like(inputs["cos"]), torch.zeros_like(inputs["sin"])
    qkv = inputs["qkv"].detach()
    qkv[:, 1] = qkv[:1, 1]
    mean = qkv[:, 2].double().view(frames, 2, 1, 16).mean(dim=0).repeat(frames, 1, 1)
    output = ours(**inputs)
    torch.testing.assert_close(output.double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_images_return_their_values(dtype, device) -> None:
    inputs = make_inputs([(1, 4, 5), (1, 1, 1)], dtype, device)
    output = ours(**inputs)
    # To the bit where they lie in tiles. Not so float32 on a GPU: there a probability is exp2 of a rounded difference.
    rounding = 0 if longest_tile(device, dtype) else 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, inputs["qkv"][:, 2], rtol=rounding, atol=0)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    output.backward(gradient)
    torch.testing.assert_close(inputs["qkv"].grad[:, 2], gradient, rtol=rounding, atol=0)
    assert (inputs["qkv"].grad[:, :2].abs() <= 10 * rounding).all()
    assert (inputs["q_weight"].grad.abs() <= 10 * rounding).all()


@pytest.mark.parametrize("place", ["q", "k", "v", "gradient"])
def test_what_is_not_finite_spoils_no_other_head_or_video(place, longest, device) -> None:
    inputs = make_inputs([(5, 1, 7), (1, 1, 3), (5, 1, 2)], torch.float32, device, heads=2, head_size=24, weight=None)
    gradient = torch.randn(48, 2, 24, generator=torch.Generator().manual_seed(1)).to(device)
    spoiled = gradient if place == "gradient" else inputs["qkv"].detach()[:, "qkv".index(place)]
    spoiled[17, 1, 5] = float("nan")
    output = ours(**inputs)
    output.backward(gradient)
    finite = output.isfinite().all(dim=2) & inputs["qkv"].grad.isfinite().all(dim=3).all(dim=1)  # [N, heads]
    assert not finite[17, 1]
    finite[:35, 1] = True
    assert finite.all()


def test_rows_of_zeros(device, compare) -> None:
    """eps keeps the norm of a zero row finite."""
    inputs = make_inputs([(5, 1, 2)], torch.float32, device)
    qkv = inputs["qkv"].detach().clone()
    qkv[3, :2] = 0
    compare(inputs | {"qkv": qkv.requires_grad_()})


def test_strided_and_expanded_inputs(longest, device, compare) -> None:
    inputs = make_inputs([(4, 1, 2), (65, 1, 1)], torch.float32, device, heads=2, head_size=24)
    inputs["qkv"] = inputs["qkv"].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    inputs["q_weight"] = inputs["q_weight"].detach()[:1].expand(24).requires_grad_()
    inputs["cos"] = inputs["cos"].t().contiguous().t()
    compare(inputs, expanded_gradient=True)


def test_weights_in_float32_beside_half_activations(longest, device, compare) -> None:
    inputs = make_inputs([(5, 1, 2), (65, 1, 1)], torch.float16, device, head_size=24)
    for name in ("q_weight", "k_weight"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    compare(inputs)


@pytest.mark.parametrize("wanted", ["qkv", "q_weight", "k_weight"])
def test_only_the_wanted_gradient(wanted, longest, device) -> None:
    fixed, tensors = fixed_and_compared(make_inputs([(5, 1, 2), (65, 1, 1)], torch.float32, device, head_size=16))
    gradients = []
    for function in (ours, reference):
        leaves = {name: tensor.detach().clone().requires_grad_(name == wanted) for name, tensor in tensors.items()}
        function(**leaves, **fixed).square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, gradient in gradients[0].items() if gradient is not None] == [wanted]
    torch.testing.assert_close(gradients[0][wanted], gradients[1][wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [ours, reference], ids=["triton", "reference"])
def test_the_angles_have_no_gradient(function, device) -> None:
    inputs = make_inputs([(3, 1, 2)], torch.float32, device, head_size=16)
    cos, sin = inputs["cos"].requires_grad_(), inputs["sin"].requires_grad_()
    function(**inputs).square().sum().backward()
    assert inputs["qkv"].grad is not None and cos.grad is None and sin.grad is None


def test_two_backwards_are_equal_bit_for_bit(longest, device) -> None:
    gradients: list[list[Tensor]] = []
    for _ in range(2):
        inputs = make_inputs([(16, 1, 5), (65, 1, 1)], torch.float32, device, head_size=16)
        ours(**inputs).square().sum().backward()
        gradients.append([inputs[name].grad for name in ("qkv", "q_weight", "k_weight")])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_checkpointing_gives_the_same_gradients(device) -> None:
    gradients = []
    for checkpointed in (False, True):
        inputs = make_inputs([(5, 1, 2)], torch.float32, device, head_size=16)
        call = partial(ours, **inputs)
        output = torch.utils.checkpoint.checkpoint(call, use_reentrant=False) if checkpointed else call()
        output.square().sum().backward()
        gradients.append(inputs["qkv"].grad)
    assert torch.equal(*gradients)


def test_registration(device) -> None:
    inputs = make_inputs([(65, 1, 1)], torch.float32, device, head_size=8)
    tensors = [inputs[name] for name in ("qkv", "q_weight", "k_weight")]
    tables = [inputs["cos"], inputs["sin"], *inputs["layout"].place_tiles(64), PLACE_BLOCK_ROWS[64]]
    for bias in (None, torch.randn(3, *inputs["qkv"].shape[2:], device=device, requires_grad=True)):
        torch.library.opcheck(torch.ops.opensora_fast.temporal_attention.default, (*tensors, bias, *tables, 1e-6))


@pytest.mark.parametrize("shapes", [[(3, 1, 1)], [(129, 1, 1)]], ids=["short", "long"])
def test_full_graph_compilation(shapes, device) -> None:
    gradients = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs(shapes, torch.float32, device, head_size=8)
        function(**inputs).sin().sum().backward()
        gradients.append([inputs[name].grad for name in ("qkv", "q_weight", "k_weight")])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_wrong_arguments_are_named(device) -> None:
    good = make_inputs([(3, 1, 2)], torch.float32, device, head_size=16)
    wrong = [
        ("qkv has shape", {"qkv": good["qkv"][:-1]}),
        ("qkv has dtype torch.int32", {"qkv": good["qkv"].int()}),
        ("qkv is on meta", {"qkv": good["qkv"].to("meta")}),
        ("q_weight has shape", {"q_weight": good["q_weight"][:-1]}),
        ("give both q_weight and k_weight", {"q_weight": None}),
        ("cos has shape", {"cos": good["cos"][:, 1:]}),
        ("sin is on meta", {"sin": good["sin"].to("meta")}),
        ("cos has 2 rows, but a video has 3 frames", {"cos": good["cos"][:2]}),
        ("takes float32, float16 and bfloat16, got torch.float64", {"qkv": good["qkv"].double()}),
        ("eps 0 has no Triton kernel, 1e-30 or more has", {"eps": 0.0}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=f"temporal_attention: .*{message}"):
            ours(**good | change)
    for head_size in (12, 136):
        with pytest.raises(ValueError, match=f"head size {head_size} has no Triton kernel"):
            ours(**make_inputs([(2, 1, 1)], torch.float32, device, head_size=head_size))
    with pytest.raises(ValueError, match="an odd head size, 9"):
        reference(**good | {"qkv": torch.zeros(6, 3, 1, 9, device=device), "q_weight": None, "k_weight": None})


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 3), st.integers(1, 50)), min_size=1, max_size=4),
    st.sampled_from(list(PLACE_BLOCK_ROWS)),
)
@settings(max_examples=40)
def test_tables_hold_every_token_once(shapes: list[tuple[int, int, int]], longest: int) -> None:
    layout = PackLayout.of(shapes, "cpu")
    *tables, blocks = layout.place_tiles(longest)
    tokens: list[int] = []
    for table, shorter, rows in zip(tables, (0, *PLACE_TILE_ROWS[:-1]), PLACE_TILE_ROWS, strict=True):
        for first, frames, frame_tokens, places in table.tolist():
            assert shorter < frames <= longest and frames * places <= rows
            tokens += [first + frame * frame_tokens + place for place in range(places) for frame in range(frames)]
    for first, frames, frame_tokens, start in blocks.tolist():
        assert frames > longest
        end = min(start + PLACE_BLOCK_ROWS[longest], frames)
        tokens += [first + frame * frame_tokens for frame in range(start, end)]
    assert sorted(tokens) == list(range(layout.num_tokens))


def test_unknown_tile_size_is_named() -> None:
    with pytest.raises(ValueError, match="place_tiles: longest 32"):
        PackLayout.of([(1, 1, 1)], "cpu").place_tiles(32)


def test_more_sums_than_32_bits_reach_are_refused() -> None:
    """In backward, where videos have so few tokens that there are nearly as many sums."""
    backward = importlib.import_module("opensora_fast.kernels.temporal_attention")._temporal_attention_backward
    tables = [torch.empty(videos, 4, dtype=torch.int32, device="meta") for videos in (2_500_000, 0, 0, 0, 0)]
    qkv, weight = torch.zeros(2_500_000, 3, 16, 72, device="meta"), torch.zeros(72, device="meta")
    with pytest.raises(
        ValueError, match="temporal_attention: no Triton kernel finds the gradients of 2500000 tokens in"
    ):
        backward(qkv[:, 0], qkv, weight, weight, None, *[weight] * 2, *tables, 64, qkv[:, 0], weight, 1e-6, True)
