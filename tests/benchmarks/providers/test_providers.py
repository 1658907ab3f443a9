"""Every way to compute something equals the others; what only runs on a GPU is tested for its arithmetic here."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from compiled_graphs import Graphs
from quack_stand_in import QuackStandIn, install
from run_again import RunAgain
from same_results import assert_same
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.measuring.contest import op_results
from opensora_fast.benchmarks.measuring.provider import Provider
from opensora_fast.benchmarks.providers import blocks, elementwise, models
from opensora_fast.benchmarks.providers.blocks import BLOCK_PROVIDERS, block_provider, make_block_work
from opensora_fast.benchmarks.providers.graphs import GraphedModel
from opensora_fast.benchmarks.providers.model_work import make_model_work, make_training
from opensora_fast.benchmarks.providers.models import (
    MODEL_PROVIDERS,
    BoundModel,
    compute_losses,
    model_provider,
    model_results,
    own_view,
    sampling_call,
    sampling_output,
    training_call,
    view_of,
)
from opensora_fast.benchmarks.providers.variants import REFERENCE, VARIANT_OF, WATERFALL, Variant
from opensora_fast.benchmarks.shapes import Pack, Workload
from opensora_fast.model import stdit2
from opensora_fast.model.backends import OPS, Backends

CONFIG = STDiT2Config.small(upstream_rounding=False)
PACK = Pack("mixed", (Workload("144p", 2, 1), Workload("256", 1, 1)))
UNIFORM = Pack.of(Workload("144p", 2, 2))
EAGER = model_provider(VARIANT_OF["eager"])


@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual_modulated_norm"])
def test_a_librarys_norm_with_our_modulation(op):
    work = elementwise.make_elementwise_work(op, PACK, "cpu", torch.float32, 24)
    call = elementwise.with_norm(lambda x: layer_norm(x, x.shape[-1:], eps=elementwise.EPS))
    expected, _ = op_results(partial(elementwise.own_call, work, "reference"), work)
    assert_same(op_results(partial(call, work), work)[0], expected)


@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual_modulated_norm"])
def test_ligers_norm_gets_the_same_ones_and_zeros_in_every_call(monkeypatch, op):
    affine = []

    class LigerLayerNormFunction:
        @staticmethod
        def apply(x, weight, bias, eps):
            affine.append((weight, bias))
            return layer_norm(x, x.shape[-1:], weight, bias, eps)

    library = SimpleNamespace(LigerLayerNormFunction=LigerLayerNormFunction)
    for name, module in (("liger_kernel", None), ("liger_kernel.ops", None), ("liger_kernel.ops.layer_norm", library)):
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace(__path__=[]))
    work = elementwise.make_elementwise_work(op, PACK, "cpu", torch.float32, 24)
    expected, _ = op_results(partial(elementwise.own_call, work, "reference"), work)
    (liger,) = (provider for provider in elementwise.ELEMENTWISE_PROVIDERS if provider.name == "liger")
    bound = liger.prepare(work)
    for _ in range(2):
        assert_same(op_results(bound, work)[0], expected)
    (ones, zeros), again = affine
    assert again[0] is ones and again[1] is zeros


def test_given_frames_are_for_videos_of_one_shape():
    with pytest.raises(ValueError, match="mixed: given frames are measured on videos of one shape"):
        elementwise.make_elementwise_work("modulated_norm", PACK, "cpu", torch.float32, 24, given_frames=True)


def available(providers, work) -> list[Provider]:
    return [provider for provider in providers if not provider.missing(work)]


@pytest.mark.parametrize("pack", [UNIFORM, PACK], ids=["uniform", "mixed"])
def test_all_blocks_are_the_same(pack):
    work = make_block_work(CONFIG, pack, 5, "cpu", torch.float32)
    providers = available(BLOCK_PROVIDERS, work)
    dense_only = {"upstream", "upstream-flash"} if pack is UNIFORM else set()
    assert {provider.name for provider in providers} == {"eager"} | dense_only
    wide = work.to(torch.float64)
    eager = next(provider for provider in providers if provider.name == "eager")
    expected, _ = op_results(eager.prepare(wide), wide)
    assert {"output", "gradient of x", "gradient of text", "gradient of attn.q_norm.weight"} <= set(expected)
    for provider in providers:
        assert_same(op_results(provider.prepare(work), work)[0], expected, 5e-6)


def test_a_block_is_built_on_another_device_than_the_host():
    """Tables of a pack are computed on the host, whatever the device of the block is."""
    pack = Pack("mixed", (Workload("144p", 3, 1), Workload("256", 1, 2)))  # sizes that no other test has
    work = make_block_work(CONFIG, pack, 5, "meta", torch.float32)
    assert work.device == "meta" and work.layout.num_tokens == pack.tokens
    tensors = [*work.leaves.values(), work.frequencies, work.layout.token_frame]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_blocks_on_one_layout_share_one_compiled_graph(monkeypatch):
    """What the first block asks a layout is no change to it, for which the second would be compiled anew."""
    counter = CompileCounter()
    monkeypatch.setattr(
        blocks, "compiled", lambda function, options: torch.compile(function, backend=counter, dynamic=False)
    )
    pack = Pack("mixed", (Workload("144p", 2, 2), Workload("256", 1, 1)))  # sizes that no other test has
    work = make_block_work(CONFIG, pack, 5, "cpu", torch.float32)
    compute = block_provider(VARIANT_OF["compile"]).prepare(work)
    torch._dynamo.reset()
    first, second = compute(), compute()
    assert counter.frame_count == 1
    assert_same({"output": second}, {"output": first})


def test_other_options_of_the_compiler_take_a_graph_of_their_own(monkeypatch):
    graphs = Graphs(monkeypatch)
    work = make_block_work(CONFIG, UNIFORM, 5, "cpu", torch.float32)
    for name in ("compile", "compile-one-order"):
        compute = block_provider(VARIANT_OF[name]).prepare(work)
        compute(), compute()
    assert graphs.options == [None, {"triton.mix_order_reduction": False}]


def test_options_of_the_compiler_are_such_as_it_knows():
    """It refuses others, but only where it compiles, which no test does."""
    for variant in VARIANT_OF.values():
        torch.compile(lambda x: x, options=dict(variant.options))


@pytest.fixture(scope="module")
def model_work():
    training = make_training(CONFIG, "cpu", torch.float32)
    return make_model_work(training.model, Workload("144p", 2, 2), 5, training)


def test_all_models_are_the_same_and_share_their_parameters(model_work):
    wide = model_work.to(torch.float64)
    expected, _ = model_results(EAGER.prepare(wide), wide)
    names = []
    for provider in available(MODEL_PROVIDERS, model_work):
        results, _ = model_results(provider.prepare(model_work), model_work)
        assert_same(results, expected, 5e-6)
        names.append(provider.name)
    assert set(names) >= {"upstream", "upstream-flash", "upstream-flash-stored", "eager", "eager-recompute"}
    assert model_work.model.backends == Backends() and model_work.model.checkpointed_blocks == 0
    assert all(parameter.detach().any() for parameter in model_work.model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_variant_that_recomputes_a_share_of_the_blocks_is_the_same(model_work, monkeypatch, compiled):
    counted = []
    for module in (models, stdit2):
        monkeypatch.setattr(module, "checkpoint", lambda *args, **keys: counted.append(1) or checkpoint(*args, **keys))
    monkeypatch.setattr(blocks, "compiled", lambda function, options: function)  # what is compiled is the same function
    expected, _ = model_results(EAGER.prepare(model_work), model_work)
    half = view_of(model_work.model, Variant("half", REFERENCE, compiled=compiled, recompute=0.5))
    results, _ = model_results(BoundModel(half, model_work), model_work)
    assert_same(results, expected, 5e-6)
    assert len(counted) == CONFIG.depth // 2 > 0


@pytest.fixture(scope="module")
def mixed_work(model_work):
    training = model_work.training
    pack = Pack("mixed", (Workload("144p", 2, 2), Workload("256", 1, 1), Workload("144p", 1, 1)))
    return make_model_work(training.model, pack, 5, training)


def test_all_models_that_take_a_mixed_pack_are_the_same(mixed_work):
    wide = mixed_work.to(torch.float64)
    expected, _ = model_results(EAGER.prepare(wide), wide)
    shapes = [tuple(video.shape) for video in expected["output"]]
    assert shapes == [(8, 2, 18, 32)] * 2 + [(8, 1, 32, 32), (8, 1, 18, 32)]
    names = []
    for provider in available(MODEL_PROVIDERS, mixed_work):
        results, _ = model_results(provider.prepare(mixed_work), mixed_work)
        assert_same(results, expected, 5e-6)
        names.append(provider.name)
    assert names == ["eager", "eager-recompute"]
    upstream = next(provider for provider in MODEL_PROVIDERS if provider.name == "upstream")
    assert upstream.missing(mixed_work) == "takes videos of one shape only"


def test_the_losses_of_a_mixed_pack_are_those_of_its_videos(mixed_work):
    """The model is called once for all of them, and each gets its own noise, timestep and text."""
    model = view_of(mixed_work.model.eval(), VARIANT_OF["eager"])
    calls = []

    def counted(latents, timestep, **conditions):
        calls.append(len(latents))
        return model(latents, timestep, **conditions)

    torch.manual_seed(5)
    losses = compute_losses(counted, mixed_work, mixed_work.latents, dict(mixed_work.conditions))
    assert calls == [4] and losses.shape == (4,)
    torch.manual_seed(5)
    alone = []
    for first, last in ((0, 2), (2, 3), (3, 4)):  # videos of one shape that follow each other
        latents = torch.stack(mixed_work.latents[first:last])
        conditions = {name: value[first:last] for name, value in mixed_work.conditions.items()}
        work = replace(mixed_work, latents=latents, timestep=mixed_work.timestep[first:last])
        alone.append((work, latents, conditions, torch.randn_like(latents)))
    expected = [
        work.diffusion.training_losses(model, latents, work.timestep, conditions, noise=noise)["loss"]
        for work, latents, conditions, noise in alone
    ]
    torch.testing.assert_close(losses, torch.cat(expected), rtol=2e-6, atol=0)
    mixed_work.model.train()


def test_a_training_step_on_a_mixed_pack_trains(mixed_work):
    weight = mixed_work.model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    training_call(EAGER.prepare(mixed_work), mixed_work)()
    assert not torch.equal(before, weight.detach())


def test_a_training_step_of_any_variant_trains_the_shared_weights(model_work):
    for name in ("upstream", "eager"):
        provider = next(provider for provider in MODEL_PROVIDERS if provider.name == name)
        before = [parameter.detach().clone() for parameter in model_work.model.parameters() if parameter.requires_grad]
        averages = {key: value.clone() for key, value in model_work.training.ema.average.items()}
        training_call(provider.prepare(model_work), model_work)()
        after = [parameter.detach() for parameter in model_work.model.parameters() if parameter.requires_grad]
        changed = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert changed > 0.9 * len(after)
        assert any(not torch.equal(averages[key], value) for key, value in model_work.training.ema.average.items())


@pytest.mark.parametrize("name", ["compile", "compile-recompute", "compile-upstream"])
def test_compiled_models_are_one_graph_for_all_blocks_and_are_not_compiled_again(model_work, monkeypatch, name):
    graphs = Graphs(monkeypatch)
    expected, _ = model_results(EAGER.prepare(model_work), model_work)
    provider = next(provider for provider in MODEL_PROVIDERS if provider.name == name)
    bound = provider.prepare(model_work)
    assert_same(model_results(bound, model_work)[0], expected, 5e-6)
    first = graphs.count
    assert first == 1, f"{first} graphs for {CONFIG.depth} equal blocks"
    model_results(bound, model_work)
    assert graphs.count == first


def test_a_compiled_model_takes_a_mixed_pack(mixed_work, monkeypatch):
    graphs = Graphs(monkeypatch)
    expected, _ = model_results(EAGER.prepare(mixed_work), mixed_work)
    bound = next(provider for provider in MODEL_PROVIDERS if provider.name == "compile").prepare(mixed_work)
    for _ in range(2):
        assert_same(model_results(bound, mixed_work)[0], expected, 5e-6)
        assert graphs.count == 1


@pytest.mark.parametrize("op", elementwise.OPS)
def test_compiled_ops_are_not_compiled_again(monkeypatch, op):
    graphs = Graphs(monkeypatch)
    work = elementwise.make_elementwise_work(op, UNIFORM, "cpu", torch.float32, 24)
    bound = elementwise._prepare_compiled(work)
    expected, _ = op_results(partial(elementwise.own_call, work, "reference"), work)
    for _ in range(2):
        assert_same(op_results(bound, work)[0], expected)
        assert graphs.count == 1


def replayed(work, view="eager") -> GraphedModel:
    """On a CPU, where no graph can be captured."""
    return GraphedModel(own_view(work.model, VARIANT_OF[view]), work, RunAgain())


def test_results_of_a_graphed_model_are_those_of_a_replay(model_work):
    expected, sent_back = model_results(EAGER.prepare(model_work), model_work)
    results, same = model_results(replayed(model_work), model_work)
    assert_same(results, expected, 1e-6)
    assert same == sent_back
    assert all(parameter.grad is None for parameter in model_work.model.parameters())

    class Forgetful(RunAgain):
        """Does not replay: what the recording has left is taken for the results."""

        def __call__(self, forward, backward=None):
            recording = super().__call__(forward, backward)
            return replace(recording, replay_forward=lambda: None, replay_backward=lambda: None)

    wrong, _ = model_results(replace(replayed(model_work), record=Forgetful()), model_work)
    assert not torch.equal(wrong["output"][0], expected["output"][0])

    sampled, _ = sampling_output(EAGER.prepare(model_work), model_work)
    assert_same(sampling_output(replayed(model_work), model_work)[0], sampled, 1e-6)
    wrong, _ = sampling_output(replace(replayed(model_work), record=Forgetful()), model_work)
    assert not torch.equal(wrong["output"][0], sampled["output"][0])


def test_a_compiled_model_is_replayed_too(model_work, monkeypatch):
    graphs, recorder = Graphs(monkeypatch), RunAgain()
    expected, _ = model_results(EAGER.prepare(model_work), model_work)
    sampled, _ = sampling_output(EAGER.prepare(model_work), model_work)
    bound = replace(replayed(model_work, "compile-graph"), record=recorder)
    assert_same(model_results(bound, model_work)[0], expected, 5e-6)
    assert graphs.count == recorder.replays == 1
    assert_same(sampling_output(bound, model_work)[0], sampled, 5e-6)
    assert graphs.count == 2 and recorder.replays == 3  # without gradients, of other latents first


def test_sampling_steps_of_a_graphed_model_are_replayed_and_draw_as_others_do(model_work):
    recorder, steps = RunAgain(), []
    assert model_work.model.training  # with dropout of captions, which a sampler does not have
    own = own_view(model_work.model, VARIANT_OF["eager"])
    own.training = False
    for bound in (replace(replayed(model_work), record=recorder), BoundModel(own, model_work)):
        call = sampling_call(bound, model_work)
        for number in range(2):
            torch.manual_seed(number)
            steps.append(call())
    assert recorder.replays == 2 and model_work.model.training
    for replay, expected in zip(steps[:2], steps[2:], strict=True):
        torch.testing.assert_close(replay, expected, rtol=1e-5, atol=1e-5)


def test_training_steps_of_a_graphed_model_are_replayed_and_train_as_others_do():
    """One draws and computes as the trainer, so its weights are those of the trainer's steps."""
    recorder = RunAgain()
    weights = []
    for make_call in (
        lambda work: replace(replayed(work), record=recorder).make_step(),
        lambda work: training_call(EAGER.prepare(work), work),
    ):
        training = make_training(
            STDiT2Config.small(upstream_rounding=False, class_dropout_prob=0.0), "cpu", torch.float32
        )
        work = make_model_work(training.model, Workload("144p", 1, 2), 5, training)
        call = make_call(work)
        for number in range(4):
            torch.manual_seed(number)
            # The trainer draws timesteps, which this step replaces: the other is to draw as many.
            if weights:
                work.diffusion.draw_timesteps(2)
            call()
        weights.append([parameter.detach().clone() for parameter in training.model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))
    assert recorder.replays == 3


