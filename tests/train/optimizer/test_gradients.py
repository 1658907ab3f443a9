"""Gradients are averaged in segments, which hold every parameter once, in the order of backward; each counts once.

What several processes make of it is in `test_many_processes.py`.
"""

import weakref

import pytest
import torch
from alike_processes import AlikeProcesses
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_steps import MASKS, SHAPES, make_batch, make_model

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.optimizer import gradients
from opensora_fast.train.optimizer.flat import ALIGNMENT
from opensora_fast.train.optimizer.gradients import MeanGradient, cut_segments, measure_norm, order_of_backward
from opensora_fast.train.optimizer.master_adamw import MasterAdamW
from opensora_fast.train.step.losses import compute_losses, draw_inputs

CPU = torch.device("cpu")


def get_trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def compute_loss(model, masks=None):
    torch.manual_seed(0)
    inputs = ModelInputs(None, None, CPU).prepare(make_batch(1, SHAPES[1], model.config))
    return compute_losses(model, IDDPM(), draw_inputs(model, IDDPM(), masks, *inputs))["loss"]


def make_mean(model, monkeypatch, rank=0, segment=1 << 16):
    monkeypatch.setattr(gradients, "SEGMENT", segment)
    parameters = get_trained(model)
    segments = cut_segments({name: parameter.shape for name, parameter in parameters.items()}, 2)
    assert len(segments) > 4
    return MeanGradient(parameters, segments, torch.float32, CPU, AlikeProcesses(rank, 2)), segments


@pytest.mark.parametrize("recomputed", [0, 2, 3])
@pytest.mark.parametrize("masks", [None, MaskGenerator({"mask_image_head": 1.0})], ids=["noised", "given"])
def test_the_order_is_that_of_backward(recomputed, masks):
    """Of layers, that is: a layer's own parameters are not told apart."""
    model = make_model(depth=3)
    model.set_checkpointing(recomputed)
    arrived = []
    for name, parameter in get_trained(model).items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    compute_loss(model, masks).backward()
    names = order_of_backward(get_trained(model))
    assert sorted(names) == sorted(arrived)

    def find_layers(names):
        return [".".join(name.split(".")[:2]) for name in names]

    last = max(place for place, name in enumerate(arrived) if name.startswith("blocks.0.attn.")) + 1
    assert find_layers(arrived[:last]) == find_layers(names[:last])
    assert all("blocks" not in name or "scale_shift_table" in name for name in names[last:])


@settings(max_examples=100)
@example([[10, 25], [250], [1]], 2)  # two that fill a segment
@given(st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=1, max_size=9), st.integers(2, 5))
def test_every_parameter_lies_in_one_segment(shapes, shards):
    shapes = {f"layer{number}.weight": torch.Size(shape) for number, shape in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "SEGMENT", 500)
        segments = cut_segments(shapes, shards)
    assert [name for layout in segments for name in layout.shapes] == list(reversed(shapes))
    for layout in segments:
        sizes = [shape.numel() for shape in layout.shapes.values()]
        assert len(sizes) == 1 or sum(sizes) <= 500
        assert layout.size % (shards * ALIGNMENT) == 0
    for one, following in zip(segments, segments[1:], strict=False):
        first = next(iter(following.shapes.values()))
        assert sum(shape.numel() for shape in one.shapes.values()) + first.numel() > 500


def test_the_real_model_has_segments_of_a_few_tens_of_megabytes():
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in STDiT2(STDiT2Config.xl_2()).named_parameters()}
    sizes = [2 * layout.size / 1e6 for layout in cut_segments(shapes, 64)]
    assert 40 < len(sizes) < 60 and max(sizes) < 34 and min(sizes[:-1]) > 15


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_gets_its_shard_of_every_segment(monkeypatch, rank):
    model = make_model()
    expected = {}
    loss = compute_loss(model)
    for name, gradient in zip(get_trained(model), torch.autograd.grad(loss, get_trained(model).values()), strict=True):
        expected[name] = gradient
    mean, segments = make_mean(model, monkeypatch, rank)
    for _ in range(2):
        compute_loss(model).backward()
        assert all(parameter.grad is None for parameter in model.parameters())  # they have been gathered
        shards = list(mean.finish())
        for layout, shard in zip(segments, shards, strict=True):
            assert torch.equal(shard, layout.gather(expected, torch.float32, CPU).view(2, -1)[rank])


