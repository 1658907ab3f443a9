"""`VideoGenerator`: prompts and references in, videos out."""

import pytest
import torch

from opensora_fast.data.video_files import read_reference, save_image, save_video
from opensora_fast.diffusion import IDDPM
from opensora_fast.sampling import SampleSettings, VideoGenerator
from opensora_fast.sampling.generate import make_conditions

from .toys import LetterEncoder, PixelEncoder, RecordingScheduler, ToyModel, color_clip

SETTINGS = SampleSettings(num_frames=6, image_size=(16, 24), fps=24, frame_interval=3)


def make_generator(scheduler=None, **settings):
    scheduler = scheduler or IDDPM(num_sampling_steps=3)
    chosen = SampleSettings(**(vars(SETTINGS) | settings))
    return VideoGenerator(ToyModel(), PixelEncoder(), LetterEncoder(), scheduler, chosen)


def generate(prompts, *references, scheduler=None, **settings):
    return make_generator(scheduler).generate(prompts, *references, progress=False, **settings)


@pytest.fixture
def image(tmp_path):
    save_image(tmp_path / "image.png", color_clip(0.5)[:, 0])
    return str(tmp_path / "image.png")


@pytest.fixture
def video(tmp_path):
    """Ten gray frames, from -0.8 to 0.8."""
    save_video(tmp_path / "video.mp4", color_clip(*torch.linspace(-0.8, 0.8, 10).tolist()), 8)
    return str(tmp_path / "video.mp4")


def test_a_prompt_gives_a_video():
    [sample] = generate("a cat")
    assert sample.video.shape == (3, 6, 16, 24) and sample.video.dtype == torch.float32
    assert sample.video.abs().max() <= 1 and sample.video.std() > 0.1
    assert (sample.prompt, sample.index, sample.copy, sample.fps) == ("a cat", 0, 0, 8)


def test_equal_seeds_give_equal_videos_and_other_seeds_others():
    first, again, other = (generate("a cat", seed=seed)[0].video for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_sample_and_the_references_of_every_prompt_draw_their_own_numbers(image, monkeypatch):
    seeds, encode = [], PixelEncoder.encode

    def note_seed(self, video, generator):
        seeds.append(generator.initial_seed())
        return encode(self, video)

    monkeypatch.setattr(PixelEncoder, "encode", note_seed)
    for seed in (1, 2):
        scheduler = RecordingScheduler()
        generate(["a", "b"], [image, image], ["0", "0"], scheduler=scheduler, num_sample=2, seed=seed)
        seeds += [seed for call in scheduler.calls for seed in call["seeds"]]
    assert len(seeds) == 2 * (2 + 4) == len(set(seeds))


def test_a_video_does_not_depend_on_the_batch_it_is_sampled_in():
    prompts = ["a cat", "a dog", "a bird"]
    alone, together = (generate(prompts, num_sample=2, batch_size=size) for size in (1, 3))
    assert [(sample.index, sample.copy) for sample in alone] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(sample.index, sample.copy) for sample in together] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    by_number = {(sample.index, sample.copy): sample.video for sample in together}
    for sample in alone:
        torch.testing.assert_close(sample.video, by_number[sample.index, sample.copy], rtol=0, atol=1e-5)
    assert not torch.equal(by_number[0, 0], by_number[0, 1])


