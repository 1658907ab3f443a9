"""`use_kernels` changes how a model computes, not what, and only the model it is given."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from quack_stand_in import QuackStandIn, install
from safetensors.torch import load_file
from torch import nn

from opensora_fast import STDiT2, STDiT2Config, use_kernels
from opensora_fast.benchmarks.providers.upstream import UpstreamBlock, UpstreamSTDiT2
from opensora_fast.kernels import calls
from opensora_fast.model.embedders import RotaryFrequencies
from opensora_fast.replace import OPS

pytestmark = pytest.mark.usefixtures("interpreter")

GOLDEN = Path(__file__).parent / "golden"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(model_class: type[nn.Module]) -> nn.Module:
    model = model_class(STDiT2Config.small()).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"))
    return model.to(DEVICE)


def golden_inputs(case: str) -> dict[str, torch.Tensor]:
    """Up to three frames of 5 x 7 latents, which are padded: the interpreter takes its time for every program."""
    data = load_file(GOLDEN / f"stdit2_{case}.safetensors")
    inputs = {name[3:]: value.to(DEVICE) for name, value in data.items() if name.startswith("in.")}
    inputs["x"] = inputs["x"][:, :, :3, :5, :7]
    if "x_mask" in inputs:
        inputs["x_mask"] = inputs["x_mask"][:, :3]
        assert 0 < inputs["x_mask"].sum() < inputs["x_mask"].numel()
    return inputs


# Which kernel an op has is nothing to the model around it, so the interpreted ones need not meet every case twice.
@pytest.mark.parametrize(
    ("backend", "model_class", "case"),
    [
        ("reference", STDiT2, "plain"),
        ("reference", STDiT2, "frame_mask"),
        ("reference", UpstreamSTDiT2, "plain"),
        ("reference", UpstreamSTDiT2, "frame_mask"),
        ("triton", STDiT2, "frame_mask"),
        ("triton", UpstreamSTDiT2, "plain"),
    ],
)
def test_outputs_and_gradients_stay_and_undo_restores(model_class, case, backend):
    model, inputs = build(model_class), golden_inputs(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    replacement = use_kernels(model, backend=backend)
    assert set(replacement.replaced) == set(OPS)
    assert all(names for names in replacement.replaced.values())
    calls.clear()
    output = model(**inputs)
    assert {op for op, used in calls if used == backend} >= set(OPS) - {"modulated_norm"}
    assert not {op for op, used in calls if used != backend}
    assert (output - expected).norm() / expected.norm() < 2e-4
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)
            assert error < 1e-3, name

    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    replacement.undo()
    assert torch.equal(model(**inputs), expected)


def test_only_the_named_ops_change():
    model = build(STDiT2)
    use_kernels(model, backend="reference")  # a model on CUDA has the kernels from the start
    replacement = use_kernels(model, backend="triton", gelu_tanh=True)
    assert list(replacement.replaced) == ["gelu_tanh"]
    norms = use_kernels(model, backend="reference", modulated_norm=True)
    assert norms.replaced == {"modulated_norm": [*replacement.replaced["gelu_tanh"], "final_layer"]}
    calls.clear()
    model(**golden_inputs("plain"))
    assert {op for op, backend in calls if backend == "triton"} == {"gelu_tanh"}


def test_what_is_undone_is_what_that_call_changed():
    model = build(STDiT2)
    before = model.backends
    first, second = use_kernels(model, gelu_tanh=True), use_kernels(model, "reference", spatial_attention=True)
    first.undo()
    assert (model.backends.gelu_tanh, model.backends.spatial_attention) == (before.gelu_tanh, "reference")
    second.undo()
    assert model.backends == before


def test_what_a_later_call_put_into_upstreams_blocks_is_not_undone_with_an_earlier_one():
    model = build(UpstreamSTDiT2)
    first = use_kernels(model, "reference")
    first.undo()
    second = use_kernels(model, "reference")
    with pytest.raises(ValueError, match=r"undo: blocks.0.forward was replaced by something else since"):
        first.undo()
    assert all("forward" in vars(block) for block in model.blocks)
    second.undo()
    first.undo()  # nothing is left to undo


@pytest.mark.parametrize("model_class", [STDiT2, UpstreamSTDiT2])
def test_matrix_products_change_where_they_are_named(model_class, monkeypatch):
    stand_in = install(monkeypatch, QuackStandIn())
    monkeypatch.setattr("opensora_fast.replace.load_quack", lambda: stand_in)
    model, inputs = build(model_class), golden_inputs("plain")
    expected = model(**inputs)
    replacement = use_kernels(model, backend="reference", linear="quack", gelu_tanh=True)
    assert str(replacement) == "gelu_tanh: quack in 2 modules\nlinear: quack in 2 modules"
    calls.clear()
    assert (model(**inputs) - expected).norm() / expected.norm() < 2e-4
    assert len(stand_in.called) == 8 * len(model.blocks)
    assert not any(op == "gelu_tanh" for op, _ in calls)
    if model_class is STDiT2:  # which can be changed again
        assert str(use_kernels(model, backend="reference", gelu_tanh=True)) == "gelu_tanh: quack in 2 modules"
        use_kernels(model, backend="reference", linear="torch", gelu_tanh=True)
        assert str(use_kernels(model, backend="reference", gelu_tanh=True)) == "gelu_tanh: reference in 2 modules"
    replacement.undo()
    stand_in.called.clear()
    assert torch.equal(model(**inputs), expected)
    use_kernels(model, backend="reference")
    model(**inputs)
    assert not stand_in.called


def test_another_instance_is_not_touched():
    first, second = build(UpstreamSTDiT2), build(UpstreamSTDiT2)
    use_kernels(first, backend="reference")
    calls.clear()
    second(**golden_inputs("plain"))
    assert not calls


@pytest.mark.parametrize("model_class", [STDiT2, UpstreamSTDiT2])
def test_a_copy_of_a_changed_model_computes_with_its_own_parameters(model_class):
    model, inputs = build(model_class), golden_inputs("frame_mask")
    use_kernels(model, backend="reference")
    expected = model(**inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    assert torch.equal(copied(**inputs), expected)
    with torch.no_grad():
        for parameter in copied.blocks.parameters():
            parameter.zero_()
    assert not torch.equal(copied(**inputs), expected)


class ScaledLinear(nn.Linear):
    """Computes more than its weight and bias say, as adapters do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "name, module, difference",
    [
        ("adapter", nn.Linear(48, 48), "adapter.weight is a parameter that Open-Sora's block lacks"),
        ("norm1", nn.LayerNorm(48, eps=1e-6), "norm1.weight is a parameter"),
        ("norm2", nn.LayerNorm(48, elementwise_affine=False), "norm2 has epsilon 1e-05"),
        ("norm_temp", nn.RMSNorm(48, eps=1e-6, elementwise_affine=False), "norm_temp is RMSNorm"),
        ("norm1", nn.Identity(), "norm1 is Identity"),
        ("attn.k_norm", nn.LayerNorm(24, eps=1e-6, bias=False), "attn.k_norm is LayerNorm"),
        ("attn.q_norm", nn.RMSNorm(24), "attn.q_norm has epsilon None, not 1e-06"),
        ("mlp.act", nn.SiLU(), "mlp.act is SiLU"),
        ("mlp.norm", nn.LayerNorm(48, eps=1e-6, elementwise_affine=False), "mlp.norm is LayerNorm"),
        ("attn.attn_drop", nn.Dropout(0.5), "attn.attn_drop has p=0.5"),
        ("drop_path", nn.AlphaDropout(0.5), "drop_path is AlphaDropout"),
    ],
)
def test_a_block_that_computes_something_else_is_refused(name, module, difference):
    model = build(UpstreamSTDiT2)
    model.blocks[1].set_submodule(name, module)
    with pytest.raises(ValueError, match=f"blocks.1: {difference}"):
        use_kernels(model)
    assert not any("forward" in vars(block) for block in model.blocks)


