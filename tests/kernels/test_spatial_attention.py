"""`spatial_attention`: Triton against float64 and against eager."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora_fast.kernels import PackLayout, spatial_attention
from opensora_fast.kernels.attention.spatial_forward import shape_classes
from opensora_fast.kernels.attention.tables import row_tiles
from opensora_fast.kernels.attention.tiles import BOUNDED_UP_TO, PART_FACTORS
from opensora_fast.kernels.checks import SMALLEST_EPSILON

ours, reference = partial(spatial_attention, backend="triton"), partial(spatial_attention, backend="reference")

PACKS = {
    "one token": [(1, 1, 1)],
    "one frame": [(1, 3, 5)],
    "odd and mixed": [(2, 3, 3), (1, 9, 9), (1, 1, 1)],
    "whole steps": [(1, 8, 8), (1, 2, 8)],
    "several tiles": [(1, 11, 13)],
}


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
    return {"qkv": qkv.requires_grad_(), "q_weight": q_weight, "k_weight": k_weight, "layout": layout}


@pytest.fixture
def compare(compare_with_eager):
    def run(inputs: dict, **keywords) -> None:
        tensors = {name: value for name, value in inputs.items() if name != "layout"}
        compare_with_eager(
            partial(ours, layout=inputs["layout"]), partial(reference, layout=inputs["layout"]), tensors, **keywords
        )

    return run


def score_bound(inputs: dict) -> float:
    """The kernel's bound on |score| in base 2."""
    product = (inputs["q_weight"].double() * inputs["k_weight"].double()).abs().max().item()
    return product * inputs["qkv"].shape[3] ** 0.5 * 1.4426950408889634


@pytest.mark.parametrize("shapes", PACKS.values(), ids=PACKS.keys())
def test_output_and_gradients(shapes, dtype, device, compare) -> None:
    compare(make_inputs(shapes, dtype, device))


def test_without_norm(dtype, device, compare) -> None:
    compare(make_inputs(PACKS["odd and mixed"], dtype, device, weight=None))


def test_several_heads(dtype, device, compare) -> None:
    compare(make_inputs([(2, 3, 5), (1, 2, 2)], dtype, device, heads=3))


@pytest.mark.parametrize("head_size", [8, 16, 64, 104, 128])
@pytest.mark.parametrize("weight", [None, 0.5], ids=["no norm", "norm"])
def test_other_head_sizes(head_size, weight, device, compare) -> None:
    compare(make_inputs([(2, 3, 7)], torch.float32, device, heads=1, head_size=head_size, weight=weight))


@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0, 3.0, 8.0, 20.0])
def test_on_both_sides_of_the_bound(weight, dtype, device, compare) -> None:
    inputs = make_inputs([(1, 9, 9)], dtype, device, weight=weight)
    assert (score_bound(inputs) > BOUNDED_UP_TO[dtype]) == (weight >= 3.0 or (weight == 1.0 and dtype == torch.float16))
    compare(inputs)


