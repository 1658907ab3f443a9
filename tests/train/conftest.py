"""A handful of small clips and images, a tiny model, and helpers to run `opensora-fast train` on them."""

import math
from pathlib import Path

import pytest
import torch
from losses import read_losses

from opensora_fast import cli
from opensora_fast.data.video_files import save_image, save_video

SIZE = (144, 256)
CONFIG = """
dataset = dict(type="VariableVideoTextDataset", frame_interval=1)
bucket_config = {"144p": {1: (1.0, 2), 2: (1.0, 2), 4: (1.0, 1)}}
mask_ratios = {"mask_no": 0.5, "mask_image_head": 0.25, "mask_quarter_random": 0.25}
model = dict(
    type="STDiT2", hidden_size=48, num_heads=2, depth=1, input_sq_size=512, qk_norm=True, class_dropout_prob=0.5,
)
vae = dict(type="linear")
text_encoder = dict(type="bytes", model_max_length=16, output_dim=32)
scheduler = dict(type="iddpm", timestep_respacing="")
dtype = "fp32"
lr = 1e-3
ema_decay = 0.9
seed = 42
num_workers = 1
log_every = 2
ckpt_every = 0
"""


def make_clip(frames: int, number: int) -> torch.Tensor:
    """[3, frames, H, W] in [-1, 1]: a gradient whose color and place belong to the number, moving."""
    rows = torch.linspace(-1, 1, SIZE[0])[None, :, None]
    columns = torch.linspace(-1, 1, SIZE[1])[None, None, :]
    times = torch.arange(frames)[:, None, None] / 8 + number
    channels = [torch.sin(3 * rows + 2 * columns + times * (channel + 1)) for channel in range(3)]
    return torch.stack(channels) * (0.4 + 0.6 * math.cos(number) ** 2)


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """4 images, 4 clips of 3 frames and 2 of 6: an epoch of 6 batches."""
    import pandas as pd  # not on a GPU machine, where tests without clips run

    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number, frames in enumerate([1] * 4 + [3] * 4 + [6] * 2):
        name = f"{number}.png" if frames == 1 else f"{number}.mp4"
        if frames == 1:
            save_image(folder / name, make_clip(1, number))
        else:
            save_video(folder / name, make_clip(frames, number), fps=8)
        rows.append((name, f"pattern {number}", frames, *SIZE, 8.0))
    path = folder / "meta.csv"
    pd.DataFrame(rows, columns=["path", "text", "num_frames", "height", "width", "fps"]).to_csv(path, index=False)
    return path


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(config, table, capsys):
    """train(out, *more) runs the command in this process and returns (exit code, standard output, standard error)."""

    def run(out, *more, config=config):
        capsys.readouterr()
        arguments = ["train", str(config), "--data-path", str(table), "--out", str(out), "--device", "cpu"]
        code = cli.run([*arguments, *map(str, more)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def folder_of_whole(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(train, folder_of_whole) -> Path:
    """A run of 9 steps, an epoch and a half, that was never stopped; made once, and only read by the tests."""
    if not folder_of_whole.exists():
        code, _, error = train(folder_of_whole, "--steps", 9)
        assert code == 0, error
    assert len(read_losses(folder_of_whole)) == 9
    return folder_of_whole


@pytest.fixture
def train_together(run_together, config, table):
    """train_together(world_size, out, *more, fault=None) trains in several processes; see `run_together`. The gradients
    of the tiny model, with its 130 k parameters, are averaged in several segments, too."""

    def run(world_size, out, *more, **options):
        arguments = ["train", config, "--data-path", table, "--out", out, "--device", "cpu"]
        return run_together(world_size, [*arguments, *more], **options)

    return run