class HalvedBlock(UpstreamBlock):
    def forward(self, *arguments):
        return super().forward(*arguments) / 2


def test_a_block_whose_code_is_replaced_is_refused(monkeypatch):
    model = build(UpstreamSTDiT2)
    model.blocks[1].__class__ = HalvedBlock
    with pytest.raises(ValueError, match=r"blocks.1: it has test_replace.HalvedBlock.forward in place of .*Upstream"):
        use_kernels(model)
    model.blocks[1].__class__ = UpstreamBlock
    monkeypatch.setattr(UpstreamBlock, "forward", HalvedBlock.forward)
    with pytest.raises(ValueError, match=r"blocks.0: it has test_replace.HalvedBlock.forward in place of .*Upstream"):
        use_kernels(model)
    monkeypatch.setattr(UpstreamBlock, "forward", partial(HalvedBlock.forward))
    with pytest.raises(ValueError, match=r"blocks.0: it has functools.partial.* in place of .*UpstreamBlock.forward"):
        use_kernels(model)
    monkeypatch.undo()
    model.blocks[1].t_mask_select = torch.where  # a method of upstream's
    with pytest.raises(ValueError, match="blocks.1: it has t_mask_select replaced"):
        use_kernels(model)
    del model.blocks[1].t_mask_select
    use_kernels(model, backend="reference")


