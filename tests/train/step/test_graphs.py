"""Replayed steps are the steps that they stand for: the same draws, losses and gradients.

On a CPU a recorder that runs the passes again stands in for a CUDA graph.
"""

import gc
import json
import math
import re
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from losses import read_losses
from run_again import RunAgain, record_on_meta
from same_checkpoints import assert_same_weights
from toy_steps import EPOCH, MASKS, SHAPES, make_batch, make_model, make_trainer

from opensora_fast.config import load_train_config
from opensora_fast.costs.memory import VideoBatch
from opensora_fast.cuda_graphs import CaptureError, CudaRecorder
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.diffusion import IDDPM, MaskGenerator, SpeeDiffusion
from opensora_fast.kernels import calls
from opensora_fast.train.checkpoints.checkpoint import list_checkpoints
from opensora_fast.train.checkpoints.state import resume
from opensora_fast.train.costs import RunCosts
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.locate_config import locate_config
from opensora_fast.train.monitoring.not_finite import NonFiniteError
from opensora_fast.train.step.graphs import MOST_SHAPES, StepGraphs
from opensora_fast.train.step.host_values import HostValues
from opensora_fast.train.step.losses import compute_losses, draw_inputs

ALL = 10**6
CPU = torch.device("cpu")
# With one graph at a time and a margin of 1 each shape takes the place of the one before at its last step in a row.
REPLACING_EACH_OTHER = (0, 1, 1, 2, 2, 2, 0, 0, 0)


def make_graphs(model, diffusion=None, tokens=ALL, record=None, **options):
    compute = partial(compute_losses, model, diffusion or IDDPM())
    return StepGraphs(model, compute, tokens, record=record or RunAgain(), **options)


def prepare(batch, device=CPU):
    return ModelInputs(None, None, device).prepare(batch)


def draw(model, number, shape, masks=None, diffusion=None, device=CPU, text_length=None):
    """Inputs of a step, drawn for its number."""
    batch = make_batch(number, shape, model.config, text_length)
    torch.manual_seed(number)
    return draw_inputs(model, diffusion or IDDPM(), masks, *prepare(batch, device))


