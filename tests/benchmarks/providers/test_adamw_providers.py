"""An optimizer step by every library: what each computes, from the same gradients and state."""

import sys
from types import ModuleType

import pytest
import torch

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.measuring.accuracy import norm
from opensora_fast.benchmarks.measuring.contest import make_yardstick
from opensora_fast.benchmarks.providers import adamw
from opensora_fast.benchmarks.providers.adamw import ADAMW_PROVIDERS, ADAMW_REFERENCES
from opensora_fast.benchmarks.providers.adamw_work import (
    GRADIENT_NORM,
    STATE,
    adamw_results,
    count_adamw,
    make_adamw_work,
    parameter_shapes,
)
from opensora_fast.benchmarks.suites import ops
from opensora_fast.benchmarks.suites.scale import scale_of
from opensora_fast.costs.operations import count_optimizer
from opensora_fast.model import STDiT2

SHAPES = {name: torch.Size(shape) for name, shape in {"weight": (33, 40), "bias": (33,), "table": (6, 40)}.items()}
NAMES = [provider.name for provider in ADAMW_PROVIDERS]
DTYPES = [torch.float32, torch.bfloat16]


class StandIn(torch.optim.Optimizer):
    """Adam as apex and ColossalAI compute it: float32 gradients, weights and moments; steps counted on the host."""

    def __init__(self, parameters, lr, betas, eps, weight_decay):
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def move(self, parameter, state, step):
        (group,) = self.param_groups
        assert {z.dtype for z in (parameter, parameter.grad, state["exp_avg"])} == {torch.float32}
        assert group["weight_decay"] == 0.0
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
        parameter -= group["lr"] * (state["exp_avg"] / (1 - beta1**step)) / root


class FusedAdam(StandIn):
    """apex (GitHub, July 2026): one number of steps for all."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert adam_w_mode
        super().__init__(params, lr, betas, eps, weight_decay)

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                self.move(parameter, self.state[parameter], group["step"])


class HybridAdam(StandIn):
    """ColossalAI 0.5.0: a number of steps for each tensor."""

    def __init__(
        self,
        model_params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        adamw_mode=True,
        nvme_offload_fraction=0.0,
        nvme_offload_dir=None,
    ):
        assert adamw_mode
        super().__init__(model_params, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self, closure=None, div_scale=-1):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["step"] += 1
                self.move(parameter, self.state[parameter], self.state[parameter]["step"])


@pytest.fixture
def libraries(monkeypatch):
    for name, optimizer in (("apex.optimizers", FusedAdam), ("colossalai.nn.optimizer", HybridAdam)):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        setattr(sys.modules[name], optimizer.__name__, optimizer)


def step_of(name, work):
    """A provider's step on a CPU: torch.compile's without being compiled, ours by the reference."""
    if name == "ours":
        return adamw.prepare_own(work, "reference")
    return next(provider for provider in ADAMW_PROVIDERS if provider.name == name).prepare(work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_the_same(name, dtype, libraries, monkeypatch):
    monkeypatch.setattr(adamw, "compiled", lambda function: function)
    work = make_adamw_work(SHAPES, "cpu", dtype)
    yardstick = make_yardstick(ADAMW_REFERENCES, work, adamw_results)
    # Gradients in bfloat16, but all else float32: only the working weights may err as bfloat16 does.
    limits = {"output working": 4e-3} if dtype == torch.bfloat16 else {}
    assert all(limit < limits.get(result, 3e-5) for result, limit in yardstick.limits.items())
    results, _ = adamw_results(step_of(name, work), work)
    judgement = yardstick.judge(results, outputs_only=True)
    assert judgement.is_right, judgement
    if dtype == torch.bfloat16:
        assert all(
            torch.equal(working, results["output master"][key].bfloat16())
            for key, working in results["output working"].items()
        )


@pytest.mark.parametrize("name", ["foreach", "flat"])
def test_the_steps_that_are_compiled_are_one_graph(name):
    work = make_adamw_work(SHAPES, "cpu", torch.bfloat16)
    function = adamw.foreach_step if name == "foreach" else adamw.flat_step
    arguments = [adamw._Lists.of(work)] if name == "foreach" else [work.flat, work.flat["gradient"].clone()]
    compiled = torch.compile(function, dynamic=False, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, _ = adamw_results(lambda: function(*arguments, adamw._steps_before(work)), work)
        found, _ = adamw_results(lambda: compiled(*arguments, adamw._steps_before(work)), work)
    for result, tensors in expected.items():
        for key, value in tensors.items():
            torch.testing.assert_close(found[result][key], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_NORM", 1.1), ("LEARNING_RATE", 0.0101), ("EMA_DECAY", 0.901), ("STEPS_BEFORE", 999), ("EPSILON", 1e-5)],
)
def test_another_step_is_refused(name, value, monkeypatch):
    """Each number of the step counts: what is a little different from it is over the limit."""
    work = make_adamw_work(SHAPES, "cpu", torch.bfloat16)
    yardstick = make_yardstick(ADAMW_REFERENCES, work, adamw_results)
    monkeypatch.setattr(adamw, name, value)
    results, _ = adamw_results(step_of("torch-fused", work), work)
    assert not yardstick.judge(results, outputs_only=True).is_right


def test_a_step_begins_from_the_same_values_in_every_dtype():
    work = make_adamw_work(SHAPES, "cpu", torch.bfloat16)
    wide = work.to(torch.float64)
    before = {name: flat.clone() for name, flat in work.flat.items()}
    step_of("eager", work)()
    assert all(not torch.equal(work.flat[name], before[name]) for name in (*STATE, "working"))
    work.reset()
    wide.reset()
    for name, flat in before.items():
        assert torch.equal(work.flat[name], flat) and torch.equal(wide.flat[name], flat.double())
    gradients = list(work.tensors("gradient").values())
    assert norm(gradients) == pytest.approx(GRADIENT_NORM, rel=0.1)  # so that it is clipped


def test_all_trainable_parameters_of_the_model_take_part():
    config = STDiT2Config.small()
    parameters = {name: value.shape for name, value in STDiT2(config).named_parameters() if value.requires_grad}
    assert parameter_shapes(config) == parameters
    case = ops.adamw_case(scale_of("cuda"), 0.0)
    assert (case.template.workload, case.template.shape) == ("767.5 M parameters", "P=767452064 tensors=705")


def test_the_bytes_of_a_step_are_counted():
    # Read: the gradient twice, master, moments, average; written: these four and the working weights.
    assert count_adamw(10, 2).bytes == 10 * (2 + 2 + 16 + 16 + 2)
    assert count_adamw(10, 4).bytes == 10 * (4 + 4 + 16 + 16)  # the masters are the weights
    assert count_adamw(10, 2).bytes == count_optimizer(10).bytes + 10 * 2  # which leaves out the norm
