"""`use_kernels` in trainers that are not ours: what they do around a model and inside it."""

import copy
import io
import json
import pickle

import pytest
import torch
from foreign_trainers import MODELS, get_error, get_gradients, get_loss, make_batch, make_model, recompute, train
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from opensora_fast import use_kernels
from opensora_fast.kernels import calls
from opensora_fast.model.block import SelfAttention
from opensora_fast.model.positions import cached_side

ROUNDING = 2e-5
both = pytest.mark.parametrize("name", MODELS)


def changed(name: str) -> nn.Module:
    model = make_model(name)
    use_kernels(model, "reference")
    return model


def test_processes_that_share_out_batches_or_parameters_have_the_gradients_of_one(run_together):
    first, second = run_together(2, [], function="foreign_trainers:compare")
    assert first["code"] == second["code"] == 0, first["error"] + second["error"]
    found = json.loads(first["out"])
    assert len(found["errors"]) == 10
    assert max(found["errors"].values()) < ROUNDING, found["errors"]
    block, packed, op, save = found["refusals"]
    assert block.startswith("STDiT2Block: attn has a forward hook") and "shard (fully_shard) whole blocks" in block
    assert packed.startswith("FSDPSTDiT2: its parameters are DTensors here; call the model itself")
    assert op.startswith("gelu_tanh: bias is a DTensor; call the op inside the forward")
    assert save.startswith("save_pretrained: ") and "is a DTensor" in save and "full_state_dict=True" in save


@both
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("use_before", [False, True])
def test_blocks_may_be_recomputed_from_outside(name, reentrant, use_before):
    expected = train(make_model(name), 0)
    model = make_model(name)
    if use_before:
        use_kernels(model, "reference")
    recompute(model, reentrant)
    if not use_before:
        use_kernels(model, "reference")
    calls.clear()
    found = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in train(model, 0).items()}
    assert get_error(found, expected) < ROUNDING
    assert calls["spatial_attention", "reference"] == 2 * len(model.blocks)


@both
def test_a_blocks_forward_may_be_wrapped_by_hand(name):
    model = changed(name)
    for block in model.blocks:
        block.forward = lambda *given, whole=block.forward: checkpoint(whole, *given, use_reentrant=True)
    assert get_error(train(model, 0), train(make_model(name), 0)) < ROUNDING


def test_what_is_wrapped_around_a_forward_is_not_undone_with_it():
    model = make_model("upstream's")
    replacement = use_kernels(model, "reference")
    kernels = model.blocks[1].forward
    model.blocks[1].forward = lambda *given: kernels(*given)
    with pytest.raises(ValueError, match=r"undo: blocks.1.forward was replaced by something else since"):
        replacement.undo()
    assert all("forward" in vars(block) for block in model.blocks)
    model.blocks[1].forward = kernels
    replacement.undo()
    replacement.undo()
    assert not any("forward" in vars(block) for block in model.blocks)


def test_our_model_recomputes_where_open_soras_helper_asks_for_it():
    model = make_model("own")

    def set_attributes(module):
        module.grad_checkpointing, module.fp32_attention, module.grad_checkpointing_step = True, False, 1

    model.apply(set_attributes)
    assert model.grad_checkpointing and model.checkpointed_blocks == len(model.blocks)
    calls.clear()
    assert get_error(train(model, 0), train(make_model("own"), 0)) < ROUNDING
    assert calls["spatial_attention", "reference"] == 3 * len(model.blocks)
    model.grad_checkpointing = False
    assert model.checkpointed_blocks == 0


