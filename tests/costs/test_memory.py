"""The counted memory is what autograd saves and what a training step allocates; advice about it holds."""

from dataclasses import replace

import pytest
import torch
from alike_processes import AlikeProcesses
from hypothesis import given, settings
from hypothesis import strategies as st
from live_memory import LiveBytes, SavedBytes
from quack_stand_in import QuackStandIn, install

from opensora_fast import STDiT2, STDiT2Config, use_kernels
from opensora_fast.benchmarks.providers.blocks import block_provider, make_block_work
from opensora_fast.benchmarks.providers.variants import VARIANT_OF
from opensora_fast.benchmarks.shapes import Pack, Workload
from opensora_fast.benchmarks.suites.scale import STORED_BYTES
from opensora_fast.costs.memory import FLOAT, LARGEST_BATCH, MemoryModel, ModelSize, usable_memory
from opensora_fast.costs.operations import VideoBatch, largest_share
from opensora_fast.diffusion import IDDPM
from opensora_fast.kernels.linear import LINEAR_BACKENDS
from opensora_fast.parallel import sequence
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.optimizer import gradients
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.master_adamw import MasterAdamW

XL = STDiT2Config.xl_2()
XL_SIZE = ModelSize(767_500_000, 767_500_000, 27_000_000)
TEXT = 20