@pytest.mark.parametrize("weight", [1.0, None], ids=["norm", "no norm"])
def test_equal_logits(weight, frame_class, dtype, device) -> None:
    """Equal keys: the output is the mean of V, and what pushes the queries cancels to zero."""
    inputs = make_inputs([(2, 5, 8)], dtype, device, weight=weight)
    qkv = inputs["qkv"].detach()
    qkv[:, 1] = qkv[:1, 1]
    output = ours(**inputs)
    mean = qkv[:, 2].double().view(2, 40, 1, 72).mean(dim=1, keepdim=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), mean.expand(2, 40, 1, 72).flatten(0, 1), rtol=0, atol=2 * eps)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    output.backward(gradient)
    assert inputs["qkv"].grad[:, 0].abs().max() < 10 * eps
    if weight is not None:
        assert all(inputs[name].grad.abs().max() < 100 * eps for name in ("q_weight", "k_weight"))
    mean = gradient.double().view(2, 40, 1, 72).mean(dim=1, keepdim=True).expand(2, 40, 1, 72).flatten(0, 1)
    torch.testing.assert_close(inputs["qkv"].grad[:, 2].double(), mean, rtol=0, atol=4 * eps)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_near_the_bound(sign, dtype, device, compare) -> None:
    """Queries and keys point nearly the same or the opposite way, with weights that just fit the bound."""
    inputs = make_inputs([(1, 6, 6)], dtype, device)
    size = inputs["qkv"].shape[3]
    weight = (BOUNDED_UP_TO[dtype] / size**0.5 / 1.4426950408889634) ** 0.5
    qkv = inputs["qkv"].detach().clone()
    qkv[:, :2] = 1.0 + 0.1 * qkv[:, :2]
    qkv[:, 1] *= sign
    qkv[::2, 1] *= -1
    inputs["qkv"] = qkv.requires_grad_()
    for name in ("q_weight", "k_weight"):
        inputs[name] = torch.full((size,), weight * 0.99, device=device, dtype=dtype, requires_grad=True)
    assert 0.9 * BOUNDED_UP_TO[dtype] < score_bound(inputs) < BOUNDED_UP_TO[dtype]
    # The columns of a query are nearly alike and round the same way, so that their errors add up.
    compare(inputs, gradient_factor=6.0)


@pytest.fixture(params=["small", "medium", "large"])
def frame_class(request, monkeypatch) -> str:
    """Every frame as one of this class. Rows of all but small ones are padded, see attention/tiles.py."""
    longest = {"small": (10**6, 10**6), "medium": (0, 10**6), "large": (0, 0)}[request.param]
    for name, value in zip(("LONGEST_SMALL_FRAME", "LONGEST_MEDIUM_FRAME"), longest, strict=True):
        monkeypatch.setattr(f"opensora_fast.kernels.attention.spatial_forward.{name}", value)
    assert [name for name, _ in shape_classes(torch.empty(0), [1, 80, 1, 1])] == [request.param]
    return request.param


def test_backward_writes_nothing_into_what_forward_saved(monkeypatch, device) -> None:
    """As it is registered to. In a pack of frames of several classes, of which forward finds a number in two ways."""
    for name, longest in (("SMALL", 16), ("MEDIUM", 40)):
        monkeypatch.setattr(f"opensora_fast.kernels.attention.spatial_forward.LONGEST_{name}_FRAME", longest)
    inputs = make_inputs([(2, 3, 5), (1, 5, 7), (1, 6, 9)], torch.float32, device, heads=2)
    qkv, q_weight, k_weight = (inputs[name].detach() for name in ("qkv", "q_weight", "k_weight"))
    runs = [2, 15, 1, 35, 1, 54]
    output, statistics = torch.ops.opensora_fast.spatial_attention(qkv, q_weight, k_weight, None, runs, 1e-6)
    saved = statistics * 1.001  # nothing that is found again would be equal
    given = saved.clone()
    torch.ops.opensora_fast.spatial_attention_backward(
        torch.ones_like(output), qkv, q_weight, k_weight, None, output, given, runs, 1e-6
    )
    assert torch.equal(given, saved)


@pytest.mark.parametrize("head_size", [72, 8, 64], ids=lambda size: f"head {size}")
def test_both_classes_of_frames(frame_class, head_size, dtype, device, compare) -> None:
    """A head of 64 columns has no padding for a number; one of 8 leaves all of the second tile to it."""
    compare(make_inputs([(2, 3, 3), (1, 9, 15), (1, 1, 1)], dtype, device, heads=2, head_size=head_size))