class Wrapper(nn.Module):
    """As a Booster's, FSDP's or an adapter library's: the model is its attribute, and answers for it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        module = super().__getattr__("module")
        return module if name == "module" else getattr(module, name)

    def forward(self, **inputs):
        return self.module(**inputs)


@both
def test_the_model_is_found_in_wrappers_and_undone_there(name):
    model = make_model(name)
    untouched = get_loss(model, 0)
    boosted = Wrapper(Wrapper(model))
    replacement = use_kernels(boosted, "reference", gelu_tanh=True)
    assert replacement.replaced == {"gelu_tanh": ["blocks.0", "blocks.1"]}
    assert torch.allclose(get_loss(boosted, 0), untouched)
    replacement.undo()
    assert torch.equal(get_loss(boosted, 0), untouched)
    both = nn.ModuleDict({"model": model, "average": copy.deepcopy(model)})
    with pytest.raises(ValueError, match="ModuleDict holds several models, model, average; call use_kernels for each"):
        use_kernels(both)


@both
def test_a_whole_model_may_be_pickled_and_moved(name):
    model, expected = changed(name), train(make_model(name), 0)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded, pickled = torch.load(saved, weights_only=False), pickle.loads(pickle.dumps(model))
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    for again in (loaded, pickled):
        again.load_state_dict(state)
        assert get_error(train(again, 0), expected) < ROUNDING


@both
@pytest.mark.parametrize("use", ["before", "after"])
def test_what_zero_optimizers_do_to_parameters(name, use):
    """In the order of Open-Sora's trainer: average, dtype, recomputing, then an optimizer that keeps float32 masters,
    swaps the data of parameters and takes each gradient away as soon as it is there."""
    losses = {}
    for kernels in (False, True):
        model = make_model(name)
        if kernels and use == "before":
            use_kernels(model, "reference")
        average = copy.deepcopy(model).float().requires_grad_(False).eval()
        model = model.to(torch.bfloat16).train()
        if kernels and use == "after":
            use_kernels(model, "reference")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        masters = {parameter: parameter.detach().float() for parameter in trained}
        taken = []

        def take(parameter, masters=masters, taken=taken):
            masters[parameter] -= 0.1 * parameter.grad.float()
            parameter.grad = None
            taken.append(parameter)

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(take)
        losses[kernels] = []
        for number in range(3):
            taken.clear()
            loss = get_loss(model, number)
            loss.backward()
            assert len(taken) == len(trained) == len(set(taken)), "every gradient comes once"
            for parameter in trained:
                parameter.data = masters[parameter].to(torch.bfloat16)
            losses[kernels].append(float(loss.detach()))
        before = get_loss(average, 0)
        assert not before.requires_grad and torch.allclose(before, get_loss(make_model(name), 0), rtol=1e-5)
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)


class Adapter(nn.Module):
    """Has a Linear inside and shows its weight, as low-rank adapters do."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


def put_adapter(block):
    # Upstream's own modules take it as an attribute; ours, which the stand-in holds too, refuse it at once then.
    block.attn._modules["qkv"] = Adapter(block.attn.qkv)


def put_forward(block):
    block.mlp.fc1.forward = lambda x: x


def wrap_part(block):
    block.mlp = Wrapper(block.mlp)


class OtherAttention(SelfAttention):
    def forward(self, x):
        return x


def derive_part(block):
    block.attn.__class__ = OtherAttention


def ignore(*arguments):
    return None


CHANGES = {
    "attn.qkv is not a plain Linear but test_foreign_trainers.Adapter": put_adapter,
    "mlp is a test_foreign_trainers.Wrapper": wrap_part,
    "attn is a test_foreign_trainers.OtherAttention with a forward": derive_part,
    "mlp.fc1.forward is replaced": put_forward,
    "attn has a forward hook": lambda block: block.attn.register_forward_hook(ignore),
    "attn_temp.q_norm has a forward hook": lambda block: block.attn_temp.q_norm.register_forward_pre_hook(ignore),
    "cross_attn.proj has a backward hook": lambda block: block.cross_attn.proj.register_full_backward_hook(ignore),
}


@both
@pytest.mark.parametrize(("message", "change"), CHANGES.items(), ids=list(CHANGES))
def test_what_would_not_be_called_inside_a_block_is_refused_whenever_it_comes(name, message, change):
    model = changed(name)
    get_loss(model, 0)
    change(model.blocks[1])
    with pytest.raises(ValueError, match=f"Block: {message}.*, but the kernels read .* whole blocks"):
        get_loss(model, 0)
    if name == "upstream's":
        model = make_model(name)
        change(model.blocks[1])
        with pytest.raises(ValueError, match=f"use_kernels: blocks.1: {message}"):
            use_kernels(model)


