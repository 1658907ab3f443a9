"""`qk_norm_rotary`: Triton against float64 and against eager."""

from functools import partial

import pytest
import torch
from torch import Tensor

from opensora_fast.kernels import PackLayout, qk_norm_rotary

ours, reference = partial(qk_norm_rotary, backend="triton"), partial(qk_norm_rotary, backend="reference")


def make_inputs(
    shapes,
    dtype: torch.dtype,
    device: torch.device,
    heads: int = 2,
    head_size: int = 72,
    norm: bool = True,
    rotary: bool = True,
) -> tuple[dict, dict]:
    """What is compared (q and k are views of one tensor) and what is fixed."""
    layout = PackLayout.of(shapes, device)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_tokens, 3, heads, head_size, generator=generator).to(device, dtype)
    weights = [torch.randn(head_size, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]
    angle = torch.arange(layout.max_frames)[:, None] * 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    cos, sin = (angle.cos().to(device), angle.sin().to(device)) if rotary else (None, None)
    q_weight, k_weight = weights if norm else (None, None)
    q, k, _ = qkv.requires_grad_().unbind(1)
    return (
        {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight},
        {"cos": cos, "sin": sin, "layout": layout},
    )


@pytest.fixture
def compare(compare_with_eager):
    def run(inputs: tuple[dict, dict], **keywords) -> None:
        compared, fixed = inputs
        compare_with_eager(partial(ours, **fixed), partial(reference, **fixed), compared, **keywords)

    return run


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1, 1)], [(2, 3, 7)], [(4, 1, 3), (4, 1, 3)], [(1, 5, 7), (2, 1, 1), (7, 1, 1)]],
    ids=["one token", "one video", "two videos", "three videos"],
)
def test_outputs_and_gradients(shapes, dtype, device, compare) -> None:
    compare(make_inputs(shapes, dtype, device))


@pytest.mark.parametrize(("norm", "rotary"), [(True, False), (False, True)], ids=["norm alone", "rotary alone"])
def test_one_of_both(norm, rotary, dtype, device, compare) -> None:
    compare(make_inputs([(3, 1, 5)], dtype, device, norm=norm, rotary=rotary))


@pytest.mark.parametrize(("heads", "head_size"), [(1, 8), (3, 16), (5, 40), (1, 104), (1, 128)])
def test_other_heads(heads, head_size, device, compare) -> None:
    compare(make_inputs([(2, 1, 17)], torch.float32, device, heads=heads, head_size=head_size))


def test_strided_and_expanded_inputs(device, compare) -> None:
    compared, fixed = make_inputs([(2, 1, 3)], torch.float32, device, head_size=24)
    compared["q"] = compared["q"].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    compared["q_weight"] = compared["q_weight"].detach()[:1].expand(24).requires_grad_()
    compare((compared, fixed), expanded_gradient=True)


def test_weights_in_float32_beside_half_activations(device, compare) -> None:
    compared, fixed = make_inputs([(3, 1, 2)], torch.float16, device, head_size=24)
    for name in ("q_weight", "k_weight"):
        compared[name] = compared[name].detach().float().requires_grad_()
    compare((compared, fixed))


@pytest.mark.parametrize("wanted", ["q", "k", "q_weight", "k_weight"])
def test_only_the_wanted_gradient(wanted, device) -> None:
    compared, fixed = make_inputs([(3, 1, 2)], torch.float32, device, head_size=16)
    gradients = []
    for function in (ours, reference):
        leaves = {name: tensor.detach().clone().requires_grad_(name == wanted) for name, tensor in compared.items()}
        q, k = function(**leaves, **fixed)
        (q.square().sum() + k.sin().sum()).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, gradient in gradients[0].items() if gradient is not None] == [wanted]
    torch.testing.assert_close(gradients[0][wanted], gradients[1][wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [ours, reference], ids=["triton", "reference"])
def test_the_angles_have_no_gradient(function, device) -> None:
    compared, fixed = make_inputs([(3, 1, 2)], torch.float32, device)
    cos, sin = fixed["cos"].requires_grad_(), fixed["sin"].requires_grad_()
    sum(output.square().sum() for output in function(**compared, **fixed)).backward()
    assert compared["q_weight"].grad is not None and cos.grad is None and sin.grad is None


def test_gradients_reach_qkv_through_its_views(device) -> None:
    gradients = []
    for function in (ours, reference):
        compared, fixed = make_inputs([(3, 1, 2)], torch.float32, device, head_size=16)
        qkv = compared["q"]._base.detach().clone().requires_grad_()
        q, k = function(**compared | {"q": qkv[:, 0], "k": qkv[:, 1]}, **fixed)
        (q * k).sum().backward()
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_two_backwards_are_equal_bit_for_bit(dtype, device) -> None:
    gradients: list[list[Tensor]] = []
    for _ in range(2):
        compared, fixed = make_inputs([(5, 1, 20)], dtype, device, head_size=16)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in compared.items()}
        sum(output.square().sum() for output in ours(**leaves, **fixed)).backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_registration_and_full_graph_compilation(device) -> None:
    def leaves_and_fixed() -> tuple[dict, dict]:
        compared, fixed = make_inputs([(2, 1, 2)], torch.float32, device, head_size=8)
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in compared.items()}, fixed

    leaves, fixed = leaves_and_fixed()
    layout = fixed["layout"]
    arguments = *leaves.values(), fixed["cos"], fixed["sin"], layout.frame_tiles(16), layout.frame_position, 1e-6
    torch.library.opcheck(torch.ops.opensora_fast.qk_norm_rotary.default, arguments)
    gradients = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        leaves, fixed = leaves_and_fixed()
        sum(output.sin().sum() for output in function(**leaves, **fixed)).backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_wrong_arguments_are_named(device) -> None:
    compared, fixed = make_inputs([(3, 1, 2)], torch.float32, device, head_size=16)
    good = compared | fixed
    wrong = [
        ("q has shape", {"q": good["q"][:-1]}),
        ("k has shape", {"k": good["k"][:, :1]}),
        ("k has dtype torch.float16, but q has torch.float32", {"k": good["k"].half()}),
        ("k is on meta", {"k": good["k"].to("meta")}),
        ("q_weight has shape", {"q_weight": good["q_weight"][:-1]}),
        ("give both q_weight and k_weight", {"q_weight": None}),
        ("give both cos and sin", {"sin": None}),
        ("cos has 2 rows, but a video has 3 frames", {"cos": good["cos"][:2]}),
        ("nothing to do", dict.fromkeys(("q_weight", "k_weight", "cos", "sin"))),
        ("takes float32, float16 and bfloat16, got torch.float64", {"q_weight": good["q_weight"].double()}),
        ("eps 0 has no Triton kernel, 1e-30 or more has", {"eps": 0.0}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=f"qk_norm_rotary: .*{message}"):
            ours(**good | change)
    compared, fixed = make_inputs([(1, 1, 1)], torch.float32, device, head_size=12)
    with pytest.raises(ValueError, match="head size 12 has no Triton kernel"):
        ours(**compared, **fixed)