def test_frames_of_every_class_in_one_pack(monkeypatch, dtype, device, compare) -> None:
    """The shortest and the longest of each."""
    for name, longest in (("SMALL", 15), ("MEDIUM", 35)):
        monkeypatch.setattr(f"opensora_fast.kernels.attention.spatial_forward.LONGEST_{name}_FRAME", longest)
    inputs = make_inputs([(2, 3, 5), (1, 6, 6), (1, 4, 4), (1, 5, 7), (1, 1, 1)], dtype, device)
    classes = shape_classes(torch.empty(0), [2, 15, 1, 36, 1, 16, 1, 35, 1, 1])
    assert [name for name, _ in classes] == ["small", "medium", "large"]
    compare(inputs)


@pytest.mark.parametrize("weight", [0.05, 8.0])
def test_both_classes_of_frames_with_small_and_large_scores(frame_class, weight, dtype, device, compare) -> None:
    compare(make_inputs([(1, 9, 15)], dtype, device, weight=weight))


def test_small_gradients_keep_their_precision(frame_class, device, compare) -> None:
    """What a row carries in its padding is not rounded to the row's dtype."""
    inputs = make_inputs([(1, 9, 15)], torch.float16, device)
    inputs["qkv"] = (inputs["qkv"].detach() * 0.01).requires_grad_()
    compare(inputs)


def errors_where_tokens_are_alike(shape, near: float, far: float, size: float, device) -> list[float]:
    """Relative to float64, of the gradients of queries, keys, values and weights in float16.

    Tokens are `near` to each other and `far` from zero; the gradient of the output is of this `size`.
    """
    inputs = make_inputs([shape], torch.float16, device)
    tokens = inputs["layout"].num_tokens
    alike = far * torch.randn(3, 1, 72, generator=torch.Generator().manual_seed(1)).to(device)
    inputs["qkv"] = (near * inputs["qkv"].detach() + alike).to(torch.float16).requires_grad_()
    gradient = torch.randn(tokens, 1, 72, generator=torch.Generator().manual_seed(2)) * size
    gradient = gradient.to(device, torch.float16)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items() if name != "layout"}
    ours(**inputs).backward(gradient)
    reference(**exact, layout=inputs["layout"]).backward(gradient.double())
    mine, theirs = (
        [*tensors["qkv"].grad.unbind(1), tensors["q_weight"].grad, tensors["k_weight"].grad]
        for tensors in (inputs, exact)
    )
    return [((a - b).norm() / b.norm()).item() for a, b in zip(mine, theirs, strict=True)]


def test_gradients_where_tokens_are_alike(frame_class, device) -> None:
    """The rounding of the output must not drown them, as it does in flash attention: by seven times and more, here."""
    errors = errors_where_tokens_are_alike((1, 9, 15), near=1.0, far=10.0, size=1.0, device=device)
    assert all(error < most for error, most in zip(errors, (0.02, 5e-4, 5e-4, 0.02, 0.02), strict=True)), errors