def test_an_image_becomes_the_first_frame(image):
    scheduler = RecordingScheduler()
    [sample] = generate("a cat", [image], ["0"], scheduler=scheduler)
    [call] = scheduler.calls
    assert call["mask"].tolist() == [[0, 1, 1, 1, 1, 1]]
    expected = read_reference(image, (16, 24))
    torch.testing.assert_close(sample.video[:, :1], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(sample.video[:, 1:2], expected, atol=0.1)


def test_two_references_are_connected(image, video):
    scheduler = RecordingScheduler()
    [sample] = generate("a cat", [f"{image}; {video}"], ["0;0,1,-2,-2,2"], scheduler=scheduler)
    assert scheduler.calls[0]["mask"].tolist() == [[0, 1, 1, 1, 0, 0]]
    torch.testing.assert_close(sample.video[:, :1], read_reference(image, (16, 24)), rtol=0, atol=1e-6)
    torch.testing.assert_close(sample.video[:, 4:], read_reference(video, (16, 24))[:, -2:], rtol=0, atol=0.02)


def test_a_reference_in_the_prompt_wins_over_the_list(image, video):
    scheduler = RecordingScheduler()
    prompt = f'a cat{{"reference_path": "{image}", "mask_strategy": "0,0,0,2,1,0.5"}}'
    [sample] = generate([prompt], [video], ["0,0,0,0,6"], scheduler=scheduler)
    assert sample.prompt == "a cat"
    assert scheduler.calls[0]["mask"].tolist() == [[1, 1, 0.5, 1, 1, 1]]


def test_what_is_drawn_and_told_is_of_the_host_whatever_the_default_device_is():
    schedulers = RecordingScheduler(), RecordingScheduler()
    make_generator(schedulers[0]).generate("a cat", progress=False)
    generator = make_generator(schedulers[1])
    with torch.device("meta"):
        generator.generate("a cat", progress=False)
    [expected], [found] = (scheduler.calls for scheduler in schedulers)
    assert torch.equal(found["z"], expected["z"])
    for name, value in expected["conditions"].items():
        assert torch.equal(found["conditions"][name], value)


def test_each_loop_goes_on_from_the_last_frames():
    scheduler = RecordingScheduler()
    [sample] = generate("|0|cat|2|dog", scheduler=scheduler, loop=3, condition_frame_length=2)
    assert sample.video.shape[1] == 3 * (6 - 2) + 2
    assert [call["prompts"] for call in scheduler.calls] == [["cat"], ["cat"], ["dog"]]
    assert [call["mask"].tolist() for call in scheduler.calls] == [[[1] * 6], *[[[0, 0, 1, 1, 1, 1]]] * 2]
    decoded = [PixelEncoder().decode(call["z"])[0] for call in scheduler.calls]
    assert decoded[0][:, -2:].abs().max() > 1  # as the sampler left them; clamped for saving only
    for before, after in zip(decoded, decoded[1:], strict=False):
        torch.testing.assert_close(after[:, :2], before[:, -2:], rtol=1e-6, atol=1e-6)
    expected = torch.cat([decoded[0], decoded[1][:, 2:], decoded[2][:, 2:]], dim=1)
    assert torch.equal(sample.video, expected.clamp(-1, 1))


def test_of_a_batch_each_loop_goes_on_from_its_own_frames_whatever_references_there_are(image):
    arguments = ["a", "b"], [image, None], ["0", None]
    alone, together = (generate(*arguments, loop=2, condition_frame_length=2, batch_size=size) for size in (1, 2))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.video, other.video, rtol=0, atol=1e-5)


def test_references_may_enter_at_a_later_loop(image):
    scheduler = RecordingScheduler()
    generate("a", [image], ["1,0,0,-1"], scheduler=scheduler, loop=2, condition_frame_length=1, num_sample=2)
    masks = [call["mask"].tolist() for call in scheduler.calls]
    assert masks == [[[1] * 6], [[0, 1, 1, 1, 1, 0]]] * 2  # the second sample starts from the same references


def test_an_image_is_kept_through_real_sampling_while_the_rest_changes(image):
    [kept] = generate("a cat", [image], ["0,0,0,0,3"])
    [edited] = generate("a cat", [image], ["0,0,0,0,3,1"])
    reference = read_reference(image, (16, 24))
    assert (kept.video[:, :3] - reference).abs().mean() < 0.1  # only the least noisy step touches it
    assert (edited.video[:, :3] - reference).abs().mean() > 0.3


def test_the_model_is_told_the_frames_size_and_fps():
    values = {name: value.tolist() for name, value in make_conditions(2, SETTINGS).items()}
    assert values == {
        "num_frames": [6, 6],
        "height": [16, 16],
        "width": [24, 24],
        "ar": [pytest.approx(16 / 24)] * 2,
        "fps": [24, 24],
    }
    assert make_conditions(1, SampleSettings(num_frames=1))["fps"].tolist() == [120]
    as_trained = SampleSettings(image_size=(16, 24), aspect_ratio_as_trained=True)
    assert make_conditions(1, as_trained)["ar"].tolist() == [1.5]