def test_segments_begin_in_their_order_whatever_order_gradients_come_in(monkeypatch):
    model = make_model()
    begun = []
    monkeypatch.setattr(AlikeProcesses, "average", lambda self, gradient: begun.append(len(gradient)))
    mean, segments = make_mean(model, monkeypatch)
    sizes = [layout.size for layout in segments]
    parameters = get_trained(model)
    for number, layout in list(enumerate(segments))[::-1]:
        for name in layout.shapes:
            assert not begun
            parameters[name].grad = torch.ones_like(parameters[name])
            mean._arrive(number, name, parameters[name])
    assert begun == sizes


def test_a_segment_is_kept_until_it_has_been_averaged(monkeypatch):
    """Another stream reads it meanwhile."""

    def average(self, gradient):
        segment = weakref.ref(gradient)
        return lambda: segment() is not None

    monkeypatch.setattr(AlikeProcesses, "average", average)
    model = make_model()
    mean, _ = make_mean(model, monkeypatch)
    compute_loss(model).backward()
    assert all(mean.finish())


def test_what_no_hook_has_begun_to_average_is_begun_before_the_processes_meet():
    """As the gradients of a step that is replayed as a CUDA graph."""
    model = make_model()
    optimizer = MasterAdamW(
        model, dtype=torch.float32, device=CPU, lr=1e-3, grad_clip=1.0, processes=AlikeProcesses(0, 2)
    )
    for parameter in get_trained(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.begin_step()
    assert all(parameter.grad is None for parameter in get_trained(model).values())


def test_a_second_backward_before_a_step_is_refused(monkeypatch):
    model = make_model()
    mean, _ = make_mean(model, monkeypatch)
    losses = [compute_loss(model) for _ in range(3)]
    losses[0].backward()
    with pytest.raises(ValueError, match="a second gradient of final_layer.linear.bias before a step"):
        losses[1].backward()
    # as a replayed step gives them
    replayed = make_model()
    mean, _ = make_mean(replayed, monkeypatch)
    for _ in range(2):
        for parameter in get_trained(replayed).values():
            parameter.grad = torch.ones_like(parameter)
        mean.begin()
        assert len(list(mean.finish())) > 4
    for parameter in get_trained(replayed).values():
        parameter.grad = torch.ones_like(parameter)
    mean.begin()
    compute_loss(replayed).backward()
    for call in (mean.begin, lambda: list(mean.finish())):
        with pytest.raises(ValueError, match="a second gradient of .* before a step"):
            call()


def test_a_gradient_that_does_not_come_is_named(monkeypatch):
    model = make_model()
    mean, _ = make_mean(model, monkeypatch)
    sum((value**2).sum() for name, value in get_trained(model).items() if name != "blocks.0.mlp.fc1.weight").backward()
    with pytest.raises(ValueError, match="no gradient of blocks.0.mlp.fc1.weight: call backward before step"):
        mean.begin()


def test_a_process_alone_has_one_segment_and_no_hooks(monkeypatch):
    model = make_model()
    make_mean(model, monkeypatch)
    assert all(parameter._post_accumulate_grad_hooks for parameter in get_trained(model).values())
    model = make_model()
    optimizer = MasterAdamW(model, dtype=torch.float32, device=CPU, lr=1e-3, grad_clip=1.0, processes=Processes(CPU))
    hooks = [parameter._post_accumulate_grad_hooks for parameter in get_trained(model).values()]
    assert not any(hooks)
    assert [list(layout.shapes) for layout in optimizer._segments] == [list(get_trained(model))]
    compute_loss(model, MaskGenerator(MASKS)).backward()
    optimizer.begin_step()
    assert all(parameter.grad is not None for parameter in get_trained(model).values())


@pytest.mark.parametrize("size", [0, 1, 70_000, 20_000_000])
def test_the_norm_of_a_large_model_is_not_too_small(size):
    """Of 20 million elements PyTorch's own is off by 0.1 % on a CPU."""
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0))
    norm = measure_norm(gradient)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)
    assert measure_norm(gradient.bfloat16()).item() == pytest.approx(norm.item(), rel=4e-3)