def test_small_gradients_where_tokens_are_alike(device) -> None:
    """What is taken from them for each key is less than the least number of float16."""
    errors = errors_where_tokens_are_alike((1, 15, 27), near=0.05, far=1.0, size=2.0**-9, device=device)
    assert all(error < most for error, most in zip(errors, (0.12, 0.015, 5e-4, 0.03, 0.03), strict=True)), errors


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["q", "k", "v", "gradient"])
def test_what_is_not_finite_spoils_what_depends_on_it(place, value, frame_class, device) -> None:
    """No more and no less than in the reference: other heads and frames stay as they are."""
    results = []
    for function in (ours, reference):
        inputs = make_inputs([(2, 3, 4), (1, 1, 1)], torch.float32, device, heads=2, head_size=24)
        gradient = torch.randn(25, 2, 24, generator=torch.Generator().manual_seed(1)).to(device)
        if place == "gradient":
            gradient[17, 1, 5] = value
        else:
            inputs["qkv"].detach()[17, "qkv".index(place), 1, 5] = value
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused kernel for CPUs makes 0 of a row of NaN
            output = function(**inputs)
            output.backward(gradient)
        results.append([output.isfinite(), *(inputs[name].grad.isfinite() for name in ("qkv", "q_weight", "k_weight"))])
    assert not all(finite.all() for finite in results[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_sums_beyond_float16_do_no_harm(frame_class, device, compare) -> None:
    """The output's gradient times the output is 144,000 in each row, more than a number of float16 may be."""
    inputs = make_inputs([(1, 9, 15)], torch.float16, device)
    qkv = inputs["qkv"].detach().clone()
    qkv[:, 2] = 2000 + 50 * qkv[:, 2]
    inputs["qkv"] = qkv.requires_grad_()
    compare(inputs, expanded_gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-7, 3e-3, 1.0, 777.0, 1e5, 2.1e9], ids="{:g}".format)
def test_a_number_beside_a_head_is_the_sum_of_its_parts(size, dtype) -> None:
    """As `append_number` rounds it and a product with `append_factors` adds it up; exact to float32, or to 2^-25."""
    numbers = rest = size * torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    total = torch.zeros(1000, dtype=torch.float64)
    for factor in PART_FACTORS:
        assert torch.tensor(factor, dtype=dtype).item() == factor
        part = (rest / factor).to(dtype)
        rest = rest - part.float() * factor
        total += factor * part.double()
    torch.testing.assert_close(total, numbers.double(), rtol=2**-23, atol=2**-25)


def test_a_frame_long_enough_for_large_tiles(device, compare) -> None:
    compare(make_inputs([(1, 18, 23), (2, 2, 2)], torch.float32, device, heads=1, head_size=24))


def test_the_smallest_epsilon(frame_class, dtype, device, compare) -> None:
    """Rows beyond the end of a frame are normed as well, though they are zero."""
    compare(make_inputs([(1, 9, 15)], dtype, device) | {"eps": SMALLEST_EPSILON})


def test_strided_and_expanded_inputs(dtype, device, compare) -> None:
    inputs = make_inputs([(2, 3, 5)], dtype, device, heads=2)
    qkv = inputs["qkv"].detach()
    inputs["qkv"] = qkv.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2).requires_grad_()
    inputs["q_weight"] = inputs["q_weight"].detach()[:1].expand(72).requires_grad_()
    inputs["k_weight"] = torch.stack([inputs["k_weight"].detach()] * 2, dim=1)[:, 0].requires_grad_()
    compare(inputs, expanded_gradient=True)
    inputs["qkv"] = qkv[:1].expand(30, -1, -1, -1).requires_grad_()
    compare(inputs)