def take_gradients(model):
    """As the optimizer: reads and clears them."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad.clone()
            parameter.grad = None
    return gradients


def step_in_one_go(model, diffusion, masks, batch):
    """A step that draws while it computes, as `training_losses` and the model do on their own."""
    latents, conditions = prepare(batch)
    mask = torch.stack([masks.draw(latents.shape[2]) for _ in range(len(batch))])
    if mask.all():
        mask = None
    else:
        conditions["x_mask"] = mask
    timesteps = None if isinstance(diffusion, SpeeDiffusion) else diffusion.draw_timesteps(len(batch))
    losses = diffusion.training_losses(model, latents, timesteps, conditions, mask=mask)
    losses["loss"].mean().backward()
    return {name: loss.mean().item() for name, loss in losses.items()}, take_gradients(model)


@pytest.mark.parametrize("tokens", [ALL, 0], ids=["replayed", "as they come"])
def test_gradients_take_the_place_of_those_before(tokens):
    model = make_model()
    graphs = make_graphs(model, tokens=tokens, occurrences=1)
    inputs = draw(model, 0, EPOCH[0])
    found = []
    for _ in range(2):
        graphs.backward(graphs.compute_losses(inputs))
        found.append({name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad})
    assert graphs.replayed == (2 if tokens else 0)
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


@pytest.mark.parametrize(
    ("dtype", "kind", "recomputed"),
    [
        (torch.float32, IDDPM, 0),
        (torch.float32, IDDPM, 1),
        (torch.float32, SpeeDiffusion, 2),
        (torch.bfloat16, IDDPM, 0),
    ],
)
def test_replayed_steps_draw_and_compute_the_same_as_steps_in_one_go(dtype, kind, recomputed):
    model, diffusion, masks = make_model().to(dtype), kind(), MaskGenerator(MASKS)
    model.set_checkpointing(recomputed)
    graphs = make_graphs(model, diffusion)
    for number, shape in enumerate(EPOCH * 2):
        batch = make_batch(number, shape, model.config)
        torch.manual_seed(number)
        expected, gradients = step_in_one_go(model, diffusion, masks, batch)
        after = torch.rand(())
        torch.manual_seed(number)
        losses = graphs.compute_losses(draw_inputs(model, diffusion, masks, *prepare(batch)))
        values = HostValues(*losses.values())
        graphs.backward(losses)
        assert torch.equal(torch.rand(()), after)  # as many draws
        assert dict(zip(losses, values.get(), strict=True)) == expected
        found = take_gradients(model)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    # With and without given frames each shape of several frames has a graph of its own.
    assert len(SHAPES) <= graphs.captured <= 2 * len(SHAPES) - 1
    assert graphs.steps == len(EPOCH) * 2 and graphs.replayed >= graphs.captured + 8


@pytest.mark.parametrize("kind", [IDDPM, SpeeDiffusion])
@pytest.mark.parametrize(("dtype", "recomputed", "given"), [(torch.float32, 0, True), (torch.bfloat16, 1, False)])
def test_what_is_recorded_needs_nothing_of_the_host(kind, dtype, recomputed, given, monkeypatch):
    model, diffusion = make_model().to(dtype), kind()
    model.set_checkpointing(recomputed)
    masks = MaskGenerator({"mask_image_head": 1.0}) if given else None
    inputs = draw(model, 0, (2, 3, 4, 4), masks, diffusion)
    record = record_on_meta(monkeypatch, model, inputs["latents"])
    graphs = make_graphs(model, diffusion, record=record, occurrences=1)
    losses = graphs.compute_losses(inputs)
    graphs.backward(losses)
    assert graphs.captured == 1 and losses["loss"].is_meta and ("x_mask" in inputs) == given


def test_a_graph_is_for_steps_whose_inputs_have_the_same_shapes():
    model = make_model(class_dropout_prob=0.0)
    graphs = make_graphs(model, occurrences=1)
    plain = MaskGenerator({"mask_no": 1.0})
    given = MaskGenerator({"mask_image_head": 1.0})

    def take(*arguments, **options):
        inputs = draw(model, 0, *arguments, **options)
        graphs.backward(graphs.compute_losses(inputs))
        return graphs.captured

    assert take((2, 3, 4, 4), plain) == take((2, 3, 4, 4), plain) == 1
    assert take((2, 3, 4, 6), plain) == 2  # width
    assert take((2, 2, 4, 4), plain) == 3  # frames
    assert take((1, 3, 4, 4), plain) == 4  # videos
    assert take((2, 3, 4, 4), given) == 5  # given frames
    assert take((2, 3, 4, 4), plain, text_length=5) == 6
    inputs = draw(model, 0, (2, 3, 4, 4), plain)
    graphs.backward(graphs.compute_losses(inputs | {"y": inputs["y"].double()}))
    assert graphs.captured == 7
    assert take((2, 3, 4, 4), given) == take((2, 3, 4, 4), plain) == 7
    assert graphs.replayed == graphs.steps


def test_a_shape_is_captured_when_it_comes_again_and_takes_the_place_of_one_that_came_clearly_less():
    model = make_model()
    graphs = make_graphs(model, most=2, margin=2)
    told = []
    for index in (0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 0):
        graphs.backward(graphs.compute_losses(draw(model, 0, SHAPES[index])))
        told.append((graphs.captured, graphs.replayed))
    assert told == [
        (0, 0),  # 0, for the first time
        (1, 1),
        (1, 2),
        (1, 2),  # 1, for the first time
        (2, 3),
        (2, 3),  # 2, for the first time
        (2, 3),
        (2, 3),  # 2, as often as 0 and once more than 1
        (3, 4),  # 2 takes the place of 1
        (3, 4),  # 1 came as often as 0 by now
        (3, 5),
    ]
    assert graphs.describe() == "CUDA graphs: 3 captured, 5 of 11 steps replayed"


def test_the_first_steps_of_a_shape_read_what_lies_in_memory_as_its_graph_reads_it():
    """The order of a sum may depend on strides."""
    model = make_model()
    strides = []

    def compute(inputs):
        strides.append([value.stride() for value in inputs.values()])
        return compute_losses(model, IDDPM(), inputs)

    graphs = StepGraphs(model, compute, ALL, record=RunAgain())
    inputs = draw(model, 0, SHAPES[0])
    inputs["y"] = inputs["y"].mT.contiguous().mT
    for _ in range(3):
        graphs.backward(graphs.compute_losses(inputs))
    assert graphs.replayed == 2 and all(read == strides[0] for read in strides)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "y_embedder.y_embedding"])
def test_weights_that_have_moved_since_the_first_capture_are_refused(name):
    """A graph reads the memory that the weights lay in."""
    model = make_model()
    graphs = make_graphs(model)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    moved = weights[name]
    moved.data = moved.data.clone()  # nothing is captured yet
    for _ in range(3):
        graphs.backward(graphs.compute_losses(draw(model, 0, SHAPES[0])))
    assert graphs.replayed == 2
    moved.data = moved.data.clone()
    with pytest.raises(RuntimeError, match=f"{re.escape(name)} has moved in memory"):
        graphs.compute_losses(draw(model, 0, SHAPES[0]))
    with pytest.raises(RuntimeError, match=f"{re.escape(name)} has moved in memory"):
        for _ in range(2):  # also where another shape is captured
            graphs.compute_losses(draw(model, 0, SHAPES[1]))


def test_steps_of_more_tokens_are_not_replayed():
    model = make_model()
    graphs = make_graphs(model, tokens=2 * 3 * 4, occurrences=1)  # latents of 4 x 4 in patches of 2 x 2, 3 frames
    for shape, replayed in (((2, 3, 4, 4), 1), ((2, 3, 4, 6), 1), ((2, 3, 3, 3), 2), ((2, 4, 4, 4), 2)):
        inputs = draw(model, 1, shape)
        expected = compute_losses(model, IDDPM(), inputs)["loss"]
        losses = graphs.compute_losses(inputs)
        graphs.backward(losses)
        assert torch.equal(losses["loss"].detach(), expected.detach()) and graphs.replayed == replayed
        assert take_gradients(model)


def test_gradients_of_all_graphs_are_the_same_tensors_and_are_put_back_after_each_replay():
    model = make_model()
    graphs = make_graphs(model, occurrences=1)
    places = []
    for index in (0, 1, 0):
        graphs.backward(graphs.compute_losses(draw(model, index, SHAPES[index])))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        places.append([parameter.grad.data_ptr() for parameter in trained])
        model.zero_grad(set_to_none=True)
    assert places[0] == places[1] == places[2]


def test_losses_that_are_on_their_way_to_the_host_are_not_those_of_the_next_step():
    model = make_model()
    graphs = make_graphs(model, occurrences=1)
    losses = graphs.compute_losses(draw(model, 1, SHAPES[0]))
    first = losses["loss"].item()
    values = HostValues(losses["loss"])
    graphs.compute_losses(draw(model, 2, SHAPES[0]))
    assert values.get() == [first] and losses["loss"].item() != first


def test_captures_share_a_pool_and_count_no_ops_but_replays_do(monkeypatch):
    """What is said to CUDA, and counted, where the captured passes run on a CPU."""
    told = []

    class Graph:
        def replay(self):
            told.append(self)

    @contextmanager
    def capture(graph, **options):
        told.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    model = make_model()
    model.set_checkpointing(1)  # so that backward calls ops too
    record, recordings, counts = CudaRecorder(), [], []
    for index in (0, 1):
        inputs = draw(model, 0, SHAPES[index])
        before = calls.copy()
        recordings.append(
            record(
                lambda inputs=inputs: compute_losses(model, IDDPM(), inputs), lambda losses: losses["loss"].backward()
            )
        )
        counts.append(calls - before)  # those of the step before the capture
    assert [options["capture_error_mode"] for options in told] == ["thread_local"] * 4
    assert len({id(options["pool"]) for options in told}) == 1
    told.clear()
    for recording, count in zip(recordings, counts, strict=True):
        assert count["spatial_attention", "reference"] == 3
        assert all(not loss.requires_grad for loss in recording.outputs.values())
        before = calls.copy()
        recording.replay_forward()
        assert (calls - before)["spatial_attention", "reference"] == 2
        recording.replay_backward()
        assert calls - before == count
    assert len({id(graph) for graph in told}) == 4


def test_the_pool_outlives_the_shapes_that_are_forgotten(monkeypatch):
    """CUDA graphs can share a pool only as long as one that was captured into it is there: torch asserts it."""
    captured = weakref.WeakSet()

    class Graph:
        def replay(self):
            pass

    @contextmanager
    def capture(graph, **options):
        assert captured or not record.began, "internal assert of torch: use_count > 0"
        captured.add(graph)
        record.began = True
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    model, record = make_model(), CudaRecorder()
    record.began = False
    graphs = make_graphs(model, record=record, occurrences=1, most=1, margin=1)
    for index in REPLACING_EACH_OTHER:
        graphs.backward(graphs.compute_losses(draw(model, index, SHAPES[index])))
    gc.collect()
    assert graphs.captured == 4 and len(captured) == 2


def test_where_the_first_capture_fails_the_next_has_another_pool(monkeypatch):
    """As then no graph keeps the pool of the first. Later ones do."""
    pools = []

    @contextmanager
    def capture(graph, pool, **options):
        pools.append(pool)
        yield
        if len(pools) in (1, 3):
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: object())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    record = CudaRecorder()
    for fails in (True, False, True, False):
        with pytest.raises(CaptureError, match="out of memory") if fails else nullcontext():
            record(lambda: {"output": torch.zeros(1)})
    assert pools[0] is not pools[1] and pools[1] is pools[2] is pools[3]


@pytest.mark.parametrize("options", [{"occurrences": 0}, {"most": 0}, {"margin": 0}])
def test_senseless_numbers_are_refused(options):
    with pytest.raises(ValueError, match="all must be at least 1"):
        make_graphs(make_model(), **options)


def test_without_a_gpu_nothing_is_replayed_in_silence(train, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="cuda_graph_tokens=9: only a GPU"):
        StepGraphs(model, partial(compute_losses, model, IDDPM()), 9)
    message = r"cuda_graph_tokens=99: only a GPU .* the device is cpu; set cuda_graph_tokens=0"
    for more in ([], ["--dry-run"]):
        code, _, error = train(tmp_path / "run", "--steps", 1, "cuda_graph_tokens=99", *more)
        assert code == 1 and re.search(message, error) and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    code, _, error = train(tmp_path / "run", "--steps", 1, "cuda_graph_tokens=-1")
    assert code == 1 and "cuda_graph_tokens" in error and "greater than or equal to 0" in error


# ---- whole runs ----


def run(out, steps, **options):
    """Train to that step, from the newest checkpoint of the folder if there is one."""
    trainer = make_trainer(out, steps, **options)
    if checkpoints := list_checkpoints(out / "checkpoints"):
        resume(trainer, checkpoints[0])
    trainer.run()
    return trainer


def last(out):
    return list_checkpoints(out / "checkpoints")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_with_replayed_steps_is_the_run_without(tmp_path, dtype):
    run(tmp_path / "plain", 24, dtype=dtype)
    trainer = run(tmp_path / "replayed", 24, dtype=dtype, tokens=ALL, record=RunAgain())
    assert trainer.graphs.replayed > 12
    assert read_losses(tmp_path / "replayed") == read_losses(tmp_path / "plain")
    assert_same_weights(last(tmp_path / "replayed"), last(tmp_path / "plain"))


def test_a_run_with_replayed_steps_resumes_bit_for_bit(tmp_path):
    """The first steps after a resume are captured anew, so other steps are replayed than without a stop."""
    run(tmp_path / "whole", 20, tokens=ALL, record=RunAgain())
    for steps in (0, 1, 9, 10, 17, 20):
        run(tmp_path / "run", steps, tokens=ALL, record=RunAgain())
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert_same_weights(last(tmp_path / "run"), last(tmp_path / "whole"))


def assert_a_bad_loss_changes_nothing(tmp_path, **options):
    """Of a batch whose shape is replayed by then."""
    out = tmp_path / "run"
    assert EPOCH[6] in EPOCH[:6]
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is (nan|inf)"):
        run(out, 9, spoil=6, tokens=ALL, **options)
    assert json.loads((out / "nonfinite.json").read_text())["step"] == 7
    assert last(out).name == "step-00000006" and len(read_losses(out)) == 6
    run(tmp_path / "whole", 9, tokens=ALL, **options)
    run(out, 9, tokens=ALL, **options)
    assert read_losses(out) == read_losses(tmp_path / "whole")
    assert_same_weights(last(out), last(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    assert_a_bad_loss_changes_nothing(tmp_path, record=RunAgain())


# ---- memory ----


def test_the_pool_of_the_largest_replayed_step_is_counted_beside_every_step():
    def count(*overrides):
        config = load_train_config(locate_config("stage1"), list(overrides)).config
        return RunCosts(config, Bucket(config.bucket_config)).get_memory_model(1)

    videos = VideoBatch(2, 16, 405)
    plain = count()
    assert plain.graphs(0) == 0 and count("cuda_graph_tokens=100").graphs(0) == 0
    small, large = count("cuda_graph_tokens=8000"), count("cuda_graph_tokens=100000")
    assert small.graphed.tokens <= 8000 < large.graphed.tokens
    for model in (small, large):
        for recomputed in (0, 28):
            graphs = model.graphs(recomputed)
            held = plain.activations(model.graphed, recomputed) + 2 * plain.size.trained
            assert graphs == held + model.graphed_inputs
            assert model.peak(videos, recomputed) == plain.peak(videos, recomputed) + graphs
    assert large.graphs(28) < large.graphs(0) and small.graphs(0) < large.graphs(0)


@pytest.mark.parametrize(
    ("buckets", "overrides", "graphs_of_a_ratio"),
    [
        ({1: (1.0, 4)}, [], 1),
        ({16: (1.0, 4)}, [], 2),  # a shape with given frames has a graph of its own
        ({16: (1.0, 4)}, ["mask_ratios=None"], 1),
        ({1: (1.0, 4), 16: (1.0, 4), 32: (1.0, 4), 48: (1.0, 4)}, [], 7),
        ({1: (1.0, 4), 16: (0.0, None)}, [], 1),
    ],
)
def test_the_inputs_of_every_graph_are_counted(buckets, overrides, graphs_of_a_ratio):
    """Each graph reads its own copy of latents and text."""
    words = ["bucket_config=" + repr({"144p": buckets}), "cuda_graph_tokens=100000", *overrides]
    config = load_train_config(locate_config("stage1"), words).config
    costs = RunCosts(config, Bucket(config.bucket_config))
    model = costs.get_memory_model(1)
    ratios = len({ratio for _, _, ratio in costs.bucket.ids})
    copies = min(graphs_of_a_ratio * ratios, MOST_SHAPES)
    latents = [4 * 4 * costs.get_videos(bucket_id).tokens for bucket_id in costs.bucket.ids]
    text = 4 * 200 * 4096
    assert 4 * copies * text < model.graphed_inputs <= 4 * copies * (text + max(latents))
    assert model.graphs(0) - replace(model, graphed_inputs=0).graphs(0) == model.graphed_inputs


# ---- on a GPU ----


def take_step(graphs, inputs):
    """(losses, gradients) of a step, copied."""
    losses = graphs.compute_losses(inputs)
    values = HostValues(*losses.values())
    graphs.backward(losses)
    return dict(zip(losses, values.get(), strict=True)), take_gradients(graphs.model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("kind", [IDDPM, SpeeDiffusion])
def test_graphs_that_share_a_pool_replay_the_steps_bit_for_bit(dtype, recomputed, kind):
    device = torch.device("cuda")
    model, diffusion, masks = make_model(device).to(dtype), kind(), MaskGenerator(MASKS)
    model.set_checkpointing(recomputed)
    compute = partial(compute_losses, model, diffusion)
    replayed, eager = StepGraphs(model, compute, ALL), StepGraphs(model, compute, ALL, occurrences=ALL)
    for number, shape in enumerate(EPOCH * 3):
        inputs = draw(model, number, shape, masks, diffusion, device)
        expected, gradients = take_step(eager, inputs)
        before = calls.copy()
        losses, found = take_step(replayed, inputs)
        assert sum((calls - before).values()) > 0  # ops of a replay count as called
        assert losses == expected and all(map(math.isfinite, losses.values())), number
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), (number, name)
    assert replayed.replayed >= 2 * len(EPOCH) - 5 and eager.replayed == 0


@pytest.mark.gpu
def test_on_a_gpu_a_shape_is_captured_after_all_others_were_forgotten():
    device = torch.device("cuda")
    model = make_model(device)
    graphs = StepGraphs(model, partial(compute_losses, model, IDDPM()), ALL, occurrences=1, most=1, margin=1)
    for index in REPLACING_EACH_OTHER:
        losses, _ = take_step(graphs, draw(model, index, SHAPES[index], device=device))
        assert all(map(math.isfinite, losses.values()))
    assert graphs.captured == 4


@pytest.mark.gpu
def test_a_replayed_step_with_padded_text_is_the_ordinary_one_but_for_rounding():
    device = torch.device("cuda")
    model, diffusion = make_model(device), IDDPM()
    graphs = StepGraphs(model, partial(compute_losses, model, diffusion), ALL, occurrences=1)
    for number, shape in enumerate(EPOCH):
        inputs = draw(model, number, shape, MaskGenerator(MASKS), device=device)
        ordinary = compute_losses(model, diffusion, inputs)
        ordinary["loss"].backward()
        expected, gradients = {name: loss.item() for name, loss in ordinary.items()}, take_gradients(model)
        del ordinary  # and with it the history, see `CudaRecorder`
        losses, found = take_step(graphs, inputs)
        for name, loss in losses.items():
            assert loss == pytest.approx(expected[name], rel=1e-4)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        far = torch.stack([(found[name] - gradient).norm() for name, gradient in gradients.items()]).norm()
        assert far < 1e-3 * norm


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_replayed_without_waiting_for_it():
    device = torch.device("cuda")
    model = make_model(device)
    graphs = StepGraphs(model, partial(compute_losses, model, IDDPM()), ALL, occurrences=1)
    pinned = {name: value.pin_memory() for name, value in draw(model, 0, SHAPES[1]).items()}
    inputs = pinned | {name: pinned[name].to(device) for name in ("latents", "noise", "y")}
    take_step(graphs, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphs.backward(graphs.compute_losses(inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_run_with_graphs_resumes_bit_for_bit(tmp_path, dtype):
    options = {"device": "cuda", "dtype": dtype, "tokens": ALL}
    trainer = run(tmp_path / "whole", 20, **options)
    assert trainer.graphs.replayed > 8
    for steps in (0, 1, 9, 10, 17, 20):
        run(tmp_path / "run", steps, **options)
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert_same_weights(last(tmp_path / "run"), last(tmp_path / "whole"))


@pytest.mark.gpu
def test_on_a_gpu_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    assert_a_bad_loss_changes_nothing(tmp_path, device="cuda", dtype=torch.bfloat16)
