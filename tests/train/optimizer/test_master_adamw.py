"""The optimizer against torch's own AdamW written out, in float32 and with bfloat16 working weights."""

import pytest
import torch
from alike_processes import AlikeProcesses
from torch import nn

from opensora_fast.kernels import calls
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.flat import ALIGNMENT
from opensora_fast.train.optimizer.master_adamw import MasterAdamW

CPU = torch.device("cpu")
# HybridAdam's, as Open-Sora gives none.
BETAS, EPSILON = (0.9, 0.999), 1e-8


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model.register_buffer("table", torch.randn(4))
    model[0].bias.requires_grad_(False)
    return model


def make_optimizer(model, dtype, grad_clip=1.0, lr=1e-2, device=CPU, **options):
    return MasterAdamW(model, dtype=dtype, device=device, lr=lr, grad_clip=grad_clip, **options)


def take_gradient(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    dtype = model[0].weight.dtype
    x = torch.randn(6, 5, generator=generator).to(dtype)
    (model(x) * torch.randn(6, 3, generator=generator).to(dtype)).sum().mul(scale).backward()


def adamw_by_hand(weights, gradients, state, lr, step):
    """One AdamW step without weight decay, in float64."""
    for name, gradient in gradients.items():
        m, v = state.setdefault(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        m, v = BETAS[0] * m + (1 - BETAS[0]) * gradient, BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        state[name] = (m, v)
        m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
        weights[name] = weights[name] - lr * m_hat / (v_hat.sqrt() + EPSILON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_clip", [None, 0, 1.0, 1e-3])
def test_steps_equal_adamw_on_float32_masters(dtype, grad_clip):
    model = make_model()
    optimizer = make_optimizer(model, dtype, grad_clip)
    weights = {name: value.detach().double() for name, value in optimizer.masters.items()}
    state = {}
    for step in range(1, 5):
        take_gradient(model, step)
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        if grad_clip and norm > grad_clip:
            gradients = {name: gradient * grad_clip / (norm + 1e-6) for name, gradient in gradients.items()}
        assert float(optimizer.step()) == pytest.approx(float(norm), rel=1e-5)
        adamw_by_hand(weights, gradients, state, 1e-2, step)
        for name, value in optimizer.masters.items():
            assert value.dtype == torch.float32 and not value.requires_grad
            torch.testing.assert_close(value.detach().double(), weights[name], rtol=1e-5, atol=1e-7)
            assert torch.equal(dict(model.named_parameters())[name], value.to(dtype))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_runs_on_the_backend_that_is_asked_for(device, backend):
    model = make_model()
    optimizer = make_optimizer(model, torch.float32, device=device, backend=backend)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = calls.copy()
    optimizer.step()
    assert calls - before == {("adamw", backend): 1}


def test_masters_keep_steps_too_small_for_bfloat16():
    model = make_model()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    optimizer = make_optimizer(model, torch.bfloat16, lr=1e-5)
    for step in range(20):
        take_gradient(model, step)
        optimizer.step()
    assert torch.equal(model[0].weight, torch.ones_like(model[0].weight))  # 1 ± 2e-4 is 1 in bfloat16
    assert (optimizer.masters["0.weight"] - 1).abs().mean() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    model = make_model()
    optimizer = make_optimizer(model, dtype)
    take_gradient(model, 1)
    optimizer.step()
    before = {name: value.clone() for name, value in {**optimizer.full_state(), **optimizer.state_dict()}.items()}
    take_gradient(model, 2)
    model[2].weight.grad[0, 0] = bad
    assert not torch.isfinite(optimizer.step())
    after = {**optimizer.full_state(), **optimizer.state_dict()}
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    # and the next good step is what it would have been
    take_gradient(model, 3)
    optimizer.step()
    assert float(optimizer.state_dict()["step"]) == 2
    assert all(torch.isfinite(value).all() for value in optimizer.masters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype):
    model = make_model()
    optimizer = make_optimizer(model, dtype)
    for step in range(3):
        take_gradient(model, step)
        optimizer.step()
    other_model = make_model(seed=1)
    other = make_optimizer(other_model, dtype)
    other.load_weights(optimizer.full_state())
    other.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for some_model, some in ((model, optimizer), (other_model, other)):
            take_gradient(some_model, step)
            some.step()
    for name, value in optimizer.full_state().items():
        assert torch.equal(value, other.full_state()[name]), name
    assert torch.equal(model.table, other_model.table)


def test_frozen_weights_and_buffers_stay_float32_and_whole():
    model = make_model()
    bias, table = model[0].bias.detach().clone(), model.table.clone()
    optimizer = make_optimizer(model, torch.bfloat16)
    assert set(optimizer.fixed) == {"0.bias", "table"}
    assert torch.equal(optimizer.full_state()["0.bias"], bias)
    assert torch.equal(optimizer.full_state()["table"], table)
    assert "0.bias" not in optimizer.masters


def test_errors():
    with pytest.raises(ValueError, match="float16"):
        make_optimizer(make_model(), torch.float16)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(make_model().requires_grad_(False), torch.float32)
    optimizer = make_optimizer(make_model(), torch.float32)
    with pytest.raises(ValueError, match="no gradient of 0.weight and 2 more: call backward"):
        optimizer.step()
    state = optimizer.full_state()
    with pytest.raises(ValueError, match="another model: .* is missing; .* is missing; .* is missing and 2 more$"):
        optimizer.load_weights({})
    with pytest.raises(ValueError, match="2.weight is missing"):
        optimizer.load_weights({name: value for name, value in state.items() if name != "2.weight"})
    with pytest.raises(ValueError, match=r"0.weight has shape \[1\], here \[7, 5\]"):
        optimizer.load_weights(state | {"0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra is unknown"):
        optimizer.load_weights(state | {"extra": torch.zeros(1)})
    moments = optimizer.state_dict()
    with pytest.raises(ValueError, match="exp_avg.other is not here"):
        optimizer.load_state_dict(moments | {"exp_avg.other": torch.zeros(1)})
    of_another_shape = moments["exp_avg.2.weight"].T
    with pytest.raises(ValueError, match="exp_avg.2.weight is missing or of another shape"):
        optimizer.load_state_dict(moments | {"exp_avg.2.weight": of_another_shape})
    del moments["exp_avg_sq.0.weight"]
    with pytest.raises(ValueError, match="exp_avg_sq.0.weight is missing"):
        optimizer.load_state_dict(moments)


def test_ema_is_open_soras_formula_bit_for_bit():
    model = make_model()
    optimizer = make_optimizer(model, torch.bfloat16)
    ema = EMA(optimizer, 0.9999)
    expected = {name: value.clone() for name, value in optimizer.masters.items()}
    for step in range(50):
        take_gradient(model, step)
        optimizer.step(ema)
        for name, value in expected.items():
            value.mul_(0.9999).add_(optimizer.masters[name], alpha=1 - 0.9999)
    for name, value in expected.items():
        assert torch.equal(ema.average[name], value)
        assert not torch.equal(value, optimizer.masters[name])
    fresh = EMA(optimizer, 0.9999)
    fresh.load(ema.average)
    assert torch.equal(fresh.flat, ema.flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_aligned_views_of_one_tensor_in_float32_of_the_masters(dtype):
    model = make_model()
    optimizer = make_optimizer(model, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    places = {parameter.untyped_storage().data_ptr() for parameter in trained}
    assert len(places) == 1
    assert (optimizer.master.untyped_storage().data_ptr() in places) == (dtype == torch.float32)
    assert all(parameter.storage_offset() % ALIGNMENT == 0 for parameter in trained)
    assert all(parameter.is_contiguous() for parameter in trained)


@pytest.mark.parametrize(("rank", "owned"), [(0, {"2.weight", "2.bias"}), (1, {"0.weight"})])
def test_every_weight_begins_as_the_process_that_owns_it_has_drawn_it(monkeypatch, rank, owned):
    """Drawn on processors of different kinds they may differ in the last bit."""

    def spread(self, flat):
        flat.view(2, -1)[1 - rank] = 7.0
        return lambda: None

    monkeypatch.setattr(AlikeProcesses, "spread", spread)
    model = make_model()
    drawn = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    make_optimizer(model, torch.float32, processes=AlikeProcesses(rank, 2))
    for name, weight in drawn.items():
        expected = weight if name in owned else torch.full_like(weight, 7.0)
        assert torch.equal(dict(model.named_parameters())[name], expected), name


def test_a_parameter_without_a_gradient_is_an_error():
    model = make_model()
    optimizer = make_optimizer(model, torch.float32)
    take_gradient(model, 1)
    model[2].bias.grad = None
    with pytest.raises(ValueError, match="no gradient of 2.bias"):
        optimizer.step()