def test_weights_of_another_dtype(device) -> None:
    inputs = make_inputs([(2, 3, 5)], torch.float16, device)
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in ("q_weight", "k_weight")}
    output = ours(**inputs)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, reference(**inputs), rtol=5e-3, atol=5e-3)
    output.square().sum().backward()
    assert inputs["q_weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("wanted", ["qkv", "q_weight", "k_weight"])
def test_only_the_wanted_gradient(wanted, device) -> None:
    gradients = []
    for function in (ours, reference):
        inputs = make_inputs([(1, 3, 5)], torch.float32, device, heads=1, head_size=24)
        leaves = {
            name: inputs[name].detach().requires_grad_(name == wanted) for name in ("qkv", "q_weight", "k_weight")
        }
        function(**leaves, layout=inputs["layout"]).square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, gradient in gradients[0].items() if gradient is not None] == [wanted]
    torch.testing.assert_close(gradients[0][wanted], gradients[1][wanted], rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit(dtype, device) -> None:
    results: list[list[Tensor]] = []
    for _ in range(2):
        inputs = make_inputs(PACKS["odd and mixed"], dtype, device)
        output = ours(**inputs)
        output.square().sum().backward()
        results.append([output, *(inputs[name].grad for name in ("qkv", "q_weight", "k_weight"))])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_a_frame_does_not_depend_on_its_neighbors(device) -> None:
    inputs = make_inputs(PACKS["odd and mixed"], torch.float32, device)
    together = ours(**inputs)
    alone = ours(inputs["qkv"][18:99], inputs["q_weight"], inputs["k_weight"], PackLayout.of([(1, 9, 9)], device))
    assert torch.equal(together[18:99], alone)


def test_activation_checkpointing_and_accumulation(device) -> None:
    gradients = []
    for checkpoint in (False, True):
        inputs = make_inputs([(1, 3, 5)], torch.float32, device, heads=1, head_size=24)
        for _ in range(2):
            if checkpoint:
                output = torch.utils.checkpoint.checkpoint(partial(ours, **inputs), use_reentrant=False)
            else:
                output = ours(**inputs)
            output.square().sum().backward()
        gradients.append([inputs[name].grad for name in ("qkv", "q_weight", "k_weight")])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("weight", [1.0, None], ids=["norm", "no norm"])
def test_registration_and_full_graph_compilation(weight, device) -> None:
    inputs = make_inputs([(2, 2, 3)], torch.float32, device, heads=1, head_size=24, weight=weight)
    tensors = [inputs["qkv"], inputs["q_weight"], inputs["k_weight"]]
    for bias in (None, torch.randn(3, 1, 24, device=device, requires_grad=True)):
        torch.library.opcheck(torch.ops.opensora_fast.spatial_attention.default, (*tensors, bias, [2, 6], 1e-6))
    gradients = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs([(2, 2, 3)], torch.float32, device, heads=1, head_size=24, weight=weight)
        function(**inputs).sin().sum().backward()
        gradients.append([inputs[name].grad for name in ("qkv", "q_weight", "k_weight") if inputs[name] is not None])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_tables_cover_every_row_once(device) -> None:
    runs = (3, 5, 1, 40, 2, 16)
    seen = torch.zeros(3 * 5 + 40 + 2 * 16, dtype=torch.int64)
    for bounds in ((0, 5), (6, 16), (17, 100)):
        for first_token, length, first_row, _ in row_tiles(runs, 16, device, *bounds).tolist():
            seen[first_token + first_row : first_token + min(length, first_row + 16)] += 1
    assert (seen == 1).all()
    assert row_tiles(runs, 16, device)[:, 1].tolist() == [40] * 3 + [16] * 2 + [5] * 3
    assert row_tiles(runs, 16, device)[:, 3].tolist() == [3, 3, 3, 4, 5, 0, 1, 2]


def test_wrong_arguments_are_named(device) -> None:
    inputs = make_inputs([(1, 3, 5)], torch.float32, device)
    with pytest.raises(ValueError, match="spatial_attention: qkv has shape"):
        ours(**inputs | {"qkv": inputs["qkv"][1:]})
    with pytest.raises(ValueError, match="spatial_attention: q_weight has shape"):
        ours(**inputs | {"q_weight": inputs["q_weight"][1:]})
    with pytest.raises(ValueError, match="spatial_attention: k_weight is on meta"):
        ours(**inputs | {"k_weight": torch.zeros(72, device="meta")})
    with pytest.raises(ValueError, match="give both q_weight and k_weight"):
        ours(**inputs | {"k_weight": None})
    with pytest.raises(ValueError, match="qkv has dtype torch.int64"):
        ours(**inputs | {"qkv": inputs["qkv"].detach().long()})
    with pytest.raises(ValueError, match="got torch.float64"):
        ours(**{name: tensor.double() if isinstance(tensor, Tensor) else tensor for name, tensor in inputs.items()})
    with pytest.raises(ValueError, match="head size 12 has no Triton kernel"):
        ours(torch.zeros(15, 3, 1, 12, device=device), None, None, inputs["layout"])
    for eps in (0.0, -1e-6, float("nan")):
        with pytest.raises(ValueError, match="spatial_attention: eps .* has no Triton kernel, 1e-30 or more has"):
            ours(**inputs, eps=eps)