@pytest.mark.parametrize(
    "name, attribute, value, difference",
    [
        ("attn", "scale", 0.5, "attn.scale is 0.5, not the 0.117851 of its head size"),
        ("attn", "rope", True, "attn.rope is True"),
        ("attn_temp", "rope", False, "attn_temp.rope is False"),
        ("attn_temp", "rotary_emb", torch.neg, "attn_temp.rotary_emb is no method of a rotary embedding"),
    ],
)
def test_attention_that_is_told_to_compute_something_else_is_refused(name, attribute, value, difference):
    model = build(UpstreamSTDiT2)
    for block in model.blocks:  # which upstream's have
        block.attn.scale = block.attn_temp.scale = 72**-0.5
        block.attn.rope, block.attn_temp.rope, block.attn_temp.rotary_emb = False, True, model.rope.forward
    use_kernels(model, backend="reference").undo()
    setattr(model.blocks[1].get_submodule(name), attribute, value)
    with pytest.raises(ValueError, match=f"blocks.1: {difference}.*change this back, or leave use_kernels out"):
        use_kernels(model)


def test_a_block_turns_by_the_rotary_embedding_that_it_has():
    """As one that was copied alone: upstream's holds a method of it."""
    expected, model, inputs = build(UpstreamSTDiT2), build(UpstreamSTDiT2), golden_inputs("plain")
    other = copy.deepcopy(model.rope)
    with torch.no_grad():
        other.freqs.mul_(3)
    expected.blocks[1]._frequencies = [other.freqs]
    model.blocks[1].attn_temp.rotary_emb = other.forward
    use_kernels(model, backend="reference")
    torch.testing.assert_close(model(**inputs), expected(**inputs), rtol=1e-4, atol=1e-5)