@pytest.fixture(autouse=True)
def no_launch(monkeypatch) -> None:
    """Interpreted kernels return at once: what they allocate is looked at, not what they compute."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **keywords: None)


def measure_size(model: STDiT2) -> ModelSize:
    count = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(count, count, sum(parameter.numel() for parameter in model.blocks[0].parameters()))


class Step:
    """Forward and backward of videos of one shape with the Triton ops, and its count."""

    def __init__(
        self, config: STDiT2Config, dtype: torch.dtype, videos: tuple[int, int, int, int], device, linear="torch"
    ) -> None:
        torch.manual_seed(0)
        self.model = STDiT2(config).to(device, dtype).train()
        use_kernels(self.model, backend="triton")
        self.model.backends = replace(self.model.backends, linear=linear)
        batch, frames, rows, columns = videos
        self.videos = VideoBatch(batch, frames, rows * columns)
        self.count = MemoryModel(config, measure_size(self.model), TEXT, dtype.itemsize, linear=linear)
        self.inputs = {
            "x": torch.randn(batch, 4, frames, 2 * rows, 2 * columns, device=device),
            "timestep": torch.full((batch,), 500.0),
            "y": torch.randn(batch, 1, TEXT, config.caption_channels, device=device),
            **{name: torch.full((batch,), 64.0) for name in ("num_frames", "height", "width", "ar", "fps")},
        }

    def saved(self) -> int:
        saved = SavedBytes(self.model)
        with saved.watch():
            self.model(**self.inputs)
        return saved.bytes

    def peak(self, recomputed: int) -> int:
        """Allocated at most, inputs not included."""
        self.model.set_checkpointing(recomputed)
        live = LiveBytes()
        live.ignore(self.model)
        with live.watch():
            self.model(**self.inputs).square().mean().backward()
        return live.peak


@pytest.fixture
def linear(request, monkeypatch, device) -> str:
    """What multiplies; without a GPU a stand-in for quack."""
    if request.param == "quack" and device.type == "cuda":
        pytest.importorskip("quack")
    elif request.param == "quack":
        install(monkeypatch, QuackStandIn())
    return request.param


@pytest.mark.parametrize("linear", LINEAR_BACKENDS, indirect=True)
def test_blocks_of_the_real_width_save_what_is_counted(device, linear):
    """C = 1152, 16 heads; the difference of two depths is one block, counted to the byte."""
    configs = [STDiT2Config.xl_2(depth=depth, model_max_length=TEXT) for depth in (1, 2)]
    steps = [Step(config, torch.bfloat16, (2, 4, 6, 8), device, linear) for config in configs]
    one, two = (step.saved() for step in steps)
    count, videos = steps[0].count, steps[0].videos
    assert two - one == count.saved_by_block(videos)
    assert one == pytest.approx(count.saved_by_block(videos) + count.saved_outside(videos), rel=0.001)


def test_given_frames_add_their_modulation_and_a_row(device):
    step = Step(STDiT2Config.small(depth=2, model_max_length=TEXT), torch.float32, (4, 3, 12, 16), device)
    plain = step.saved()
    step.inputs["x_mask"] = torch.tensor([[False, True, True]] * 4)
    given = replace(step.count, given_frames=True)

    def total(count: MemoryModel) -> int:
        return 2 * count.saved_by_block(step.videos) + count.saved_outside(step.videos)

    assert total(given) - total(step.count) == pytest.approx(step.saved() - plain, rel=0.001)


def test_a_share_of_the_frames_keeps_what_is_counted(device, monkeypatch):
    """Within 1.5 %; what the processes would exchange is not looked at."""
    monkeypatch.setattr(sequence.dist, "all_to_all_single", lambda *arguments, **keywords: None)
    monkeypatch.setattr(sequence, "all_gather", lambda *arguments, **keywords: None)
    group = sequence.SequenceGroup.__new__(sequence.SequenceGroup)
    group.size, group.rank, group.group = 2, 1, None
    steps = []
    for depth in (1, 2):
        config = STDiT2Config.xl_2(depth=depth, model_max_length=TEXT)
        steps.append(Step(config, torch.bfloat16, (3, 5, 6, 8), device))
        steps[-1].model.share_frames(group)
    one, two = (step.saved() for step in steps)
    count = replace(steps[0].count, sharing=2)
    share = largest_share(steps[0].videos, 2)
    assert share.tokens == 8 * 48 and share.batch == 3  # at most: 8 of 15 frames may lie in 3 videos
    share = replace(share, batch=2)  # here they do not
    # It attends over time to half of all tokens: 7.5 frames.
    assert two - one == pytest.approx(count.saved_by_block(share), rel=0.015)
    many = VideoBatch(32, 16, 400)
    assert count.activations(many, 0) == pytest.approx(steps[0].count.activations(many, 0) / 2, rel=0.01)


def test_text_and_videos_without_frames_between_them_are_counted_too(device):
    """Many images with few tokens, where captions and conditions weigh as much as they can."""
    step = Step(STDiT2Config.small(depth=3, model_max_length=TEXT), torch.float32, (8, 1, 3, 5), device)
    expected = 3 * step.count.saved_by_block(step.videos) + step.count.saved_outside(step.videos)
    assert step.saved() == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("recomputed", [0, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "linear"),
    [(torch.bfloat16, "torch"), (torch.float32, "torch"), (torch.bfloat16, "quack")],
    indirect=["linear"],
)
def test_a_whole_step_allocates_what_is_counted(dtype, linear, recomputed, device):
    """Within 1 %, whatever the number of recomputed blocks; the loss is not in the count."""
    step = Step(STDiT2Config.small(depth=4, model_max_length=TEXT), dtype, (2, 16, 12, 16), device, linear)
    counted = step.count.activations(step.videos, recomputed) - step.count.inputs(step.videos)
    assert step.peak(recomputed) == pytest.approx(counted, rel=0.01)


def test_recomputed_blocks_of_many_small_videos_keep_their_modulation(device):
    """It and its gradients are held until backward is through the first block: here they are a tenth of all."""
    step = Step(STDiT2Config.small(depth=8, model_max_length=TEXT), torch.float32, (32, 3, 3, 5), device)
    step.inputs["x_mask"] = torch.tensor([[False, True, True]] * 32)
    count = replace(step.count, given_frames=True)
    counted = count.activations(step.videos, recomputed=8) - count.inputs(step.videos)
    assert step.peak(8) == pytest.approx(counted, rel=0.01)
    assert (8 + 7) * count.modulation(step.videos) > 0.1 * counted


@pytest.mark.parametrize(
    ("hidden", "videos", "recomputed", "dtype", "processes"),
    [
        (144, (2, 16, 12, 16), 0, torch.bfloat16, 1),
        (144, (2, 16, 12, 16), 4, torch.bfloat16, 1),
        (576, (1, 2, 4, 4), 0, torch.bfloat16, 1),
        (144, (2, 16, 12, 16), 4, torch.bfloat16, 4),
        (576, (1, 2, 4, 4), 0, torch.bfloat16, 4),
        (576, (1, 2, 4, 4), 0, torch.float32, 2),
    ],
    ids=["stored", "recomputed", "few tokens", "recomputed, 4 processes", "few tokens, 4 processes", "float32, 2"],
)
def test_a_step_of_the_trainer_allocates_what_is_counted(
    hidden, videos, recomputed, dtype, processes, device, monkeypatch
):
    """Loss, optimizer and average included, within 4 %; with few tokens the optimizer's gradients are the most."""
    monkeypatch.setattr(gradients, "SEGMENT", 1 << 16)
    config = STDiT2Config.small(depth=4, hidden_size=hidden, num_heads=hidden // 72, model_max_length=TEXT)
    batch, frames, rows, columns = videos
    live, diffusion = LiveBytes(), IDDPM()
    with live.watch():
        model = STDiT2(config).train()
        use_kernels(model, backend="triton")
        model.set_checkpointing(recomputed)
        optimizer = MasterAdamW(
            model,
            dtype=dtype,
            device=device,
            lr=1e-4,
            grad_clip=1.0,
            backend="triton",
            processes=Processes(device) if processes == 1 else AlikeProcesses(0, processes, device),
        )
        ema = EMA(optimizer, 0.9999)
        standing = live.peak = live.bytes

        def step() -> None:
            conditions = {name: torch.full((batch,), 64.0) for name in ("num_frames", "height", "width", "ar", "fps")}
            conditions |= {"y": torch.randn(batch, 1, TEXT, config.caption_channels, device=device), "mask": None}
            latents = torch.randn(batch, 4, frames, 2 * rows, 2 * columns, device=device)
            timesteps = torch.full((batch,), 500)
            diffusion.training_losses(model, latents, timesteps, conditions)["loss"].mean().backward()

        step()
        optimizer.begin_step()
        optimizer.step(ema)
    count = MemoryModel(config, measure_size(model), TEXT, dtype.itemsize, processes)
    assert standing == pytest.approx(count.standing, rel=0.01)
    counted = count.activations(VideoBatch(batch, frames, rows * columns), recomputed)
    assert live.peak - standing == pytest.approx(counted, rel=0.04)


def test_gradients_count_where_there_are_few_tokens(device):
    """All blocks recomputed, hardly a token: the gradients of the blocks behind are the most of it."""
    step = Step(STDiT2Config.small(depth=6, hidden_size=288, num_heads=4, model_max_length=TEXT), torch.float32,
                (1, 1, 2, 2), device)  # fmt: skip
    step.model.requires_grad_(False)
    for block in step.model.blocks:
        block.requires_grad_(True)
    gradients = FLOAT * 6 * step.count.size.trained_in_block
    assert gradients * 0.8 < step.peak(6) < step.count.activations(step.videos, 6)


def test_a_token_and_block_take_63_kib_in_bfloat16():
    """28 rows of 1152 elements and 280 bytes in float32, besides modulation (21 KB a video)."""
    model = MemoryModel(XL, XL_SIZE, text=0)
    videos = VideoBatch(1, 16, 3600)
    modulation = 9 * 1152 * 2
    assert model.saved_by_block(videos) == videos.tokens * (28 * 2304 + 280) + modulation


def test_what_stands_is_shared_among_processes_without_the_working_weights():
    alone = MemoryModel(XL, XL_SIZE, text=200)
    among = MemoryModel(XL, XL_SIZE, text=200, processes=64)
    assert alone.standing == 18 * XL_SIZE.parameters
    assert among.standing == 2 * XL_SIZE.parameters + 16 * XL_SIZE.parameters // 64
    assert MemoryModel(XL, XL_SIZE, text=200, element=4).standing == 16 * XL_SIZE.parameters
    assert MemoryModel(XL, XL_SIZE, text=200, element=4, processes=2).standing == 12 * XL_SIZE.parameters


SHAPES = st.builds(
    VideoBatch,
    batch=st.integers(1, 40),
    frames=st.integers(1, 128),
    frame_tokens=st.integers(20, 4000),
)


@settings(max_examples=200)
@given(SHAPES, st.integers(0, 28), st.integers(20, 200))
def test_the_largest_batch_fits_and_one_more_does_not(videos, recomputed, gib):
    model = MemoryModel(XL, XL_SIZE, text=200)
    memory = usable_memory(gib * 2**30)
    batch = model.largest_batch(videos, recomputed, memory)

    def peak(number: int) -> int:
        return model.peak(VideoBatch(number, videos.frames, videos.frame_tokens), recomputed)

    assert batch == 0 or peak(batch) <= memory
    assert batch == LARGEST_BATCH or peak(batch + 1) > memory
    assert model.largest_batch(videos, recomputed, peak(7)) >= 7  # to the last byte


@settings(max_examples=200)
@given(SHAPES, st.integers(20, 200))
def test_the_fewest_recomputed_blocks_fit_and_one_fewer_does_not(videos, gib):
    model = MemoryModel(XL, XL_SIZE, text=200)
    memory = usable_memory(gib * 2**30)
    number = model.fewest_recomputed(videos, memory)
    if number is None:
        assert model.peak(videos, 28) > memory
    else:
        assert model.peak(videos, number) <= memory
        assert number == 0 or model.peak(videos, number - 1) > memory


@given(SHAPES)
def test_recomputing_more_blocks_never_takes_more_memory(videos):
    model = MemoryModel(XL, XL_SIZE, text=200)
    peaks = [model.peak(videos, recomputed) for recomputed in range(29)]
    assert peaks == sorted(peaks, reverse=True)


def test_eager_stores_what_the_benchmarks_plan_steps_by():
    config = STDiT2Config(hidden_size=288, num_heads=4, depth=1)
    work = make_block_work(config, Pack.of(Workload("240p", 4, 1)), 20, "cpu", torch.bfloat16)
    saved = SavedBytes(work.block)
    with saved.watch():
        block_provider(VARIANT_OF["eager"]).prepare(work)()
    counted = STORED_BYTES["eager"] * config.hidden_size / XL.hidden_size
    assert 0.85 * counted < saved.bytes / work.layout.num_tokens < 1.15 * counted
