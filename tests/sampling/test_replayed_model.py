"""Sampling by replaying the model's calls: the same videos. On a CPU, running again stands in for a CUDA graph."""

import copy

import pytest
import torch
from run_again import RunAgain, record_on_meta

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.config import SampleConfig
from opensora_fast.cuda_graphs import CudaRecorder
from opensora_fast.data.video_files import save_image
from opensora_fast.diffusion import IDDPM
from opensora_fast.kernels import PackLayout, calls
from opensora_fast.model.backends import Backends
from opensora_fast.sampling import SampleSettings, VideoGenerator
from opensora_fast.sampling.replayed_model import ReplayedModel
from opensora_fast.sampling.run import run_sampling

from .toys import PixelEncoder, color_clip

ALL = 10**6


class Captions:
    """Captions of as many tokens as they have letters, padded to six."""

    output_dim, model_max_length = 8, 6

    def encode(self, texts):
        embedded = torch.stack([torch.linspace(-1, 1, 48).roll(sum(map(ord, text))).view(1, 6, 8) for text in texts])
        return {"y": embedded, "mask": torch.tensor([[number < len(text) for number in range(6)] for text in texts])}


def make_model():
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config.small(caption_channels=8, model_max_length=6, depth=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture
def model():
    return make_model()


def make_generator(model, replayed=None, **settings):
    settings = SampleSettings(**({"num_frames": 4, "image_size": (32, 48), "condition_frame_length": 2} | settings))
    return VideoGenerator(model, PixelEncoder(), Captions(), IDDPM(num_sampling_steps=4), settings, replayed)


def make_arguments(model, shape=(2, 4, 3, 4, 6), **changed):
    generator = torch.Generator().manual_seed(1)
    sizes = {name: torch.full((shape[0],), 32.0) for name in ("num_frames", "height", "width", "ar", "fps")}
    given = {"x": torch.randn(shape, generator=generator), "timestep": torch.full((shape[0],), 500)}
    y = torch.randn(shape[0], 1, 6, 8, generator=generator)
    return given | {"y": y, "mask": torch.arange(6).repeat(shape[0], 1) < 4} | sizes | changed


def test_replayed_calls_give_the_same_videos(model, tmp_path):
    """With a reference, captions of several lengths, a batch that is not full, and a loop that goes on from frames."""
    save_image(tmp_path / "image.png", color_clip(0.5, height=32, width=48)[:, 0])
    prompts, settings = ["cat", "a bird", "dog"], {"batch_size": 2, "loop": 2, "progress": False}
    references = [[None, str(tmp_path / "image.png"), None], [None, "0", None]]
    expected = make_generator(model).generate(prompts, *references, **settings)
    replayed = ReplayedModel(model, ALL, RunAgain())
    samples = make_generator(model, replayed).generate(prompts, *references, **settings)
    assert (replayed.captured, replayed.replayed) == (2, 2 * 2 * 4)  # two shapes; batches, loops and steps
    for sample, wanted in zip(samples, expected, strict=True):
        assert sample.video.std() > 0.05
        torch.testing.assert_close(sample.video, wanted.video, rtol=0, atol=1e-5)


def test_a_graph_serves_calls_of_the_same_shapes_on_the_same_weights(model):
    replayed = ReplayedModel(model, ALL, RunAgain())

    def captures(arguments):
        before = replayed.captured
        torch.testing.assert_close(replayed(**arguments), model(**arguments), rtol=1e-5, atol=1e-6)
        return replayed.captured - before

    first = make_arguments(model)
    assert captures(first) == 1
    assert captures(first | {"x": -first["x"], "timestep": torch.tensor([3, 900])}) == 0
    given = torch.tensor([[True, True, False], [True, False, True]])
    assert captures(first | {"x_mask": given}) == 1
    assert captures(first | {"x_mask": ~given, "mask": first["mask"].roll(1, 1)}) == 0
    assert captures(first) == 1  # one at a time
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 1
    with torch.no_grad():
        model.final_layer.linear.bias += 1  # in place: replays read it
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 0
    model.x_embedder.proj.weight.data = model.x_embedder.proj.weight + 1
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 1
    model.backends = Backends.all("reference")
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 1
    zeros = model.rope.freqs.data.zero_()
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 0
    model.rope.freqs.data = zeros.view(torch.float16)[: len(zeros)]  # of another dtype, at the same place
    assert captures(make_arguments(model, (2, 4, 3, 6, 6))) == 1


def test_what_is_replaced_or_added_in_the_model_is_noticed(model):
    replayed, arguments = ReplayedModel(model, ALL, RunAgain()), make_arguments(model)

    def captures():
        before = replayed.captured
        torch.testing.assert_close(replayed(**arguments), replayed.model(**arguments), rtol=1e-5, atol=1e-6)
        return replayed.captured - before

    assert captures() == 1 and captures() == 0
    model.final_layer.linear.bias = torch.nn.Parameter(model.final_layer.linear.bias + 1)
    assert captures() == 1
    model.y_embedder.y_embedding = model.y_embedder.y_embedding.clone()
    assert captures() == 1
    model.blocks[1].mlp = copy.deepcopy(model.blocks[1].mlp)
    model.blocks[1].mlp.fc1.weight.data.mul_(2)
    assert captures() == 1 and captures() == 0
    model.blocks[1].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight * 2
    assert captures() == 1
    torch.nn.utils.parametrize.register_parametrization(model.blocks[0].mlp.fc2, "weight", torch.nn.ReLU())
    assert captures() == 1
    hook = model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Linear has a hook"):
        replayed(**arguments)
    hook.remove()
    assert captures() == 0
    replayed.model = make_model()
    assert captures() == 1 and captures() == 0


def test_calls_without_a_mask_have_one_that_a_graph_can_read(model):
    replayed = ReplayedModel(model, ALL, RunAgain())
    arguments = make_arguments(model, mask=torch.ones(2, 6, dtype=torch.bool))
    expected = replayed(**arguments)
    torch.testing.assert_close(replayed(**arguments | {"mask": None}), expected, rtol=0, atol=0)
    assert replayed.captured == 1  # so the mask is among the inputs
    torch.testing.assert_close(model(**arguments | {"mask": None}), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mask": None},
        {"mask": torch.ones(1, 6, dtype=torch.int64)},  # of the prompt alone
        {"x_mask": torch.ones(2, 3, dtype=torch.bool)},
        {"timestep": torch.tensor([999.0, 3.5]), "height": torch.tensor([32.0]), "fps": torch.tensor([24.0]).double()},
        {"dropped": torch.tensor([True, False])},
    ],
    ids=["plain", "no mask", "mask", "x_mask", "conditions", "dropped"],
)
@pytest.mark.parametrize("rounding", [False, True])
def test_what_is_recorded_needs_nothing_of_the_host(rounding, changed, monkeypatch):
    config = STDiT2Config.small(caption_channels=8, model_max_length=6, depth=2, upstream_rounding=rounding)
    model = STDiT2(config).to(torch.bfloat16).eval()
    arguments = make_arguments(model, **changed)
    replayed = ReplayedModel(model, ALL, record_on_meta(monkeypatch, model, arguments["x"]))
    output = replayed(**arguments)
    assert replayed.captured == 1 and output.is_meta and output.shape == (2, 8, 3, 4, 6)


