"""`opensora-fast sample` with a small model in the real formats, from the command line to the files."""

import json
import shutil

import pytest
import torch

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.cli import run
from opensora_fast.config import SampleConfig
from opensora_fast.data.probe import probe_media
from opensora_fast.data.video_files import read_reference, save_image
from opensora_fast.encoders.linear_autoencoder import LinearAutoencoder
from opensora_fast.sampling import Sample, build
from opensora_fast.sampling import run as sampling_run
from opensora_fast.sampling.build import build_generator
from opensora_fast.sampling.run import name_sample, run_sampling
from opensora_fast.train.checkpoints.checkpoint import write_checkpoint

from .toys import color_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a linear autoencoder, a reference image and a configuration."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config.small(caption_channels=32, depth=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "model")
    LinearAutoencoder.fit([torch.rand(3, 4, 32, 48) * 2 - 1]).save_pretrained(folder / "vae")
    save_image(folder / "image.png", color_clip(0.5, height=32, width=48)[:, 0])
    (folder / "sample.json").write_text(
        json.dumps(
            {
                "num_frames": 3,
                "image_size": [32, 48],
                "dtype": "fp32",
                "vae": {"type": "linear", "from_pretrained": str(folder / "vae")},
                "text_encoder": {"type": "bytes", "model_max_length": 8, "output_dim": 32},
                "scheduler": {"type": "iddpm", "num_sampling_steps": 2, "cfg_scale": 2.0, "cfg_channel": 3},
            }
        )
    )
    return folder


def sample(folder, *arguments, weights="model"):
    return run(["sample", str(folder / "sample.json"), "--ckpt-path", str(folder / weights), *arguments])


def test_prompts_become_files_whose_paths_are_printed(folder, tmp_path, capsys):
    assert sample(folder, "--prompt", "a cat", "a dog", "--save-dir", str(tmp_path), "--seed", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(tmp_path / "sample_0.mp4"), str(tmp_path / "sample_1.mp4")]
    assert read_reference(lines[0], (32, 48)).shape == (3, 3, 32, 48)


def test_several_processes_compute_a_video_together(folder, tmp_path, run_together):
    """5 frames by two, with a reference and a second loop: the file of one process, but for rounding."""
    words = ["sample", str(folder / "sample.json"), "--ckpt-path", str(folder / "model"), "--device", "cpu"]
    words += ["--prompt", "a cat", "--num-frames", "5", "--loop", "2", "--condition-frame-length", "2"]
    words += ["--reference-path", str(folder / "image.png"), "--mask-strategy", "0"]
    assert run([*words, "--save-dir", str(tmp_path / "one")]) == 0
    first, second = run_together(2, [*words, "--save-dir", tmp_path / "two"])
    assert first["code"] == second["code"] == 0, (first, second)
    assert first["out"].splitlines() == [str(tmp_path / "two" / "sample_0.mp4")] and not second["out"]
    videos = [read_reference(tmp_path / name / "sample_0.mp4", (32, 48)) for name in ("one", "two")]
    assert videos[0].shape == (3, 8, 32, 48)
    assert (videos[1] - videos[0]).abs().mean() < 2e-3 and videos[0].std() > 0.05