def test_graphs_are_for_videos_of_one_shape_on_a_gpu(model_work, mixed_work):
    provider = next(provider for provider in MODEL_PROVIDERS if provider.name == "ours-graph")
    assert provider.missing(model_work) == "needs a CUDA GPU"
    assert provider.missing(mixed_work) == "takes videos of one shape only"
    assert isinstance(provider.prepare(model_work), GraphedModel)
    assert not any("graph" in provider.name for provider in BLOCK_PROVIDERS)
    compiled = next(provider for provider in MODEL_PROVIDERS if provider.name == "compile-graph")
    assert compiled.missing(model_work) == "torch.compile is measured on CUDA only"
    assert compiled.missing(mixed_work) == "takes videos of one shape only"


def test_the_waterfall_adds_one_technique_at_a_time():
    triton = [
        {op for op, backend in vars(VARIANT_OF[name].backends).items() if backend == "triton"}
        for name in WATERFALL
        if not VARIANT_OF[name].is_upstream
    ]
    assert triton[0] == set() and triton[-1] == set(OPS)
    assert all(before < after for before, after in zip(triton, triton[1:], strict=False))
    assert all(name in VARIANT_OF for name in WATERFALL)


def test_quack_multiplies_for_the_linears_on_all_tokens(model_work, monkeypatch):
    ours, quack = VARIANT_OF["ours"], VARIANT_OF["ours-quack"]
    assert vars(quack.backends) == vars(ours.backends) | {"linear": "quack"}
    for provider in (*BLOCK_PROVIDERS, *MODEL_PROVIDERS):
        if provider.name == quack.name:
            assert "needs a CUDA GPU" in provider.missing(model_work)
    stand_in = install(monkeypatch, QuackStandIn())
    by_quack = model_provider(Variant("eager-quack", Backends.all("reference", linear="quack"))).prepare(model_work)
    expected, _ = model_results(model_provider(VARIANT_OF["eager"]).prepare(model_work), model_work)
    assert not stand_in.called
    assert_same(model_results(by_quack, model_work)[0], expected, 5e-6)
    # Eight Linears of a block, forward and for the gradient of their input; that of q_linear meets the stream's.
    assert Counter(name for name, *_ in stand_in.called) == {
        "gemm": 13 * CONFIG.depth,
        "gemm_add": CONFIG.depth,
        "gemm_act": CONFIG.depth,
        "gemm_dact": CONFIG.depth,
    }


def test_views_choose_their_kernels_without_touching_the_model(model_work):
    assert callable(view_of(model_work.model, VARIANT_OF["ours"]))
    assert model_work.model.backends == Backends()


def test_the_gradients_of_a_model_have_the_names_of_its_parameters(model_work):
    results, _ = model_results(EAGER.prepare(model_work), model_work)
    named = dict(model_work.model.named_parameters())
    gradients = results["gradient of the parameters"]
    assert list(gradients) == [name for name, parameter in named.items() if parameter.requires_grad]
    assert all(gradient.shape == named[name].shape for name, gradient in gradients.items())