def test_the_model_samples_in_evaluation_mode_and_is_left_as_it_was():
    scheduler = RecordingScheduler()
    generator = make_generator(scheduler)
    for training in (True, False):
        generator.model.train(training)
        generator.generate("a cat", progress=False)
        assert generator.model.training is training and not scheduler.calls[-1]["training"]


def test_samples_come_as_they_are_done():
    scheduler = RecordingScheduler()
    stream = make_generator(scheduler).stream(["a", "b"], progress=False)
    next(stream)
    assert len(scheduler.calls) == 1


def test_videos_are_saved_as_mp4_and_images_as_png(tmp_path):
    [video], [image] = generate("a cat"), generate("a cat", num_frames=1)
    path = video.save(tmp_path / "new" / "a.b")
    assert path.name == "a.b.mp4"
    read = read_reference(path, (16, 24))
    assert read.shape == (3, 6, 16, 24)
    path = image.save(tmp_path / "c")
    assert path.name == "c.png"
    torch.testing.assert_close(read_reference(path, (16, 24)), image.video, rtol=0, atol=0.005)


def test_one_bar_counts_the_steps_of_all_samples(capsys):
    make_generator().generate(["a", "b"], num_sample=2, loop=2)
    assert "24/24 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ((["a", "b"], ["x.png"]), {}, "reference_path has 1 entries for 2 prompts"),
        ((["a"], None, ["0", "0"]), {}, "mask_strategy has 2 entries for 1 prompts"),
        ((["a"], None, ["0"]), {}, r"prompt 0 \('a'\): .*there is no reference 0"),
        ((["a", "b"], [None, "no.png"], [None, "0"]), {}, r"prompt 1 \('b'\): .*there is no file 'no.png'"),
        ((["a"], ["https://example.org/a.png"], ["0"]), {}, "download it first"),
        ((["a"], ["x.png"], None), {}, "would not be used without a mask_strategy"),
        ((["|0|a|1|b"],), {}, "loop 1 is never reached"),
        ((["a"],), {"loop": 2, "condition_frame_length": 6}, "condition_frame_length 6 leaves nothing"),
        ((["a"],), {"num_frames": 0}, "num_frames must be at least 1"),
        ((["a"],), {"image_size": (16, 0)}, "image_size"),
        ((["a"],), {"image_size": (7, 24)}, "smaller than one latent pixel"),
        ((["a"],), {"fps": 0}, "fps must be a finite number above 0, got 0"),
        ((["a"],), {"fps": float("inf")}, "fps must be a finite number above 0, got inf"),
        ((["a"],), {"fps": 10**39}, "fps must be a finite number above 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(arguments, settings, named):
    scheduler = RecordingScheduler()
    with pytest.raises(ValueError, match=named):
        generate(*arguments, scheduler=scheduler, **settings)
    assert not scheduler.calls


def test_frames_outside_of_a_later_sample_are_named_before_the_first_is_sampled(image):
    scheduler = RecordingScheduler()
    with pytest.raises(ValueError, match=r"prompt 1 \('b'\): .*frames 0 to 6 do not fit into the sample of 6 frames"):
        generate(["a", "b"], [image, image], ["0", "0,0,0,0,7"], scheduler=scheduler)
    assert not scheduler.calls


@pytest.mark.parametrize("loop", [0, 1])
def test_a_reference_too_short_for_its_strategy_is_named_before_its_prompt_is_sampled(video, loop):
    scheduler = RecordingScheduler()
    message = r"prompt 0 \('a'\): .*frames 8 to 10 are asked of reference 0, which has 10"
    with pytest.raises(ValueError, match=message):
        generate("a", [video], [f"{loop},0,8,0,3"], scheduler=scheduler, loop=2, condition_frame_length=1)
    assert not scheduler.calls