def test_every_option_reaches_the_sampler(folder, tmp_path, capsys):
    code = sample(
        folder,
        *("--prompt", "|0|sea|1|shore", "--num-frames", "4", "--image-size", "16", "32", "--loop", "2"),
        *("--condition-frame-length", "1", "--reference-path", str(folder / "image.png"), "--mask-strategy", "0"),
        *("--num-sampling-steps", "3", "--cfg-scale", "1.5", "--num-sample", "2", "--sample-name", "x"),
        *("--save-dir", str(tmp_path), "--device", "cpu", "scheduler.cfg_channel=None"),
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "12/12 steps" in captured.err  # 2 samples of 2 loops of 3 steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_0-0.mp4", "x_0-1.mp4"]
    assert read_reference(tmp_path / "x_0-0.mp4", (16, 32)).shape == (3, 7, 16, 32)


def test_a_size_that_is_not_made_of_whole_latent_pixels_is_noted_and_made_as_by_open_sora(folder, tmp_path, capsys):
    arguments = ("--prompt", "a cat", "--num-frames", "1", "--save-dir", str(tmp_path))
    assert sample(folder, *arguments, "--image-size", "33", "54") == 0
    note = "note: image_size 33 x 54 is made as 32 x 48, of whole latent pixels of 8 x 8; the model is told 33 x 54"
    assert capsys.readouterr().err.count(note) == 1
    assert probe_media(tmp_path / "sample_0.png", "header").height == 32
    assert probe_media(tmp_path / "sample_0.png", "header").width == 48
    assert sample(folder, *arguments) == 0
    assert "note" not in capsys.readouterr().err


def test_one_frame_becomes_a_png(folder, tmp_path):
    assert sample(folder, "--prompt", "a cat", "--num-frames", "1", "--save-dir", str(tmp_path)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sample_0.png"]


def test_cpu_threads_are_those_of_the_configuration_during_the_run_only(folder, tmp_path, monkeypatch):
    threads = set()
    real = STDiT2.forward

    def record(self, *arguments, **conditions):
        threads.add(torch.get_num_threads())
        return real(self, *arguments, **conditions)

    monkeypatch.setattr(STDiT2, "forward", record)
    before = torch.get_num_threads()
    arguments = ("--prompt", "a cat", "--num-frames", "1", "--save-dir", str(tmp_path), f"cpu_threads={before + 1}")
    assert sample(folder, *arguments) == 0
    assert threads == {before + 1} and torch.get_num_threads() == before


def test_a_prompt_file_and_indices_choose_prompts(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = ("--prompt-path", str(tmp_path / "prompts.txt"), "--start-index", "1", "--prompt-as-path")
    assert sample(folder, *options, "--num-frames", "1", "--save-dir", str(tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["three.png", "two.png"]


def test_a_part_of_the_prompts_gets_the_names_and_samples_that_it_has_among_all(folder, tmp_path):
    options = ("--prompt", "one", "two", "three", "--num-frames", "1", "--num-sampling-steps", "2", "--save-dir")
    assert sample(folder, *options, str(tmp_path / "all")) == 0
    for part in (("--end-index", "1"), ("--start-index", "1")):
        assert sample(folder, *options, str(tmp_path / "parts"), *part) == 0
    names = ["sample_0.png", "sample_1.png", "sample_2.png"]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_dpm_solver_drafts(folder, tmp_path, capsys):
    scheduler = 'scheduler=dict(type="dpm-solver", num_sampling_steps=2, cfg_scale=2.0)'
    assert sample(folder, scheduler, "--prompt", "a cat", "--save-dir", str(tmp_path)) == 0
    given = ("--reference-path", str(folder / "image.png"), "--mask-strategy", "0")
    assert sample(folder, scheduler, "--prompt", "a cat", "--save-dir", str(tmp_path), *given, weights="nowhere") == 1
    assert "dpm-solver cannot keep or edit frames" in capsys.readouterr().err


def test_a_value_that_replaces_the_trained_one_is_noted(folder, tmp_path, capsys):
    arguments = ("--prompt", "a cat", "--num-frames", "1", "--save-dir", str(tmp_path))
    assert sample(folder, *arguments, "model.input_sq_size=256", "model.qk_norm=True") == 0
    notes = capsys.readouterr().err
    assert "note: model.input_sq_size=256 replaces 512, with which" in notes and "qk_norm" not in notes


def test_a_training_run_is_sampled_with_its_averaged_weights_and_its_autoencoder(folder, tmp_path):
    def fill(checkpoint):
        model = STDiT2.from_pretrained(folder / "model")
        model.save_pretrained(checkpoint / "ema")
        (checkpoint / "model").mkdir()
        shutil.copytree(folder / "vae", checkpoint / "encoders" / "vae")

    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints", 5, fill, keep=1)
    arguments = ("--prompt", "a cat", "--num-frames", "1", "--save-dir")
    assert sample(folder, *arguments, str(tmp_path / "a")) == 0
    sources = {
        "b": tmp_path / "run",
        "c": checkpoint,
        "d": checkpoint / "ema",
        "e": checkpoint / "ema/model.safetensors",
    }
    for name, weights in sources.items():
        assert sample(folder, "vae.from_pretrained=None", *arguments, str(tmp_path / name), weights=weights) == 0
    first, *others = (read_reference(tmp_path / name / "sample_0.png", (32, 48)) for name in ("a", *sources))
    assert all(torch.equal(first, other) for other in others)


def test_encoders_and_noise_that_a_run_was_not_trained_with_are_noted(folder, tmp_path, capsys):
    def fill(checkpoint):
        shutil.copytree(folder / "model", checkpoint / "ema")
        (checkpoint / "model").mkdir()
        trained = {key: json.loads((folder / "sample.json").read_text())[key] for key in ("vae", "text_encoder")}
        trained["scheduler"] = {"type": "iddpm", "noise_schedule": "squaredcos_cap_v2"}
        trained["text_encoder"]["seed"] = 7
        (checkpoint / "train_config.json").write_text(json.dumps(trained | {"bucket_config": {"144p": {1: (1.0, 1)}}}))

    folder_of_run = tmp_path / "run"
    checkpoint = write_checkpoint(folder_of_run / "checkpoints", 5, fill, keep=1)
    arguments = ("--prompt", "a cat", "--num-frames", "1", "--save-dir", str(tmp_path))
    for weights in (folder_of_run, checkpoint / "ema"):
        assert sample(folder, *arguments, weights=weights) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")] == [
            f"note: text_encoder.seed is 0, {checkpoint} was trained with 7",
            f"note: scheduler.noise_schedule is 'linear', {checkpoint} was trained with 'squaredcos_cap_v2'",
        ]
    as_trained = ("text_encoder.seed=7", "scheduler.noise_schedule=squaredcos_cap_v2")
    assert sample(folder, *arguments, *as_trained, weights=folder_of_run) == 0
    assert "note" not in capsys.readouterr().err


def test_the_configuration_is_one_call_from_python(folder):
    values = json.loads((folder / "sample.json").read_text())
    config = SampleConfig(**values, model={"from_pretrained": str(folder / "model")})
    generator = build_generator(config, "cpu")
    [sample] = generator.generate("a cat", progress=False)
    assert sample.video.shape == (3, 3, 32, 48)
    assert (generator.scheduler.cfg_scale, generator.scheduler.cfg_channel) == (2.0, 3)
    assert generator.settings.seed == 42 and next(generator.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--prompt", "a"), "--save-dir"),
        (("--prompt", "a", "save_dir=''"), "--save-dir"),
        (("--save-dir", "out"), "--prompt TEXT"),
        (("--save-dir", "out", "--prompt", "a", "--mask-strategy", "0,x"), "reference must be a whole number"),
        (("--save-dir", "out", "--prompt", "a", "b", "--reference-path", "x"), "1 entries for 2 prompts"),
        (("--save-dir", "out", "--prompt", "a", "--start-index", "4"), "leave none of 1 prompts"),
        (("--save-dir", "out", "--prompt-path", "missing.txt"), "missing.txt"),
        (("--save-dir", "out", "--prompt", "a", "--prompt-path", "missing.txt"), "give one of the two"),
        (("model.depth=3", "--save-dir", "out", "--prompt", "a"), "missing blocks"),
        (("text_encoder.output_dim=48", "--save-dir", "out", "--prompt", "a"), "trained with caption_channels=32"),
        (("scheduler.type=iddpm-speed", "--save-dir", "out", "--prompt", "a"), "iddpm-speed"),
        (("scheduler.num_sampling_steps=None", "--save-dir", "out", "--prompt", "a"), "num_sampling_steps is missing"),
        (
            ("--save-dir", "out", "--prompt", "a", "--ckpt-path", "./nothing"),
            "--ckpt-path or model.from_pretrained: there is no file or folder nothing;",
        ),
        (("--save-dir", "out", "--prompt", "a", "--device", "gpu"), "choose cpu or cuda"),
        (("--save-dir", "out", "--prompt", "a", "--image-size", "4", "48"), "image_size (4, 48)"),
        (
            ("--save-dir", "out", "--prompt", "a", "--loop", "2", "num_frames=6", "scheduler=dict(type='dpm-solver')"),
            "loop=2",
        ),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_1(folder, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert sample(folder, *arguments) == 1
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_explained(folder, tmp_path, monkeypatch, capsys):
    def run_out(*arguments, **conditions):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    monkeypatch.setattr(STDiT2, "forward", run_out)
    more = ("--save-dir", str(tmp_path), "--prompt")
    assert sample(folder, *more, "a", "b", "c", "batch_size=2") == 1
    assert (
        "error: out of GPU memory with 2 videos at a time, each of 3 frames of 32 x 48: lower batch_size, or lower "
        "num_frames or image_size, or share each video among several GPUs with torchrun. CUDA out of memory. Tried"
    ) in capsys.readouterr().err
    assert sample(folder, *more, "a", "batch_size=2") == 1
    assert "with 1 video of 3 frames of 32 x 48: lower num_frames or" in capsys.readouterr().err
    config = SampleConfig(image_size=(32, 48), cuda_graph_tokens=64)  # the VAE is Open-Sora's
    with pytest.raises(ValueError, match=r"lower vae.micro_batch_size, .* \(now all\), or .* cuda_graph_tokens=0"):
        with sampling_run.explain_out_of_memory(config, 1, 1):
            raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"), sampling_run.explain_out_of_memory(config, 1, 1):
        raise RuntimeError("something else")


def test_weights_that_do_not_fit_into_memory_are_not_put_down_to_the_size_of_a_video(
    folder, tmp_path, monkeypatch, capsys
):
    def run_out(*arguments, **conditions):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    monkeypatch.setattr(STDiT2, "to", run_out)
    assert sample(folder, "--save-dir", str(tmp_path), "--prompt", "a") == 1
    message = capsys.readouterr().err
    assert "error: out of GPU memory with the weights of encoders and model: " in message
    assert "take a GPU with more. CUDA out of memory. Tried" in message and "num_frames" not in message
    config = SampleConfig(image_size=(32, 48))  # T5, in float32 beside a model in bf16
    with pytest.raises(ValueError, match="text_encoder.shardformer=True keeps T5 in bf16, .* or take a GPU with more"):
        with sampling_run.explain_weights_out_of_memory(config):
            raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"):
        with sampling_run.explain_weights_out_of_memory(config):
            raise RuntimeError("something else")


def test_weights_are_looked_for_before_encoders_are_loaded_or_downloaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "build_video_encoder", lambda *_: pytest.fail("an encoder was loaded"))
    arguments = ["sample", str(folder / "sample.json"), "--prompt", "a", "--save-dir", str(tmp_path), "--device", "cpu"]
    assert run(arguments) == 1
    assert "there are no weights to sample from; give --ckpt-path" in capsys.readouterr().err
    assert run([*arguments, "--ckpt-path", "nowhere"]) == 1
    assert "--ckpt-path or model.from_pretrained: there is no file or folder nowhere;" in capsys.readouterr().err


def test_mistakes_in_prompts_and_folders_cost_no_time(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling_run, "build_generator", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder" / "deep"):
        assert sample(folder, "--prompt", "a", "--save-dir", str(place)) == 1
        assert f"save_dir {place}: {tmp_path / 'file'} is a file; give a folder" in capsys.readouterr().err
    options = ("--reference-path", "missing.png", "--mask-strategy", "0", "--save-dir", str(tmp_path))
    assert sample(folder, "--prompt", "a", *options) == 1
    assert "there is no file 'missing.png'" in capsys.readouterr().err


def test_prompts_of_one_name_do_not_overwrite_each_other(folder, tmp_path):
    long = "x" * 300
    prompts = ("--prompt", "a_2", "a", "a", f"{long}1", f"{long}2")
    assert sample(folder, *prompts, "--prompt-as-path", "--num-frames", "1", "--save-dir", str(tmp_path)) == 0
    names = ["a.png", "a_2.png", "a_2_2.png", f"{'x' * 200}.png", f"{'x' * 200}_4.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_without_weights_nothing_is_sampled(folder):
    config = SampleConfig(**json.loads((folder / "sample.json").read_text()), prompt=["a"], save_dir="out")
    with pytest.raises(ValueError, match="no weights to sample from"):
        list(run_sampling(config, "cpu"))


@pytest.mark.parametrize(
    ("settings", "prompt", "expected"),
    [
        ({}, "a", "sample_3"),
        ({"sample_name": "x"}, "a", "x_3"),
        ({"num_sample": 2}, "a", "sample_3-1"),
        ({"prompt_as_path": True}, "a/b: c?", "a b c"),
        ({"prompt_as_path": True, "sample_name": "x-"}, "../..", "x-sample"),
        ({"prompt_as_path": True}, "é" * 150, "é" * 100),
        # Bytes of a command line that are not UTF-8, as Python holds them.
        ({"prompt_as_path": True}, "caf\udce9 au lait", "caf au lait"),
        ({"prompt_as_path": True}, "\udce9", "sample"),
    ],
)
def test_files_are_named_by_number_or_prompt(settings, prompt, expected):
    config = SampleConfig(image_size=(16, 24), **settings)
    assert name_sample(Sample(prompt, 3, 1, torch.zeros(3, 1, 1, 1), 8.0), config) == expected


def test_the_weights_beside_a_configuration_may_be_a_pytorch_file(folder, tmp_path):
    shutil.copy(folder / "model" / "config.json", tmp_path)
    torch.save(STDiT2.from_pretrained(folder / "model").state_dict(), tmp_path / "pytorch_model.bin")
    for name, weights in (("safetensors", folder / "model"), ("bin", tmp_path)):
        assert sample(folder, "--prompt", "a", "--save-dir", str(tmp_path / name), weights=weights) == 0
    assert (tmp_path / "bin/sample_0.mp4").read_bytes() == (tmp_path / "safetensors/sample_0.mp4").read_bytes()


def test_a_run_without_a_checkpoint_holds_no_weights(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"dataset": {}, "bucket_config": {}}))
    assert sample(folder, "--prompt", "a", "--save-dir", str(tmp_path / "out"), weights=tmp_path) == 1
    assert f"{tmp_path}: holds no weights" in capsys.readouterr().err


def test_weights_without_a_configuration_take_their_shape_from_the_model_section(folder, tmp_path, capsys):
    state = STDiT2.from_pretrained(folder / "model").state_dict()
    torch.save(state, tmp_path / "ema.pt")
    checkpoint = tmp_path / "epoch0-global_step5"  # of Open-Sora's trainer
    (checkpoint / "model").mkdir(parents=True)
    torch.save(state, checkpoint / "model" / "pytorch_model.bin")
    shape = ["model.hidden_size=144", "model.num_heads=2", "model.depth=1", "model.qk_norm=True"]
    common = [str(folder / "sample.json"), *shape, "model.input_sq_size=512", "--prompt", "a cat", "--seed", "3"]
    assert sample(folder, "--prompt", "a cat", "--save-dir", str(tmp_path / "folder"), "--seed", "3") == 0
    for name, weights in (("file", tmp_path / "ema.pt"), ("theirs", checkpoint)):
        assert run(["sample", *common, "--ckpt-path", str(weights), "--save-dir", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "sample_0.mp4").read_bytes() == (tmp_path / "folder/sample_0.mp4").read_bytes()
    deeper = [word.replace("depth=1", "depth=2") for word in common]
    assert run(["sample", *deeper, "--ckpt-path", str(tmp_path / "ema.pt"), "--save-dir", str(tmp_path)]) == 1
    assert "do not fit the model: missing blocks.1" in capsys.readouterr().err
