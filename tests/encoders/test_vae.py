"""The real loading code of the SD VAE, on a small one with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_fast.encoders import build_video_encoder
from opensora_fast.encoders.vae import LATENT_SCALE, VideoAutoencoderKL


def build(folder: Path, dtype: torch.dtype = torch.float32, **keys) -> VideoAutoencoderKL:
    config = {"type": "VideoAutoencoderKL", "from_pretrained": str(folder), "local_files_only": True, "cache_dir": None}
    return build_video_encoder(config | keys, dtype=dtype)


def random_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_is_the_vae_frame_by_frame(vae_folder: Path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(vae_folder)).eval()
    video = random_video(2, 3, 3, 40, 24)
    with torch.no_grad():
        expected = torch.stack(
            [
                torch.stack([vae.encode(video[b, :, t][None]).latent_dist.mean[0] for t in range(3)], dim=1)
                for b in range(2)
            ]
        )
    latents = build(vae_folder, latents="mode").encode(video)
    assert latents.shape == (2, 4, 3, 5, 3)
    torch.testing.assert_close(latents, expected * 0.18215, rtol=1e-5, atol=1e-6)


def test_sampled_latents_follow_the_gaussian(vae_folder: Path):
    """The draws have the VAE's mean and deviation: checked over many equal frames."""
    encoder = build(vae_folder)
    video = random_video(1, 3, 1, 16, 16).expand(400, 3, 1, 16, 16)
    latents = encoder.encode(video, torch.Generator().manual_seed(0))
    with torch.no_grad():
        gaussian = encoder.module.encode(video[:1, :, 0]).latent_dist
    spread = gaussian.std[0] * LATENT_SCALE
    error = (latents[:, :, 0].mean(0) - gaussian.mean[0] * LATENT_SCALE) / spread
    assert error.abs().max() < 4.5 / 20  # 20 = sqrt(400): the error of the mean in standard errors
    torch.testing.assert_close(latents[:, :, 0].std(0) / spread, torch.ones_like(spread), rtol=0, atol=0.2)


@pytest.mark.parametrize("latents", ["sample", "mode"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 100])
def test_micro_batches_equal_the_whole_batch(vae_folder: Path, latents: str, micro_batch_size: int):
    video = random_video(2, 3, 5, 24, 16)
    whole, parts = build(vae_folder, latents=latents), build(vae_folder, latents=latents)
    parts.micro_batch_size = micro_batch_size
    encoded = whole.encode(video, torch.Generator().manual_seed(3))
    torch.testing.assert_close(parts.encode(video, torch.Generator().manual_seed(3)), encoded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.decode(encoded), whole.decode(encoded), rtol=1e-5, atol=1e-5)