def test_a_graph_of_inference_mode_serves_calls_outside(model):
    replayed = ReplayedModel(model, ALL, RunAgain())
    with torch.inference_mode():
        first = replayed(**make_arguments(model))
    assert torch.equal(replayed(**make_arguments(model)), first)
    assert (replayed.captured, replayed.replayed) == (1, 2)


def test_calls_that_a_graph_would_compute_otherwise_are_refused(model):
    replayed = ReplayedModel(model, ALL, RunAgain())
    replayed(**make_arguments(model))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="torch.autocast is on: .* cast itself"):
        replayed(**make_arguments(model))
    for module in (model, model.blocks[1], model.blocks[1].attn.qkv, model.t_embedder):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=f"{type(module).__name__} has a hook, and a replayed CUDA graph calls no"):
            replayed(**make_arguments(model))
        hook.remove()
    generator = make_generator(model, replayed)
    generator.model = make_model()
    with pytest.raises(ValueError, match="those of another model than this generator's: set `replayed`"):
        generator.generate("cat", progress=False)
    model.train()
    with pytest.raises(ValueError, match="in training mode, and a CUDA graph drops no captions"):
        replayed(**make_arguments(model))


def test_graphs_of_what_runs_elsewhere_are_refused(model, monkeypatch):
    replayed = ReplayedModel(model, ALL, CudaRecorder())
    with pytest.raises(ValueError, match="only a GPU replays CUDA graphs, and the device is cpu"):
        replayed(**make_arguments(model))
    monkeypatch.setattr(STDiT2, "device", torch.device("cuda:1"))
    monkeypatch.setattr(STDiT2, "get_layout", lambda self, batches: PackLayout.of([(1, 2, 2)], "cpu"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"on cuda:1, and .* current GPU, cuda:0: call torch.cuda.set_device\(1\)"):
        replayed(**make_arguments(model))


def test_what_a_call_returned_stays_as_it_is_when_the_next_is_replayed(model):
    replayed = ReplayedModel(model, ALL, RunAgain())
    arguments = make_arguments(model)
    first = replayed(**arguments)
    kept = first.clone()
    assert not torch.equal(replayed(**arguments | {"x": -arguments["x"]}), kept)
    assert torch.equal(first, kept)


def test_calls_of_more_tokens_are_computed_as_they_come(model):
    arguments = make_arguments(model)  # 2 videos of 3 frames of 2 x 3 tokens
    for limit, replays in ((35, 0), (36, 1)):
        replayed = ReplayedModel(model, limit, RunAgain())
        before = calls.copy()
        assert torch.isfinite(replayed(**arguments)).all()
        assert (replayed.captured, replayed.replayed) == (replays, replays) and calls != before


def test_graphs_without_a_gpu_are_refused(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cuda_graph_tokens=64: only a GPU replays CUDA graphs, and the device is cpu"):
        ReplayedModel(model, 64)
    config = SampleConfig(
        image_size=(32, 48), prompt=["cat"], save_dir=str(tmp_path / "samples"), cuda_graph_tokens=64, dtype="fp32"
    )
    with pytest.raises(ValueError, match="cuda_graph_tokens=64: only a GPU"):
        list(run_sampling(config, "cpu"))
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="cuda_graph_tokens=64 and 2 processes: .* use one of them"):
        list(run_sampling(config, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_same_results(model, dtype):
    model.to("cuda", dtype)
    replayed = ReplayedModel(model, ALL)
    for shape in ((2, 4, 3, 4, 6), (2, 4, 3, 6, 6), (2, 4, 1, 8, 8)):
        for number in range(3):
            arguments = make_arguments(model, shape)
            arguments["x"] = (arguments["x"] * (number + 1)).cuda()
            if number == 0:
                arguments["mask"] = None  # captured, too
            if number == 2:
                arguments["x_mask"] = torch.ones(2, shape[2], dtype=torch.bool, device="cuda")
                arguments["x_mask"][0, 0] = False
            with torch.no_grad():
                expected = model(**arguments)
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(replayed(**arguments), expected, rtol=tolerance, atol=tolerance)
    assert replayed.captured == 6 and replayed.replayed == 9