class Rope(RotaryFrequencies):
    def rotate_queries_or_keys(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class StretchedRope(Rope):
    """As for videos longer than those that the model was trained with."""

    def rotate_queries_or_keys(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_a_rotary_embedding_whose_code_is_replaced_is_refused():
    model = build(UpstreamSTDiT2)
    model.rope.__class__ = Rope
    use_kernels(model, backend="reference").undo()
    model.rope.__class__ = StretchedRope
    with pytest.raises(
        ValueError, match=r"the rotary embedding of attn_temp has test_replace.StretchedRope\.rotate_que"
    ):
        use_kernels(model)


def test_a_block_on_another_device_is_named():
    model = build(UpstreamSTDiT2)
    use_kernels(model, backend="reference")
    model.blocks[1].to("meta")
    with pytest.raises(ValueError, match=r"UpstreamBlock: x is on .*, the parameters .* on meta; move the whole model"):
        model(**golden_inputs("plain"))


def test_a_rotary_embedding_that_turns_otherwise_is_refused():
    model = build(UpstreamSTDiT2)
    model.rope.interpolate_factor = 2.0
    with pytest.raises(ValueError, match="rope has interpolate_factor 2; the kernels turn by frame index"):
        use_kernels(model)
    model.rope.interpolate_factor = 1.0
    model.rope.freqs.requires_grad_()
    with pytest.raises(ValueError, match=r"rope.freqs is to be trained.*rope.freqs.requires_grad_\(False\)"):
        use_kernels(model)
    model.rope.freqs.requires_grad_(False)
    use_kernels(model)


def test_the_other_order_of_norm_and_rotation_is_refused():
    """Open-Sora 1.2 has the same class, and by default normalizes first; for weights of 1.1 it has qk_norm_legacy."""
    model = build(UpstreamSTDiT2)
    for block in model.blocks:
        block.attn_temp.qk_norm_legacy = True
    use_kernels(model, backend="reference").undo()
    model.blocks[1].attn_temp.qk_norm_legacy = False
    with pytest.raises(ValueError, match="blocks.1: attn_temp normalizes queries and keys before it rotates them"):
        use_kernels(model)
    for name in ("q_norm", "k_norm"):
        setattr(model.blocks[1].attn_temp, name, nn.Identity())
    use_kernels(model, backend="reference").undo()


@pytest.mark.parametrize("name", ["attn.qkv", "attn_temp.proj", "cross_attn.kv_linear", "mlp.fc2"])
def test_our_blocks_take_no_linear_that_would_not_be_called(name):
    block = build(STDiT2).blocks[1]
    linear = block.get_submodule(name)
    with pytest.raises(
        ValueError, match=rf"\.{name.split('.')[1]} takes a plain Linear only(.|\n)*a test_replace.ScaledLinear"
    ):
        block.set_submodule(name, ScaledLinear(linear.in_features, linear.out_features))
    assert block.get_submodule(name) is linear
    block.set_submodule(name, nn.Linear(linear.in_features, linear.out_features))


def test_a_linear_or_a_hook_that_would_not_be_called_is_refused():
    model = build(UpstreamSTDiT2)
    model.blocks[0].attn.qkv.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="blocks.0: attn.qkv has a forward hook"):
        use_kernels(model)
    model.blocks[0].attn.qkv = nn.Linear(144, 432)
    model.blocks[0].mlp.fc1.__class__ = ScaledLinear
    with pytest.raises(ValueError, match="blocks.0: mlp.fc1 is not a plain Linear but test_replace.ScaledLinear"):
        use_kernels(model)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="neither an STDiT2 nor built like"):
        use_kernels(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ModuleList holds several models, 0, 1; call use_kernels for each"):
        use_kernels(nn.ModuleList([build(STDiT2), build(STDiT2)]))
    with pytest.raises(ValueError, match="give the model itself, a torch.nn.Module, not dict"):
        use_kernels({"model": build(STDiT2)})
    with pytest.raises(ValueError, match="unknown op 'spatial'"):
        use_kernels(build(STDiT2), spatial=True)
    with pytest.raises(ValueError, match="gelu_tanh must be True or False, got 'reference'; give the backend as"):
        use_kernels(build(STDiT2), gelu_tanh="reference")
    with pytest.raises(ValueError, match="backend 'cuda'"):
        use_kernels(build(STDiT2), backend="cuda")
    with pytest.raises(ValueError, match="linear 'cutlass' is unknown; choose one of torch, quack"):
        use_kernels(build(STDiT2), linear="cutlass")
    with pytest.raises(ValueError, match="every flag is False"):
        use_kernels(build(STDiT2), gelu_tanh=False)
    model = build(UpstreamSTDiT2)
    use_kernels(model, backend="reference")
    with pytest.raises(ValueError, match=r"undo\(\)"):
        use_kernels(model, backend="reference")