def test_generator_makes_it_deterministic(vae_folder: Path):
    encoder, video = build(vae_folder), random_video(1, 3, 2, 16, 16)
    first = encoder.encode(video, torch.Generator().manual_seed(5))
    assert torch.equal(first, encoder.encode(video, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, encoder.encode(video, torch.Generator().manual_seed(6)))
    torch.manual_seed(7)
    unseeded = encoder.encode(video)
    torch.manual_seed(7)
    assert torch.equal(unseeded, encoder.encode(video))


@pytest.mark.parametrize("height, width", [(16, 16), (23, 17), (144, 258), (8, 9)])
def test_sizes_are_rounded_down(vae_folder: Path, height: int, width: int):
    encoder = build(vae_folder, latents="mode")
    size = encoder.get_latent_size((1, height, width))
    assert size == [1, height // 8, width // 8]
    latents = encoder.encode(random_video(1, 3, 1, height, width))
    assert list(latents.shape[2:]) == size
    assert list(encoder.decode(latents).shape) == [1, 3, 1, height // 8 * 8, width // 8 * 8]
    assert encoder.get_latent_size((None, None, 20)) == [None, None, 2]


def test_bfloat16(vae_folder: Path):
    video = random_video(1, 3, 2, 32, 32)
    exact = build(vae_folder, latents="mode").encode(video)
    encoder = build(vae_folder, torch.bfloat16, latents="mode")
    assert encoder.dtype == torch.bfloat16
    latents = encoder.encode(video)
    assert latents.dtype == torch.bfloat16
    assert (latents - exact).norm() / exact.norm() < 0.02
    assert encoder.decode(latents).dtype == torch.bfloat16


def test_is_frozen(vae_folder: Path):
    encoder = build(vae_folder)
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(random_video(1, 3, 1, 16, 16).requires_grad_()).requires_grad


def test_weights_in_a_bin_file(vae_folder: Path, tmp_path: Path):
    shutil.copy(vae_folder / "config.json", tmp_path)
    torch.save(load_file(vae_folder / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.bin")
    video = random_video(1, 3, 1, 16, 16)
    torch.testing.assert_close(
        build(tmp_path, latents="mode").encode(video), build(vae_folder, latents="mode").encode(video)
    )


def test_a_bin_file_is_not_executed(vae_folder: Path, tmp_path: Path, code: object):
    shutil.copy(vae_folder / "config.json", tmp_path)
    torch.save({"weight": code}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="could execute code, so they are refused"):
        build(tmp_path)


def test_missing_weights_are_an_error(vae_folder: Path, tmp_path: Path):
    """diffusers itself leaves them random."""
    shutil.copy(vae_folder / "config.json", tmp_path)
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="decoder.conv_in.weight"):
        build(tmp_path)


def test_weights_that_the_configuration_has_no_place_for_are_an_error(vae_folder: Path, tmp_path: Path):
    """diffusers itself leaves them out: the autoencoder would be cut short."""
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    keys = json.loads((vae_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"layers_per_block": 0}))
    with pytest.raises(ValueError, match="describes a smaller model than its weights are of"):
        build(tmp_path)


def test_names_of_attention_in_older_files_are_known(vae_folder: Path, tmp_path: Path):
    """As in the files of sd-vae-ft-ema."""
    shutil.copy(vae_folder / "config.json", tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    for name in [name for name in weights if "attentions" in name]:
        older = name
        for new, old in names.items():
            older = older.replace(f".{new}.", f".{old}.")
        weights[older] = weights.pop(name)
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    video = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    older, newer = (build(folder, latents="mode").encode(video) for folder in (tmp_path, vae_folder))
    assert torch.equal(older, newer)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_broken_files_are_named(vae_folder: Path, tmp_path: Path, name: str):
    shutil.copytree(vae_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(b"\x00garbage")
    with pytest.raises(ValueError, match="does not load"):
        build(tmp_path)


def test_another_down_sampling_is_an_error(vae_folder: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    keys = json.loads((vae_folder / "config.json").read_text())
    keys |= {"block_out_channels": [8, 8]}
    keys |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL.from_config(keys).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 times smaller"):
        build(tmp_path)


@pytest.mark.parametrize(
    "video, message",
    [
        (torch.zeros(3, 1, 16, 16), r"must be \[B, 3, T, H, W\]"),
        (torch.zeros(1, 4, 1, 16, 16), r"must be \[B, 3, T, H, W\]"),
        (torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 3, 1, 7, 16), "holds no patch"),
        (torch.zeros(0, 3, 1, 16, 16), "holds no patch"),
    ],
)
def test_wrong_videos_are_refused(vae_folder: Path, video: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        build(vae_folder).encode(video)


@pytest.mark.parametrize("shape", [(1, 3, 1, 2, 2), (4, 1, 2, 2)])
def test_wrong_latents_are_refused(vae_folder: Path, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, T, h, w\]"):
        build(vae_folder).decode(torch.zeros(shape))


@pytest.mark.parametrize("keys", [{"micro_batch_size": 0}, {"latents": "mean"}])
def test_wrong_settings_are_refused(vae_folder: Path, keys: dict):
    with pytest.raises(ValueError, match=next(iter(keys))):
        build(vae_folder, **keys)