@both
def test_hooks_on_a_whole_block_are_called(name):
    model, seen = changed(name), []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda *arguments: seen.append("before"))
    block.register_forward_hook(lambda *arguments: seen.append("after"))
    block.register_full_backward_hook(lambda *arguments: seen.append("backward"))
    assert get_error(train(model, 0), train(make_model(name), 0)) < ROUNDING
    assert seen == ["before", "after", "backward"]


class Half(nn.Module):
    def forward(self, value):
        return value / 2


@both
@pytest.mark.parametrize(
    ("place", "tensor"),
    [("", "scale_shift_table"), ("attn.qkv", "weight"), ("attn.q_norm", "weight"), ("mlp.fc1", "bias")],
)
def test_parametrizations_are_followed(name, place, tensor):
    gradients = []
    for kernels in (False, True):
        model = make_model(name)
        parametrize.register_parametrization(model.blocks[0].get_submodule(place), tensor, Half())
        if kernels:
            assert use_kernels(model, "reference").replaced["gelu_tanh"] == ["blocks.0", "blocks.1"]
        gradients.append(train(model, 0))
    assert get_error(*gradients) < ROUNDING


def test_no_block_is_left_out_in_silence():
    model = make_model("upstream's")
    model.blocks[1].attn.qkv.bias = None
    with pytest.raises(ValueError, match="use_kernels: blocks.1: attn.qkv has no bias"):
        use_kernels(model)
    model = make_model("upstream's")
    model.blocks[1].forward = model.blocks[1].forward
    with pytest.raises(ValueError, match="blocks.1.forward is replaced by something else; call use_kernels before"):
        use_kernels(model)


@both
def test_a_compiled_model_is_refused(name):
    model = make_model(name)
    with pytest.raises(ValueError, match="compiled already.* call use_kernels before torch.compile"):
        use_kernels(torch.compile(model, backend="eager"))
    model.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        use_kernels(model)


@both
def test_parameters_may_be_given_for_one_call_and_transforms_are_refused(name):
    model, expected = changed(name), train(make_model(name), 0)
    given = {key: value.detach().clone() for key, value in model.named_parameters()}
    for key in expected:
        given[key].requires_grad_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    get_loss(lambda **batch: torch.func.functional_call(model, given, (), batch), 0).backward()
    assert get_error({key: given[key].grad for key in expected}, expected) < ROUNDING

    def loss(parameters):
        return get_loss(lambda **batch: torch.func.functional_call(model, parameters, (), batch), 0)

    with pytest.raises(ValueError, match="transforms of torch.func .* do not pass the kernels"):
        torch.func.grad(loss)({key: value.detach() for key, value in given.items() if key in expected})


@both
def test_a_second_derivative_is_refused(name):
    model, batch = changed(name), make_batch(0)
    batch["x"].requires_grad_()
    with pytest.raises(ValueError, match="it has no second derivatives"):
        torch.autograd.grad(model(**batch).square().sum(), batch["x"], create_graph=True)


@both
def test_scaled_gradients_under_autocast(name):
    gradients = []
    for kernels in (False, True):
        model = changed(name) if kernels else make_model(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = get_loss(model, 0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(get_gradients(model))
        scaler.step(optimizer)
    flat = [torch.cat([value.flatten() for value in found.values()]) for found in gradients]
    assert (flat[1] - flat[0]).norm() / flat[0].norm() < 0.02


def test_a_transform_leaves_nothing_in_the_cache_of_positions():
    model, kept = changed("own"), cached_side.cache_info().currsize
    batch = make_batch(0) | {"height": torch.full((2,), 99.0)}
    with pytest.raises(ValueError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda factor: model(**batch).sum() * factor)(torch.ones(()))
    assert cached_side.cache_info().currsize == kept
    get_loss(lambda **_: model(**batch), 0)
    assert cached_side.cache_info().currsize > kept
